// Package servertest puts servers together for tests: queue, worker and routes in one process.
package servertest

import (
	"context"
	"net/http"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/server"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/nnsight-go/nnsight-go/engine/server/work"
	"github.com/stretchr/testify/require"
)

// Start gives the routes of a server, its store and the worker of its models. All but the models ends with the test,
// after whatever the caller cleans up later.
func Start(t testing.TB, models map[string]*engine.Model, j jobs.Options, o server.Options, w work.Options) (http.Handler, *jobs.Store, *work.Worker) {
	e, err := jobs.Embed(t.TempDir(), "", 0, "")
	require.NoError(t, err)
	t.Cleanup(e.Close)
	nc, err := e.Connect("")
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	store, err := jobs.Open(t.Context(), nc, j)
	require.NoError(t, err)
	metrics := server.NewMetrics()
	h, err := server.New(store, o, metrics) // it hears of workers from now on
	require.NoError(t, err)
	w.Done = metrics.Done
	worker, err := work.Start(t.Context(), store, models, w)
	require.NoError(t, err)
	t.Cleanup(func() { worker.Close(context.Background()) })
	return h, store, worker
}
