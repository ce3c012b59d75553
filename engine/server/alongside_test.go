package server_test

import (
	"context"
	"encoding/json"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/remote"
	"github.com/nnsight-go/nnsight-go/engine/server"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/nnsight-go/nnsight-go/engine/server/servertest"
	"github.com/nnsight-go/nnsight-go/engine/server/work"
	"github.com/stretchr/testify/require"
)

// long is a model whose generations may take a while.
const long = `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16,
	"n_positions": 4096, "vocab_size": 24}`

func startLong(t *testing.T, w work.Options) *site {
	m, err := engine.Open(enginetest.Directory(t, long, 1), engine.Options{Prepack: -1, Load: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	h, store, worker := servertest.Start(t, map[string]*engine.Model{name: m}, jobs.Options{MaxQueue: 1000}, server.Options{}, w)
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return &site{t, s.URL, m, store, worker}
}

// growth is a generation of so many tokens, of which the drawn ones come back.
func growth(t testing.TB, more int, prompt ...int64) []byte {
	return growthBy(t, gen.Settings{MaxNewTokens: more}, prompt...)
}

func growthBy(t testing.TB, settings gen.Settings, prompt ...int64) []byte {
	more := settings.MaxNewTokens
	r := remote.Request{Version: 1, Model: name, Kind: remote.Generate, Prompt: &remote.Prompt{Rows: [][]int64{prompt}},
		Settings: &settings}
	for range more {
		r.Steps = append(r.Steps, remote.Step{End: true, Want: []string{"drawn"}})
	}
	var w remote.Writer
	if settings.Sample {
		r.Random = "random"
		random, err := aten.RandomState("cpu")
		require.NoError(t, err)
		defer random.Free()
		require.NoError(t, w.Tensor("random", random))
	}
	text, err := json.Marshal(r)
	require.NoError(t, err)
	w.Bytes("request", text)
	file, err := w.File()
	require.NoError(t, err)
	return file
}

// submit sends a job that nobody waits for yet.
func (s *site) submit(data []byte) (id string) {
	status, answer, head := s.ask("POST", "/v1/jobs", data)
	require.Equal(s.t, 202, status, string(answer))
	return head.Get("Nnsight-Job")
}

func (s *site) job(id string) (j jobs.Job) {
	_, data, _ := s.ask("GET", "/v1/jobs/"+id, nil)
	require.NoError(s.t, json.Unmarshal(data, &j))
	return j
}

// begun waits until a job runs.
func (s *site) begun(id string) {
	require.Eventually(s.t, func() bool { return s.job(id).State != jobs.Queued }, 30*time.Second, time.Millisecond)
}

// wait gives the state of a job once it is a final one.
func (s *site) wait(id string) jobs.Job {
	s.ask("GET", "/v1/jobs/"+id+"/result?wait=60", nil)
	return s.job(id)
}

// A generation that comes while another grows has its tokens first; the other can be cancelled meanwhile, and what is bad
// is told at once.
func TestAGenerationJoinsAnother(t *testing.T) {
	s := startLong(t, work.Options{})
	slow := s.submit(growth(t, 3500, 1, 2, 3))
	s.begun(slow)
	for i := range int64(5) {
		r := growth(t, 4, 1+i, 2)
		want := s.here(r)
		status, got, _ := s.ask("POST", "/v1/jobs?wait=60", r)
		require.Equal(t, 200, status, string(got))
		require.Equal(t, string(want), string(got))
	}
	s.refused(422, "vocabulary", "POST", "/v1/jobs?wait=60", growth(t, 4, 1<<40))
	require.Equal(t, jobs.Running, s.job(slow).State)
	beside := s.submit(growth(t, 4, 1, 2))
	said := s.wait(beside).Log
	require.Len(t, said, 2)
	require.Equal(t, "begun", said[0].Text)
	require.Regexp(t, "^done after .*, in passes with up to 1 others$", said[1].Text)
	_, _, _ = s.ask("DELETE", "/v1/jobs/"+slow, nil)
	require.Equal(t, jobs.Cancelled, s.wait(slow).State)
	status, data, _ := s.ask("POST", "/v1/jobs?wait=60", request(t, name, saved(1, 2, 3)))
	require.Equal(t, 200, status, string(data))
}

// Once something else waits, nothing joins any more.
func TestWhatWaitsHasItsTurn(t *testing.T) {
	s := startLong(t, work.Options{})
	slow := s.submit(growth(t, 400, 1, 2, 3))
	s.begun(slow)
	trace := s.submit(request(t, name, saved(1, 2, 3)))
	s.begun(trace)
	late := s.submit(growth(t, 2, 4, 5))
	first, second, third := s.wait(slow), s.wait(trace), s.wait(late)
	for _, j := range []jobs.Job{first, second, third} {
		require.Equal(t, jobs.Completed, j.State)
	}
	require.False(t, first.Ended.After(*second.Ended))
	require.False(t, second.Ended.After(*third.Ended), "it would have joined")
}

// A member that takes too long ends alone.
func TestAMemberThatIsLate(t *testing.T) {
	s := startLong(t, work.Options{Time: 500 * time.Millisecond})
	slow := s.submit(growth(t, 3500, 1, 2, 3))
	s.begun(slow)
	r := growth(t, 4, 3, 2)
	status, got, _ := s.ask("POST", "/v1/jobs?wait=60", r)
	require.Equal(t, 200, status, string(got))
	require.Equal(t, string(s.here(r)), string(got))
	ended := s.wait(slow)
	require.Equal(t, jobs.Failed, ended.State)
	require.ErrorContains(t, ended.Error, "as long as this server lets one")
}

// slow is a generation whose step of that number multiplies matrices for some ten seconds.
func slow(t testing.TB, step int) []byte {
	call := func(op string, args ...graph.Arg) graph.Node {
		return graph.Node{Kind: graph.KindCall, Op: op, Args: args, Pos: -1}
	}
	g := &graph.Graph{Invokes: []graph.Invoke{{}}, Nodes: []graph.Node{call("aten::ones", graph.List(graph.Int(1024), graph.Int(1024)))}}
	for i := range graph.ID(400) {
		g.Nodes = append(g.Nodes, call("aten::mm", graph.Ref(i), graph.Ref(0)))
	}
	g.Nodes = append(g.Nodes, call("aten::sum", graph.Ref(400)), graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(401)}, Pos: -1})
	r := remote.Request{Version: 1, Model: name, Kind: remote.Generate, Prompt: &remote.Prompt{Rows: [][]int64{{1, 2}}},
		Settings: &gen.Settings{MaxNewTokens: step + 2}}
	for range r.Settings.MaxNewTokens {
		r.Steps = append(r.Steps, remote.Step{End: true})
	}
	r.Steps[step].Program, r.Steps[step].Want = []string{"g"}, []string{"results"}
	text, err := json.Marshal(r)
	require.NoError(t, err)
	var w remote.Writer
	w.Bytes("request", text)
	w.Bytes("g", graph.Encode(g))
	file, err := w.File()
	require.NoError(t, err)
	return file
}

// A step of somebody's takes longer than a job may: it ends then, and who was beside it has what it has alone.
func TestAStepThatIsLate(t *testing.T) {
	s := startLong(t, work.Options{Time: 1500 * time.Millisecond})
	for _, step := range []int{0, 300} {
		beside := growth(t, 400, 1, 2, 3)
		want := s.here(beside)
		begun := time.Now()
		one, other := s.submit(beside), s.submit(slow(t, step))
		require.Equal(t, jobs.Failed, s.wait(other).State)
		require.ErrorContains(t, s.job(other).Error, "as long as this server lets one")
		require.Less(t, time.Since(begun), 6*time.Second)
		require.Equal(t, jobs.Completed, s.wait(one).State)
		_, got, _ := s.ask("GET", "/v1/jobs/"+one+"/result", nil)
		require.Equal(t, string(want), string(got))
	}
}

// A worker that stops gives back what grows, and another one takes it.
func TestAWorkerThatStopsGivesItsGenerationsBack(t *testing.T) {
	s := startLong(t, work.Options{})
	slow := s.submit(growth(t, 3500, 1, 2, 3))
	s.begun(slow)
	other := s.submit(growth(t, 400, 1, 2))
	s.begun(other)
	now, cancel := context.WithCancel(t.Context())
	cancel()
	s.worker.Close(now)
	for _, id := range []string{slow, other} {
		require.Equal(t, jobs.Queued, s.job(id).State)
	}
}

// Many that come one after the other, of several lengths: each has what it has alone.
func TestGenerationsThatComeStaggered(t *testing.T) {
	s := startLong(t, work.Options{})
	var group sync.WaitGroup
	for i := range 48 {
		sampled := i%16 < 8 // several of the same company one after the other
		r := growthBy(t, gen.Settings{MaxNewTokens: 1 + i%17, Sample: sampled}, 1, int64(i%20), int64(i%7))
		want := s.here(r)
		group.Go(func() {
			status, got, _ := s.ask("POST", "/v1/jobs?wait=60", r)
			require.Equal(t, 200, status, string(got))
			require.Equal(t, string(want), string(got))
		})
	}
	group.Wait()
}
