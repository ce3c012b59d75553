package main

import (
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/server"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/nnsight-go/nnsight-go/engine/server/work"
	"github.com/stretchr/testify/require"
)

func TestRun(t *testing.T) {
	m, err := engine.Open(engine.BuiltIn, engine.Options{Load: true})
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	e, err := jobs.Embed(t.TempDir(), "", 0, "")
	require.NoError(t, err)
	defer e.Close()
	nc, err := e.Connect("")
	require.NoError(t, err)
	defer nc.Close()
	store, err := jobs.Open(t.Context(), nc, jobs.Options{})
	require.NoError(t, err)
	worker, err := work.Start(t.Context(), store, map[string]*engine.Model{engine.BuiltIn: m}, work.Options{})
	require.NoError(t, err)
	defer worker.Close(t.Context())
	h, err := server.New(store, server.Options{}, server.NewMetrics())
	require.NoError(t, err)
	web := httptest.NewServer(h)
	defer web.Close()
	var out strings.Builder
	require.NoError(t, run(t.Context(), web.URL, "", &out))
	t.Log("\n" + out.String())
	require.Contains(t, out.String(), "hidden state: Paris\n Rome")
}
