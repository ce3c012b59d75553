package server_test

import (
	"encoding/json"
	"path/filepath"
	"sync"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/remote"
	"github.com/nnsight-go/nnsight-go/engine/server"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/nnsight-go/nnsight-go/engine/server/keys"
	"github.com/nnsight-go/nnsight-go/engine/server/work"
	"github.com/stretchr/testify/require"
)

// generated is a generation from a prompt of so many tokens.
func generated(t testing.TB, prompt, more int) []byte {
	r := remote.Request{Version: 1, Model: name, Kind: remote.Generate, Prompt: &remote.Prompt{Rows: [][]int64{make([]int64, prompt)}},
		Settings: &gen.Settings{MaxNewTokens: more}}
	for range more {
		r.Steps = append(r.Steps, remote.Step{End: true, Want: []string{"drawn"}})
	}
	text, err := json.Marshal(r)
	require.NoError(t, err)
	var w remote.Writer
	w.Bytes("request", text)
	file, err := w.File()
	require.NoError(t, err)
	return file
}

// made is a trace that saves a tensor that it makes.
func made(sizes ...int64) *graph.Graph {
	list := graph.List()
	for _, n := range sizes {
		list.L = append(list.L, graph.Int(n))
	}
	g := saved(1, 2)
	g.Nodes = append(g.Nodes, graph.Node{Kind: graph.KindCall, Op: "aten::ones", Args: []graph.Arg{list}, Pos: -1}, node(graph.KindSave, graph.Ref(2)))
	return g
}

// A key may ask for less than the server lets everybody have, never for more.
func TestAKeyHasLimits(t *testing.T) {
	store := keys.Open(filepath.Join(t.TempDir(), "keys.json"))
	as := func(l jobs.Limits) string {
		key, _, err := store.Create(keys.Key{Name: "somebody", Limits: l})
		require.NoError(t, err)
		return "Authorization: Bearer " + key
	}
	all := as(jobs.Limits{})
	s := start(t, server.Options{Keys: store}, work.Options{Limits: remote.Limits{Work: 1e7, Memory: 1 << 24, Output: 1 << 16}})
	trace := request(t, name, saved(1, 2, 3, 4, 5, 6, 7, 8))
	for _, r := range [][]byte{trace, generated(t, 8, 8)} {
		status, data, _ := s.ask("POST", "/v1/jobs?wait=30", r, all)
		require.Equal(t, 200, status, string(data))
		s.refused(422, "multiplications, and a job may take 2.0e+04", "POST", "/v1/jobs?wait=30", r, as(jobs.Limits{Work: 2e4}))
		s.refused(422, "of memory at once, and a job may take 512 bytes", "POST", "/v1/jobs?wait=30", r, as(jobs.Limits{Memory: 512}))
	}
	e := s.refused(422, "would take 512 bytes, and a job may send 500 bytes", "POST", "/v1/jobs?wait=30", trace, as(jobs.Limits{Output: 500}))
	require.Contains(t, e.Hint, "Save less")
	s.refused(422, "and a job may send 64.0 KiB", "POST", "/v1/jobs?wait=30", request(t, name, made(1<<15)), as(jobs.Limits{Output: 1 << 30}))
	status, data, _ := s.ask("POST", "/v1/jobs?wait=30", trace, as(jobs.Limits{Work: 1e9, Memory: 1 << 40}))
	require.Equal(t, 200, status, string(data))
}

// What is asked for and refused is never made: not by a trace, and not by the cache of a generation.
func TestWhatIsRefusedIsNotMade(t *testing.T) {
	require.NoError(t, aten.CapMemory(1<<40))
	defer func() { require.NoError(t, aten.CapMemory(-1)) }()
	s := start(t, server.Options{}, work.Options{Limits: remote.Limits{Memory: 1 << 12}})
	before := aten.PeakAllocated()
	for _, r := range [][]byte{request(t, name, made(1<<28)), request(t, name, made(1<<20, 1<<20)), generated(t, 2, 31)} {
		s.refused(422, "of memory at once", "POST", "/v1/jobs?wait=30", r)
	}
	require.Less(t, aten.PeakAllocated()-before, int64(1<<16))
}

// A job that is too dear is refused beside others, which notice nothing.
func TestWhatIsTooDearAmongOthers(t *testing.T) {
	s := start(t, server.Options{}, work.Options{Limits: remote.Limits{Output: 1 << 12}})
	var group sync.WaitGroup
	for i := range 24 {
		group.Go(func() {
			if i%8 == 3 {
				status, data, _ := s.ask("POST", "/v1/jobs?wait=30", request(t, name, made(1<<10)))
				require.Equal(t, 422, status, string(data))
				require.Contains(t, string(data), "and a job may send 4.0 KiB")
				return
			}
			r := request(t, name, saved(1, 2, int64(i%5)))
			status, data, _ := s.ask("POST", "/v1/jobs?wait=30", r)
			require.Equal(t, 200, status, string(data))
			require.True(t, alike(t, s.here(r), data))
		})
	}
	group.Wait()
}
