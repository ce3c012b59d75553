package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/remote"
	"github.com/nnsight-go/nnsight-go/engine/server"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/nnsight-go/nnsight-go/engine/server/keys"
	"github.com/nnsight-go/nnsight-go/engine/server/servertest"
	"github.com/nnsight-go/nnsight-go/engine/server/work"
	"github.com/nnsight-go/nnsight-go/engine/weights/safetensors"
	"github.com/stretchr/testify/require"
)

const name = "some/model"

// site is a server with a worker.
type site struct {
	t      testing.TB
	url    string
	model  *engine.Model
	store  *jobs.Store
	worker *work.Worker
}

func start(t testing.TB, o server.Options, w work.Options) *site {
	m, err := engine.Open(enginetest.Directory(t, enginetest.GPT2, 1), engine.Options{Prepack: -1, Load: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	h, store, worker := servertest.Start(t, map[string]*engine.Model{name: m}, jobs.Options{MaxQueue: 1000}, o, w)
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return &site{t, s.URL, m, store, worker}
}

// ask sends a request, and gives the status and the body. Headers are "Name: value".
func (s *site) ask(method, path string, body []byte, headers ...string) (int, []byte, http.Header) {
	r, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, bytes.NewReader(body))
	require.NoError(s.t, err)
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		r.Header.Set(k, v)
	}
	answer, err := http.DefaultClient.Do(r)
	require.NoError(s.t, err)
	defer func() { _ = answer.Body.Close() }()
	data, err := io.ReadAll(answer.Body)
	require.NoError(s.t, err)
	return answer.StatusCode, data, answer.Header
}

// refused asserts that a request is answered with an error.
func (s *site) refused(status int, says, method, path string, body []byte, headers ...string) *fault.Error {
	got, data, _ := s.ask(method, path, body, headers...)
	require.Equal(s.t, status, got, string(data))
	var e struct{ Error *fault.Error }
	require.NoError(s.t, json.Unmarshal(data, &e), string(data))
	require.ErrorContains(s.t, e.Error, says)
	return e.Error
}

// node makes a node of a graph in one line.
func node(kind graph.Kind, args ...graph.Arg) graph.Node {
	return graph.Node{Kind: kind, Args: args, Pos: -1}
}

// saved is a trace that saves what a block gives for some tokens.
func saved(tokens ...int64) *graph.Graph {
	read := graph.Node{Kind: graph.KindRead, Path: "transformer.h.1", Port: graph.PortOutput, Leaf: "0", Pos: -1}
	return &graph.Graph{Invokes: []graph.Invoke{{Rows: [][]int64{tokens}}}, Nodes: []graph.Node{read, node(graph.KindSave, graph.Ref(0))}}
}

func request(t testing.TB, model string, g *graph.Graph) []byte {
	var w remote.Writer
	text, err := json.Marshal(remote.Request{Version: 1, Model: model, Kind: remote.Trace,
		Steps: []remote.Step{{Program: []string{"g"}, End: true, Want: []string{"results"}}}})
	require.NoError(t, err)
	w.Bytes("request", text)
	w.Bytes("g", graph.Encode(g))
	file, err := w.File()
	require.NoError(t, err)
	return file
}

// here is what a request gives in this process.
func (s *site) here(data []byte) []byte {
	r, err := remote.Parse(data, remote.Limits{})
	require.NoError(s.t, err)
	out, err := (&remote.Performer{Model: s.model.Native}).Perform(s.t.Context(), "", r)
	require.NoError(s.t, err)
	return out
}

func TestATraceGoesThrough(t *testing.T) {
	s := start(t, server.Options{}, work.Options{})
	r := request(t, name, saved(1, 2, 3))
	want := s.here(r)
	status, data, head := s.ask("POST", "/v1/jobs?wait=30", r)
	require.Equal(t, http.StatusOK, status, string(data))
	require.Equal(t, want, data)
	require.Equal(t, remote.Media, head.Get("Content-Type"))
	id := head.Get("Nnsight-Job")

	status, data, _ = s.ask("GET", "/v1/jobs/"+id, nil)
	require.Equal(t, http.StatusOK, status)
	var job jobs.Job
	require.NoError(t, json.Unmarshal(data, &job))
	require.Equal(t, jobs.Completed, job.State)
	status, data, _ = s.ask("GET", "/v1/jobs/"+id+"/result", nil)
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, want, data, "a result is there for who comes again")

	encoder, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	status, data, _ = s.ask("POST", "/v1/jobs", encoder.EncodeAll(r, nil), "Content-Encoding: zstd")
	require.Equal(t, http.StatusAccepted, status)
	require.NoError(t, json.Unmarshal(data, &job))
	status, data, _ = s.ask("GET", "/v1/jobs/"+job.ID+"/result?wait=30", nil)
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, want, data)

	status, data, _ = s.ask("GET", "/v1/jobs/"+job.ID+"/events", nil)
	require.Equal(t, http.StatusOK, status)
	require.Contains(t, string(data), "event: status\ndata: {")
	require.Contains(t, string(data), `"state":"COMPLETED"`)
	status, data, _ = s.ask("GET", "/v1/jobs", nil)
	require.Equal(t, http.StatusOK, status)
	require.Contains(t, string(data), id)
}

// alike reports whether the tensors of two results are the same but for rounding: those that share a forward
// pass are summed up in another order.
func alike(t *testing.T, one, other []byte) bool {
	numbers := func(file []byte) (out []float32) {
		infos, err := safetensors.Read(bytes.NewReader(file), int64(len(file)))
		require.NoError(t, err)
		for _, i := range infos {
			for at := i.Start; i.DType == "float32" && at < i.Start+i.Bytes; at += 4 {
				out = append(out, math.Float32frombits(binary.LittleEndian.Uint32(file[at:])))
			}
		}
		return out
	}
	a, b := numbers(one), numbers(other)
	same := len(a) == len(b) && len(a) > 0
	for i := 0; same && i < len(a); i++ {
		same = math.Abs(float64(a[i]-b[i])) < 1e-5
	}
	return same
}

func TestManyAtOnce(t *testing.T) {
	s := start(t, server.Options{Rate: 1e6}, work.Options{})
	live := aten.Live()
	var group sync.WaitGroup
	for c := range 8 {
		group.Go(func() {
			for i := range 25 {
				r := request(t, name, saved(int64(c), int64(i%24), 3))
				status, data, _ := s.ask("POST", "/v1/jobs?wait=60", r)
				if status != http.StatusOK || !alike(t, s.here(r), data) {
					t.Errorf("client %d, job %d: %d", c, i, status)
				}
			}
		})
	}
	group.Wait()
	require.Equal(t, live, aten.Live())
}

func TestWhatFails(t *testing.T) {
	s := start(t, server.Options{Body: 1 << 20}, work.Options{Limits: remote.Limits{Tokens: 50}})
	good := request(t, name, saved(1))
	odd := saved(1)
	odd.Nodes[0].Path = "transformer.h.9"
	odd.Nodes[0].Pos, odd.Positions = 0, []fault.Pos{{File: "mine.py", Line: 7}}
	e := s.refused(422, `transformer.h.9`, "POST", "/v1/jobs?wait=30", request(t, name, odd))
	require.Equal(t, fault.ModulePath, e.Code)
	require.Equal(t, 7, e.Pos.Line)
	s.refused(422, "this server takes 50 at once", "POST", "/v1/jobs?wait=30", request(t, name, saved(make([]int64, 60)...)))
	s.refused(404, `no model "other"`, "POST", "/v1/jobs", request(t, "other", saved(1)))
	s.refused(400, "too few for a header", "POST", "/v1/jobs", []byte("x"))
	s.refused(400, "not well formed", "POST", "/v1/jobs", bytes.Repeat([]byte{0xff}, 100))
	s.refused(400, "cannot be read", "POST", "/v1/jobs", good, "Content-Encoding: zstd")
	s.refused(415, "plain or zstd", "POST", "/v1/jobs", good, "Content-Encoding: gzip")
	s.refused(413, "", "POST", "/v1/jobs", make([]byte, 2<<20))
	s.refused(400, "a number of seconds", "POST", "/v1/jobs?wait=NaN", good)
	s.refused(400, "256 characters", "POST", "/v1/jobs", good, "Idempotency-Key: "+strings.Repeat("x", 300))
	s.refused(400, "none of them blank", "POST", "/v1/jobs", good, "Idempotency-Key: a b")
	s.refused(404, "no such job", "GET", "/v1/jobs/"+strings.Repeat("a", 32), nil)
	s.refused(404, "no such job", "GET", "/v1/jobs/*/result", nil)
	s.refused(404, "no such job", "GET", "/v1/jobs/%3E/events", nil)
	s.refused(404, `no model "x/y"`, "GET", "/v1/models/x/y", nil)
	s.refused(404, "nothing at", "GET", "/v2", nil)
	// a bomb: 1 GiB of zeros in a few kilobytes
	var bomb bytes.Buffer
	w, err := zstd.NewWriter(&bomb)
	require.NoError(t, err)
	for range 1024 {
		_, err = w.Write(make([]byte, 1<<20))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	s.refused(413, "", "POST", "/v1/jobs", bomb.Bytes(), "Content-Encoding: zstd")
	status, _, _ := s.ask("POST", "/v1/jobs?wait=30", good)
	require.Equal(t, 200, status, "and the server goes on")
}

func TestKeysOpenWhatIsTheirs(t *testing.T) {
	store := keys.Open(filepath.Join(t.TempDir(), "keys.json"))
	ada, id, err := store.Create(keys.Key{Name: "Ada"})
	require.NoError(t, err)
	bob, _, err := store.Create(keys.Key{Name: "Bob", Priority: "high"})
	require.NoError(t, err)
	past := time.Now().Add(-time.Hour)
	old, _, err := store.Create(keys.Key{Name: "Old", Expires: &past})
	require.NoError(t, err)
	s := start(t, server.Options{Keys: store}, work.Options{})
	r := request(t, name, saved(1, 2))
	for _, header := range []string{"X: y", "Authorization: Bearer ", "Authorization: " + ada, "Authorization: Bearer nng_x",
		"Authorization: Bearer " + old} {
		s.refused(401, "does not know this API key", "POST", "/v1/jobs", r, header)
		s.refused(401, "does not know this API key", "GET", "/v1/models", nil, header)
	}
	asAda, asBob := "Authorization: Bearer "+ada, "Authorization: Bearer "+bob
	status, _, head := s.ask("POST", "/v1/jobs?wait=30", r, asAda, "Idempotency-Key: 1")
	require.Equal(t, 200, status)
	job := head.Get("Nnsight-Job")
	for _, path := range []string{"", "/result", "/events"} {
		s.refused(404, "no such job", "GET", "/v1/jobs/"+job+path, nil, asBob)
	}
	s.refused(404, "no such job", "DELETE", "/v1/jobs/"+job, nil, asBob)
	_, data, _ := s.ask("GET", "/v1/jobs", nil, asBob)
	require.JSONEq(t, `{"jobs": []}`, string(data))
	_, _, head = s.ask("POST", "/v1/jobs?wait=30", r, asAda, "Idempotency-Key: 1")
	require.Equal(t, job, head.Get("Nnsight-Job"), "what is sent twice is one job")
	_, _, head = s.ask("POST", "/v1/jobs?wait=30", r, asBob, "Idempotency-Key: 1")
	require.NotEqual(t, job, head.Get("Nnsight-Job"))
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/openapi.yaml", "/"} {
		status, _, _ := s.ask("GET", path, nil)
		require.Equal(t, 200, status, path)
	}
	require.NoError(t, store.Revoke(id.ID))
	s.refused(401, "", "GET", "/v1/jobs", nil, asAda)
}

// lines hands on each line that is written to it.
type lines chan string

func (l lines) Write(data []byte) (int, error) {
	l <- string(data)
	return len(data), nil
}

func TestAnAuditSaysWhoAskedForWhat(t *testing.T) {
	store := keys.Open(filepath.Join(t.TempDir(), "keys.json"))
	ada, id, err := store.Create(keys.Key{Name: "Ada"})
	require.NoError(t, err)
	audit := make(lines, 1)
	s := start(t, server.Options{Keys: store, Audit: audit}, work.Options{})
	type line struct {
		Msg, Key, Job, Model string
		Status               int
		Received, Sent       int64
	}
	said := func(want line, method, path string, body []byte, headers ...string) []byte {
		_, data, _ := s.ask(method, path, body, headers...)
		text := <-audit
		var got line
		require.NoError(t, json.Unmarshal([]byte(text), &got), text)
		want.Received, want.Sent = int64(len(body)), int64(len(data))
		if want.Job == "new" {
			want.Job = got.Job
		}
		require.Equal(t, want, got)
		require.NotContains(t, text, "nng_")
		return []byte(got.Job)
	}
	r, as := request(t, name, saved(1, 2)), "Authorization: Bearer "+ada
	said(line{Msg: "POST /v1/jobs", Status: 401}, "POST", "/v1/jobs", r, "Authorization: Bearer nng_x")
	made := said(line{Msg: "POST /v1/jobs", Key: id.ID, Job: "new", Model: name, Status: 200}, "POST", "/v1/jobs?wait=30", r, as)
	job := string(made)
	said(line{Msg: "GET /v1/jobs/{id}/result", Key: id.ID, Job: job, Status: 200}, "GET", "/v1/jobs/"+job+"/result", nil, as)
	said(line{Msg: "GET /v1/jobs/{id}/events", Key: id.ID, Job: job, Status: 200}, "GET", "/v1/jobs/"+job+"/events", nil, as)
	said(line{Msg: "DELETE /v1/jobs/{id}", Key: id.ID, Job: "0123", Status: 404}, "DELETE", "/v1/jobs/0123", nil, as)
	said(line{Msg: "GET /v1/models/{name...}", Key: id.ID, Model: name, Status: 200}, "GET", "/v1/models/"+name, nil, as)
}

func TestTheFirstKeyClosesTheDoor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	known := keys.Open(path)
	s := start(t, server.Options{Keys: known, Unlocked: true}, work.Options{})
	status, _, _ := s.ask("POST", "/v1/jobs?wait=30", request(t, name, saved(1, 2)))
	require.Equal(t, 200, status)
	ada, key, err := keys.Open(path).Create(keys.Key{Name: "Ada"}) // by another process
	require.NoError(t, err)
	s.refused(401, "API key", "GET", "/v1/jobs", nil)
	status, data, _ := s.ask("GET", "/v1/jobs", nil, "Authorization: Bearer "+ada)
	require.Equal(t, 200, status)
	require.JSONEq(t, `{"jobs": []}`, string(data), "those of nobody are nobody's")
	require.NoError(t, known.Revoke(key.ID))
	require.NoError(t, os.Remove(path))
	s.refused(401, "API key", "GET", "/v1/jobs", nil)
}

func TestRates(t *testing.T) {
	known := keys.Open(filepath.Join(t.TempDir(), "keys.json"))
	ada, _, err := known.Create(keys.Key{Name: "Ada"})
	require.NoError(t, err)
	bob, _, err := known.Create(keys.Key{Name: "Bob", Rate: 1000})
	require.NoError(t, err)
	s := start(t, server.Options{Rate: 2, Keys: known}, work.Options{})
	r := request(t, name, saved(1))
	asAda, asBob := "Authorization: Bearer "+ada, "Authorization: Bearer "+bob
	for range 4 {
		status, _, _ := s.ask("POST", "/v1/jobs", r, asAda)
		require.Equal(t, 202, status)
	}
	s.refused(429, "faster than", "POST", "/v1/jobs", r, asAda)
	_, _, head := s.ask("POST", "/v1/jobs", r, asAda)
	require.NotEmpty(t, head.Get("Retry-After"))
	s.refused(429, "and tensors faster than", "PUT", "/v1/tensors/"+strings.Repeat("0", 64), nil, asAda)
	for range 20 {
		status, _, _ := s.ask("POST", "/v1/jobs", r, asBob)
		require.Equal(t, 202, status)
	}
}

func TestWhatThereIsNoRoomForIsRefused(t *testing.T) {
	m, err := engine.Open(enginetest.Directory(t, enginetest.GPT2, 1), engine.Options{Prepack: -1, Load: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	h, store, worker := servertest.Start(t, map[string]*engine.Model{name: m}, jobs.Options{Storage: 64 << 10}, server.Options{}, work.Options{})
	at := httptest.NewServer(h)
	t.Cleanup(at.Close)
	s := &site{t, at.URL, m, store, worker}
	large, err := aten.Zeros("float32", "cpu", 40<<10)
	require.NoError(t, err)
	defer large.Free()
	var w remote.Writer
	require.NoError(t, w.Tensor("tensor", large))
	file, err := w.File()
	require.NoError(t, err)
	blob, err := remote.ReadUpload(file)
	require.NoError(t, err)
	s.refused(507, "no room for more", "PUT", "/v1/tensors/"+blob.Hash(), file)
	status, _, _ := s.ask("POST", "/v1/jobs?wait=30", request(t, name, saved(1, 2)))
	require.Equal(t, 200, status, "what is small goes on")
}

func TestUploads(t *testing.T) {
	s := start(t, server.Options{}, work.Options{})
	two, err := aten.FromFloat32s([]float32{2})
	require.NoError(t, err)
	defer two.Free()
	var w remote.Writer
	require.NoError(t, w.Tensor("tensor", two))
	file, err := w.File()
	require.NoError(t, err)
	blob, err := remote.ReadUpload(file)
	require.NoError(t, err)
	path := "/v1/tensors/" + blob.Hash()
	status, _, _ := s.ask("HEAD", path, nil)
	require.Equal(t, 404, status)
	s.refused(400, "the tensor's hash is", "PUT", "/v1/tensors/"+strings.Repeat("0", 64), file)
	s.refused(400, "", "PUT", path, []byte("x"))
	status, _, _ = s.ask("PUT", path, file)
	require.Equal(t, 204, status)
	status, _, _ = s.ask("HEAD", path, nil)
	require.Equal(t, 204, status)

	g := saved(1, 2)
	g.Nodes = []graph.Node{g.Nodes[0], {Kind: graph.KindConst, Pos: -1},
		{Kind: graph.KindCall, Op: "aten::mul.Tensor", Args: []graph.Arg{graph.Ref(0), graph.Ref(1)}, Pos: -1}, node(graph.KindSave, graph.Ref(2))}
	with := func(hash string) []byte {
		var w remote.Writer
		text, err := json.Marshal(remote.Request{Version: 1, Model: name, Kind: remote.Trace, Steps: []remote.Step{{
			Program: []string{"g"}, Constants: []remote.Constant{{Hash: hash}}, End: true, Want: []string{"results"}}}})
		require.NoError(t, err)
		w.Bytes("request", text)
		w.Bytes("g", graph.Encode(g))
		file, err := w.File()
		require.NoError(t, err)
		return file
	}
	status, data, _ := s.ask("POST", "/v1/jobs?wait=30", with(blob.Hash()))
	require.Equal(t, 200, status, string(data))
	s.refused(422, "is not there", "POST", "/v1/jobs?wait=30", with(strings.Repeat("0", 64)))
	s.refused(422, "is not there", "POST", "/v1/jobs?wait=30", with("../keys"))
}

// endless is a generation that goes on for longer than anybody waits.
func endless(t testing.TB) []byte {
	var w remote.Writer
	r := remote.Request{Version: 1, Model: name, Kind: remote.Generate, Prompt: &remote.Prompt{Rows: [][]int64{{1}}},
		Settings: &gen.Settings{MaxNewTokens: 30, LengthPenalty: 1, EarlyStopping: "false"}}
	for range 30 {
		r.Steps = append(r.Steps, remote.Step{Program: []string{"g"}, End: true})
	}
	// each step does some thousands of needless things
	g := &graph.Graph{Invokes: []graph.Invoke{{}}, Nodes: []graph.Node{{Kind: graph.KindRead, Path: "transformer.h.1", Port: graph.PortOutput, Leaf: "0", Pos: -1}}}
	for i := range 20000 {
		g.Nodes = append(g.Nodes, graph.Node{Kind: graph.KindCall, Op: "aten::sin.default", Args: []graph.Arg{graph.Ref(graph.ID(i))}, Pos: -1})
	}
	g.Nodes = append(g.Nodes, node(graph.KindSave, graph.Ref(20000)))
	text, err := json.Marshal(r)
	require.NoError(t, err)
	w.Bytes("request", text)
	w.Bytes("g", graph.Encode(g))
	file, err := w.File()
	require.NoError(t, err)
	return file
}

// running is an endless job that a worker has begun.
func (s *site) running() (job jobs.Job) {
	_, data, _ := s.ask("POST", "/v1/jobs", endless(s.t))
	require.NoError(s.t, json.Unmarshal(data, &job))
	require.Eventually(s.t, func() bool {
		j, err := s.store.Get(s.t.Context(), "everybody", job.ID)
		return err == nil && j.State == jobs.Running
	}, 30*time.Second, time.Millisecond)
	return job
}

func TestWhatTakesTooLongOrIsNotWantedEnds(t *testing.T) {
	s := start(t, server.Options{}, work.Options{Time: 200 * time.Millisecond})
	s.refused(422, "as long as this server lets one", "POST", "/v1/jobs?wait=60", endless(t))

	s = start(t, server.Options{}, work.Options{})
	job := s.running()
	status, _, _ := s.ask("GET", "/v1/jobs/"+job.ID+"/result", nil)
	require.Equal(t, 202, status)
	status, _, _ = s.ask("DELETE", "/v1/jobs/"+job.ID, nil)
	require.Equal(t, 200, status)
	s.refused(409, "was cancelled", "GET", "/v1/jobs/"+job.ID+"/result?wait=30", nil)
	status, _, _ = s.ask("POST", "/v1/jobs?wait=60", request(t, name, saved(1)))
	require.Equal(t, 200, status, "the worker has left the other")
}

func TestAWorkerThatStopsGivesItsJobsBack(t *testing.T) {
	s := start(t, server.Options{}, work.Options{})
	job := s.running()
	now, cancel := context.WithCancel(t.Context())
	cancel()
	s.worker.Close(now)
	j, err := s.store.Get(t.Context(), "everybody", job.ID)
	require.NoError(t, err)
	require.Equal(t, jobs.Queued, j.State)
	other, err := work.Start(t.Context(), s.store, map[string]*engine.Model{name: s.model}, work.Options{Time: 100 * time.Millisecond})
	require.NoError(t, err)
	defer other.Close(t.Context())
	s.refused(422, "as long as", "GET", "/v1/jobs/"+job.ID+"/result?wait=60", nil)
}

func TestWhatPeopleAndMachinesRead(t *testing.T) {
	s := start(t, server.Options{}, work.Options{})
	status, _, _ := s.ask("POST", "/v1/jobs?wait=30", request(t, name, saved(1)))
	require.Equal(t, 200, status)
	_, data, _ := s.ask("GET", "/v1/models", nil)
	require.Contains(t, string(data), `"name":"some/model"`)
	_, data, _ = s.ask("GET", "/v1/models/"+name, nil)
	require.Contains(t, string(data), `"transformer.h.1"`)
	require.NotContains(t, string(data), s.model.Directory(), "where a model lies is nobody's business")
	_, data, _ = s.ask("GET", "/metrics", nil)
	require.Regexp(t, regexp.MustCompile(`nnsight_jobs_ended_total\{model="some/model",state="COMPLETED"\} 1`), string(data))
	_, data, head := s.ask("GET", "/", nil)
	require.Contains(t, head.Get("Content-Type"), "text/html")
	require.Contains(t, string(data), "<title>nnsight-go server</title>")
	// every route that the server has is in the description
	_, data, _ = s.ask("GET", "/openapi.yaml", nil)
	source, err := os.ReadFile("server.go")
	require.NoError(t, err)
	for _, route := range regexp.MustCompile(`"(GET|POST|PUT|DELETE|HEAD) (/\S*)"`).FindAllStringSubmatch(string(source), -1) {
		path := strings.ReplaceAll(route[2], "...", "")
		if path != "/{$}" && path != "/openapi.yaml" {
			require.Contains(t, string(data), fmt.Sprintf("\n  %s:\n", path))
		}
	}
}

func TestOneThatFailsDoesNotHarmThoseBesideIt(t *testing.T) {
	s := start(t, server.Options{Rate: 1e6}, work.Options{})
	odd := saved(1)
	odd.Nodes[0].Path = "transformer.h.9"
	bad := request(t, name, odd)
	var group sync.WaitGroup
	for c := range 8 {
		group.Go(func() {
			for i := range 15 {
				if c%4 == 3 {
					if status, _, _ := s.ask("POST", "/v1/jobs?wait=60", bad); status != 422 {
						t.Errorf("a bad one gives %d", status)
					}
					continue
				}
				r := request(t, name, saved(int64(c), int64(i)))
				if status, data, _ := s.ask("POST", "/v1/jobs?wait=60", r); status != 200 || !alike(t, s.here(r), data) {
					t.Errorf("client %d, job %d: %d", c, i, status)
				}
			}
		})
	}
	group.Wait()
}

func TestARedTeam(t *testing.T) {
	s := start(t, server.Options{}, work.Options{Line: 1e12})
	before, err := s.model.Constant("transformer.wte.weight")
	require.NoError(t, err)
	defer before.Free()
	numbers, err := before.Float32s()
	require.NoError(t, err)
	live := aten.Live()
	call := func(op string, args ...graph.Arg) *graph.Graph {
		g := saved(1, 2)
		g.Nodes = append(g.Nodes[:1:1], graph.Node{Kind: graph.KindCall, Op: op, Args: args, Pos: 0}, node(graph.KindSave, graph.Ref(1)))
		g.Positions = []fault.Pos{{File: "theirs.py", Line: 13}}
		return g
	}
	text := func(s string) graph.Arg { return graph.Arg{Kind: graph.ArgString, S: s} }
	for op, args := range map[string][]graph.Arg{
		"aten::from_file":          {text("/etc/passwd")},
		"aten::_save":              {graph.Ref(0)},
		"aten::set_":               {graph.Ref(0)},
		"aten::resize_":            {graph.Ref(0)},
		"aten::as_strided":         {graph.Ref(0)},
		"aten::record_stream":      {graph.Ref(0)},
		"aten::_cuda_getCurrent":   nil,
		"c10d::allreduce_":         {graph.Ref(0)},
		"profiler::_record_enter":  {text("x")},
		"prim::Print":              {graph.Ref(0)},
		"aten::rand":               nil,
		"quantized::linear":        {graph.Ref(0)},
		"mkldnn::_linear":          {graph.Ref(0)},
		"aten::nonexistent_at_all": nil,
	} {
		e := s.refused(422, op, "POST", "/v1/jobs?wait=30", request(t, name, call(op, args...)))
		require.Equal(t, fault.Remote, e.Code, op)
		require.Equal(t, 13, e.Pos.Line, op)
	}
	// the weights, by a constant that is one of them
	for _, op := range []string{"aten::zero_", "aten::fill_.Scalar", "aten::neg_"} {
		g := call(op, graph.Ref(0), graph.Arg{Kind: graph.ArgInt, I: 1})
		if op != "aten::fill_.Scalar" {
			g.Nodes[1].Args = g.Nodes[1].Args[:1]
		}
		g.Nodes[0] = graph.Node{Kind: graph.KindConst, Pos: -1}
		var w remote.Writer
		text, err := json.Marshal(remote.Request{Version: 1, Model: name, Kind: remote.Trace, Steps: []remote.Step{{Program: []string{"g"},
			Constants: []remote.Constant{{Parameter: "transformer.wte.weight"}}, End: true, Want: []string{"results"}}}})
		require.NoError(t, err)
		w.Bytes("request", text)
		w.Bytes("g", graph.Encode(g))
		file, err := w.File()
		require.NoError(t, err)
		s.refused(422, "are read-only", "POST", "/v1/jobs?wait=30", file)
	}
	after, err := before.Float32s()
	require.NoError(t, err)
	require.Equal(t, numbers, after)
	// memory bombs, under a cap
	require.NoError(t, aten.CapMemory(64<<20))
	defer func() { require.NoError(t, aten.CapMemory(-1)) }()
	for _, sizes := range [][]graph.Arg{{graph.Int(1 << 40)}, {graph.Int(1 << 20), graph.Int(1 << 20)}, {graph.Int(1 << 30)}} {
		e := s.refused(422, "", "POST", "/v1/jobs?wait=30", request(t, name, call("aten::zeros", graph.Arg{Kind: graph.ArgList, L: sizes})))
		require.Equal(t, 13, e.Pos.Line)
	}
	// a time bomb: the product of matrices that take no memory
	bomb := saved(1, 2)
	bomb.Nodes = []graph.Node{
		{Kind: graph.KindCall, Op: "aten::zeros", Args: []graph.Arg{graph.List(graph.Int(1), graph.Int(1))}, Pos: -1},
		{Kind: graph.KindCall, Op: "aten::expand", Args: []graph.Arg{graph.Ref(0), graph.List(graph.Int(1<<20), graph.Int(1<<20))}, Pos: -1},
		{Kind: graph.KindCall, Op: "aten::mm", Args: []graph.Arg{graph.Ref(1), graph.Ref(1)}, Pos: 0}, node(graph.KindSave, graph.Ref(2)),
	}
	bomb.Positions = []fault.Pos{{File: "theirs.py", Line: 13}}
	e := s.refused(422, "1.2e+18 multiplications, and a line may take 1.0e+12", "POST", "/v1/jobs?wait=30", request(t, name, bomb))
	require.Equal(t, 13, e.Pos.Line)
	// the same for a key of little: it is what the whole of a job takes that counts
	// deep nesting
	deep := graph.Ref(0)
	for range 10000 {
		deep = graph.Arg{Kind: graph.ArgList, L: []graph.Arg{deep}}
	}
	s.refused(422, "", "POST", "/v1/jobs?wait=30", request(t, name, call("aten::cat", deep)))
	// a token that is none
	s.refused(422, "", "POST", "/v1/jobs?wait=30", request(t, name, saved(1<<40)))
	s.refused(422, "", "POST", "/v1/jobs?wait=30", request(t, name, saved(-1)))
	status, data, _ := s.ask("POST", "/v1/jobs?wait=30", request(t, name, saved(1, 2)))
	require.Equal(t, 200, status, string(data))
	require.Equal(t, live, aten.Live())
}
