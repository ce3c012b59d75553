package main

import (
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/server"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/nnsight-go/nnsight-go/engine/server/servertest"
	"github.com/nnsight-go/nnsight-go/engine/server/work"
	"github.com/stretchr/testify/require"
)

func TestRun(t *testing.T) {
	m, err := engine.Open(engine.BuiltIn, engine.Options{Load: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	h, _, _ := servertest.Start(t, map[string]*engine.Model{engine.BuiltIn: m}, jobs.Options{}, server.Options{}, work.Options{})
	web := httptest.NewServer(h)
	defer web.Close()
	var out strings.Builder
	require.NoError(t, run(t.Context(), web.URL, "", &out))
	t.Log("\n" + out.String())
	require.Contains(t, out.String(), "hidden state: Paris\n Rome")
}
