package main

import (
	"context"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/stretchr/testify/require"
)

func TestRun(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(context.Background(), engine.BuiltIn, &out))
	t.Log("\n" + out.String())
	require.Regexp(t, `^The Eiffel Tower is in the city of Paris\.
(step [0-3]: ".+"  +[0-9.]+ %
){1,4}$`, out.String())
	require.NotContains(t, out.String(), `step 0: " Paris"`)
	require.Zero(t, aten.Live(), "tensors left behind")
}

func TestRunCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	require.ErrorIs(t, run(ctx, engine.BuiltIn, &strings.Builder{}), context.Canceled)
	require.Zero(t, aten.Live(), "tensors left behind")
}
