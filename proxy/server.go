package proxy

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/remote"
)

// Server is a server that runs traces: `nnsight-go serve`. Any number of goroutines may use it.
type Server struct {
	url    string
	key    string
	client *http.Client
}

// Dial names a server, by its address, http://host:port, and the API key that it knows the program by, "" for
// none. Nothing is sent.
func Dial(address, key string) (*Server, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fault.New(fault.Input, "%q is no address of a server", address).WithHint("Addresses look like http://host:8000.")
	}
	return &Server{strings.TrimRight(address, "/"), key, http.DefaultClient}, nil
}

// Hosted is what a server says of a model.
type Hosted struct {
	Name         string `json:"name"`
	Architecture string `json:"architecture"`
	DType        string `json:"dtype"`   // of its parameters
	Context      int    `json:"context"` // tokens of the longest prompt
	Workers      int    `json:"workers"` // processes that run it
	Waiting      int    `json:"waiting"` // jobs, those that run included
}

// Models gives the models of the server.
func (s *Server) Models(ctx context.Context) ([]Hosted, error) {
	var out struct{ Models []Hosted }
	_, data, err := s.ask(ctx, http.MethodGet, "/v1/models", nil, "")
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	return out.Models, err
}

// RemoteModel is a model of a server. Traces and generations of it are recorded here and run there; what they save
// are tensors on the CPU, without history.
type RemoteModel struct {
	name   string
	server *Server
	here   *engine.Model
}

// Model names a model of the server. Prompts that are text need one that is open here, for its tokenizer; its
// weights are not read. Without one (nil) prompts are token ids.
func (s *Server) Model(name string, here *engine.Model) *RemoteModel {
	return &RemoteModel{name, s, here}
}

// Encode gives the token ids of a text.
func (m *RemoteModel) Encode(text string) ([]int64, error) {
	if m.here == nil {
		return nil, fault.New(fault.Input, "there is no tokenizer here for %s", m.name).
			WithHint("Give Server.Model a model that is open here, or prompts as token ids.")
	}
	return m.here.Encode(text)
}

const (
	patience  = 25 * time.Second // that one request waits for a result
	tries     = 5                // of a request that the way fails, or that comes at a bad time
	firstRest = 250 * time.Millisecond
	mostRest  = 30 * time.Second
)

// ask sends a request that may be sent again, until it is answered well. The errors of the server's are its own.
func (s *Server) ask(ctx context.Context, method, path string, body []byte, mark string) (status int, data []byte, err error) {
	rest := firstRest
	for left := tries - 1; ; left-- {
		var after time.Duration
		status, after, data, err = s.once(ctx, method, path, body, mark)
		again := err != nil && ctx.Err() == nil || status == http.StatusTooManyRequests || status == http.StatusBadGateway ||
			status == http.StatusServiceUnavailable || status == http.StatusGatewayTimeout
		if !again || left == 0 {
			break
		}
		select {
		case <-time.After(max(rest, min(after, mostRest))):
		case <-ctx.Done():
		}
		rest *= 2
	}
	switch {
	case ctx.Err() != nil:
		return 0, nil, fault.New(fault.Cancelled, "the run was cancelled").WithCause(ctx.Err())
	case err != nil:
		return 0, nil, fault.New(fault.Remote, "the server %s cannot be reached: %v", s.url, err).WithHint("Is it running, and is the address right?")
	case status >= 300:
		return status, nil, said(status, data)
	}
	return status, data, nil
}

func (s *Server) once(ctx context.Context, method, path string, body []byte, mark string) (status int, after time.Duration, data []byte, err error) {
	r, err := http.NewRequestWithContext(ctx, method, s.url+path, bytes.NewReader(body))
	if err != nil {
		return 0, 0, nil, err
	}
	if s.key != "" {
		r.Header.Set("Authorization", "Bearer "+s.key)
	}
	if body != nil {
		r.Header.Set("Content-Type", remote.Media)
	}
	if mark != "" {
		r.Header.Set("Idempotency-Key", mark)
	}
	answer, err := s.client.Do(r)
	if err != nil {
		return 0, 0, nil, err
	}
	defer func() { _ = answer.Body.Close() }()
	if data, err = io.ReadAll(answer.Body); err != nil {
		return 0, 0, nil, err
	}
	seconds, _ := strconv.ParseFloat(answer.Header.Get("Retry-After"), 64) // or none
	return answer.StatusCode, time.Duration(seconds * float64(time.Second)), data, nil
}

// said is the error that a server tells of.
func said(status int, data []byte) error {
	var body struct{ Error *fault.Error }
	if json.Unmarshal(data, &body) == nil && body.Error != nil {
		return body.Error
	}
	return fault.New(fault.Remote, "the server answered %d: %.200s", status, data)
}

// Job is a trace that a server has taken.
type Job struct {
	ID     string
	server *Server
	trace  *Trace
}

// State is how far the job has come: QUEUED, RUNNING, COMPLETED, ERROR or CANCELLED.
func (j *Job) State(ctx context.Context) (string, error) {
	var out struct{ State string }
	_, data, err := j.server.ask(ctx, http.MethodGet, "/v1/jobs/"+j.ID, nil, "")
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	return out.State, err
}

// Wait waits for the job's end, and fills the saved values of its trace. The error is that of the job, if it failed.
func (j *Job) Wait(ctx context.Context) error {
	data, err := j.server.result(ctx, j.ID)
	if err != nil {
		return err
	}
	answer, err := remote.ReadAnswer(data)
	if err != nil {
		return err
	}
	return j.trace.take(answer)
}

// Cancel ends the job, if it has not ended.
func (j *Job) Cancel(ctx context.Context) error {
	_, _, err := j.server.ask(ctx, http.MethodDelete, "/v1/jobs/"+j.ID, nil, "")
	return err
}

// perform has a request done. It is cancelled there where ctx ends.
func (s *Server) perform(ctx context.Context, request []byte) (*remote.Answer, error) {
	mark := rand.Text()
	status, data, err := s.ask(ctx, http.MethodPost, fmt.Sprintf("/v1/jobs?wait=%g", patience.Seconds()), request, mark)
	var id string
	if err == nil && status == http.StatusAccepted {
		if id, err = idOf(data); err == nil {
			data, err = s.result(ctx, id)
		}
	}
	if err != nil && ctx.Err() != nil {
		s.giveUp(ctx, id, request, mark)
	}
	if err != nil {
		return nil, err
	}
	return remote.ReadAnswer(data)
}

// submit leaves a request there.
func (s *Server) submit(ctx context.Context, request []byte) (id string, err error) {
	_, data, err := s.ask(ctx, http.MethodPost, "/v1/jobs", request, rand.Text())
	if err != nil {
		return "", err
	}
	return idOf(data)
}

func idOf(data []byte) (string, error) {
	var job struct{ ID string }
	if err := json.Unmarshal(data, &job); err != nil || job.ID == "" {
		return "", fault.New(fault.Remote, "the server's answer cannot be read: it names no job")
	}
	return job.ID, nil
}

// result waits for what came of a job.
func (s *Server) result(ctx context.Context, id string) ([]byte, error) {
	for {
		status, data, err := s.ask(ctx, http.MethodGet, fmt.Sprintf("/v1/jobs/%s/result?wait=%g", id, patience.Seconds()), nil, "")
		if err != nil || status != http.StatusAccepted {
			return data, err
		}
	}
}

// giveUp cancels a job that nobody waits for any more: sent again, a request tells the job that it is.
func (s *Server) giveUp(ctx context.Context, id string, request []byte, mark string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if id == "" {
		status, _, data, err := s.once(ctx, http.MethodPost, "/v1/jobs", request, mark)
		if err != nil || status >= 300 {
			return
		}
		if id, err = idOf(data); err != nil {
			return
		}
	}
	_, _, _, _ = s.once(ctx, http.MethodDelete, "/v1/jobs/"+id, nil, "")
}

// trace has a trace run there.
func (m *RemoteModel) trace(ctx context.Context, t *Trace) error {
	request, err := m.request(t)
	if err != nil {
		return err
	}
	answer, err := m.server.perform(ctx, request)
	if err != nil {
		return err
	}
	return t.take(answer)
}

func (m *RemoteModel) request(t *Trace) ([]byte, error) {
	draft := remote.NewDraft(m.name, remote.Trace)
	if err := t.write(draft, remote.WantResults); err != nil {
		return nil, err
	}
	return draft.File()
}

// write adds the trace to a request as its next step.
func (t *Trace) write(draft *remote.Draft, want ...string) error {
	consts, err := t.lend()
	if err != nil {
		return err
	}
	defer aten.FreeAll(consts)
	return draft.Step(&t.graph, consts, want...)
}

// take fills saved values with those that a server has sent.
func (t *Trace) take(answer *remote.Answer) error {
	if len(answer.Steps) != 1 {
		return fault.New(fault.Remote, "the server's answer cannot be read: it has %d steps", len(answer.Steps))
	}
	return t.takeStep(answer, &answer.Steps[0])
}

func (t *Trace) takeStep(answer *remote.Answer, s *remote.StepResult) error {
	results, tensors, err := answer.Results(s)
	if err != nil {
		return err
	}
	defer aten.FreeAll(tensors)
	for _, r := range results {
		if t.saved[r.Node] == nil {
			return fault.New(fault.Remote, "the server's answer cannot be read: nothing was saved at node %d", r.Node)
		}
	}
	return t.fill(results, tensors)
}

// Submit leaves the trace with the server of its model, and does not wait: see [Job.Wait].
func (t *Trace) Submit(ctx context.Context) (*Job, error) {
	m, there := t.model.(*RemoteModel)
	if !there {
		return nil, fault.New(fault.Input, "this trace is of a model that is open here").WithHint("Run it, or trace a model of a Server.")
	}
	if err := t.begin(); err != nil {
		return nil, err
	}
	request, err := m.request(t)
	if err != nil {
		return nil, err
	}
	id, err := m.server.submit(ctx, request)
	if err != nil {
		return nil, err
	}
	return &Job{id, m.server, t}, nil
}
