package work

import (
	"encoding/json"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/remote"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/stretchr/testify/require"
)

// A job whose worker has ended goes alone from then on: it may be why.
func TestWhoHasEndedAWorkerHasNoCompany(t *testing.T) {
	e, err := jobs.Embed(t.TempDir(), "", 0, "")
	require.NoError(t, err)
	defer e.Close()
	nc, err := e.Connect("")
	require.NoError(t, err)
	defer nc.Close()
	store, err := jobs.Open(t.Context(), nc, jobs.Options{})
	require.NoError(t, err)
	require.NoError(t, store.AddModel(t.Context(), "m", nil))
	text, err := json.Marshal(remote.Request{Version: 1, Model: "m", Kind: remote.Trace, Steps: []remote.Step{{Program: []string{"g"}, End: true}}})
	require.NoError(t, err)
	var w remote.Writer
	w.Bytes("request", text)
	w.Bytes("g", graph.Encode(&graph.Graph{Invokes: []graph.Invoke{{Rows: [][]int64{{1}}}}}))
	file, err := w.File()
	require.NoError(t, err)
	_, err = store.Submit(t.Context(), &jobs.Submission{Owner: "me", Model: "m", Kind: remote.Trace, Request: file})
	require.NoError(t, err)
	for _, first := range []bool{true, false} {
		q, err := store.Queue(t.Context(), "m", 4)
		require.NoError(t, err)
		task := q.Take(t.Context())
		q.Close()
		request, err := remote.Parse(task.Request, remote.Limits{})
		require.NoError(t, err)
		require.Equal(t, first, (&job{Task: task, request: request}).company() != nil)
		task.Release() // as the lease does of a worker that is gone
	}
}
