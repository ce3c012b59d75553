package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/stretchr/testify/require"
)

func TestRun(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(engine.BuiltIn, &out))
	t.Log("\n" + out.String())
	require.Regexp(t, `^hidden states of layer 3: \[1 10 112\]
"The Eiffel Tower is in the city of" continues with
 +" Paris"  +[0-9.]+ %
( +".+"  +[0-9.]+ %
){2}with the first MLP silenced -> ".+"
"The Colosseum is in the city of" -> " Rome"
the same with layer 3's last state of the other prompt -> " Paris"
$`, out.String())
	require.NotContains(t, out.String(), `silenced -> " Paris"`)
	require.Zero(t, aten.Live(), "tensors left behind")
}

func TestRunOfNoModel(t *testing.T) {
	err := run(filepath.Join(t.TempDir(), "nothing"), &strings.Builder{})
	require.ErrorContains(t, err, "there is no directory")
}
