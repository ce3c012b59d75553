// Package server is the HTTP server of the remote protocol (docs/remote-protocol.md): it takes requests
// into the queue, tells how they go, and hands out what came of them. It runs nothing itself: workers
// (package work), in this process or others, do.
//
// openapi.yaml describes every route. Whoever asks is known by an API key, sees their own jobs alone, and
// is told errors in the JSON form of package fault.
package server

import (
	"context"
	_ "embed" // the page, and the description of the routes
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/remote"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/nnsight-go/nnsight-go/engine/server/keys"
)

// Options say whom a server serves, and how much.
type Options struct {
	Keys *keys.Store // nil: everybody, without a key
	// Unlocked lets everybody in for as long as no key was ever made: the first one closes the door.
	Unlocked bool
	Body     int64   // bytes of a request, once decompressed; 0 is 256 MiB
	Rate     float64 // jobs, and uploaded tensors, a second of one key; 0 is 50
	Log      *slog.Logger
	Audit    io.Writer // is told who asked for what, a line of JSON a request; nil: nobody is
}

// Server answers HTTP requests. Any number of goroutines may use it.
type Server struct {
	store   *jobs.Store
	options Options
	workers func() []jobs.Worker
	rates   *rates
	metrics *Metrics
	audit   *auditor
	mux     *http.ServeMux
	locked  atomic.Bool // a key was seen
}

const (
	maxBody = 256 << 20
	maxWait = 60 * time.Second
	recent  = 100 // jobs in a list
)

// encoder compresses results: its tables take longer to make than what it does for most of them.
var encoder, _ = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest)) // the options are valid

//go:embed openapi.yaml
var openapi []byte

//go:embed page.html
var page []byte

// New makes a server over a store of jobs.
func New(store *jobs.Store, o Options, m *Metrics) (*Server, error) {
	if o.Body == 0 {
		o.Body = maxBody
	}
	if o.Rate == 0 {
		o.Rate = 50
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	workers, err := store.Workers()
	if err != nil {
		return nil, err
	}
	s := &Server{store: store, options: o, workers: workers, rates: newRates(o.Rate), metrics: m,
		audit: newAuditor(o.Audit), mux: http.NewServeMux()}
	s.routes()
	return s, nil
}

func (s *Server) routes() {
	open := map[string]http.HandlerFunc{
		"GET /healthz":      func(w http.ResponseWriter, _ *http.Request) { plain(w, "text/plain", []byte("ok\n")) },
		"GET /readyz":       s.ready,
		"GET /openapi.yaml": func(w http.ResponseWriter, _ *http.Request) { plain(w, "application/yaml", openapi) },
		"GET /{$}": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'")
			plain(w, "text/html; charset=utf-8", page)
		},
		"GET /metrics": s.metrics.handler(s),
	}
	keyed := map[string]func(*asked) error{
		"POST /v1/jobs":            s.submit,
		"GET /v1/jobs":             s.list,
		"GET /v1/jobs/{id}":        s.job,
		"DELETE /v1/jobs/{id}":     s.cancel,
		"GET /v1/jobs/{id}/events": s.events,
		"GET /v1/jobs/{id}/result": s.result,
		"GET /v1/models":           s.models,
		"GET /v1/models/{name...}": s.model,
		"PUT /v1/tensors/{hash}":   s.upload,
		"HEAD /v1/tensors/{hash}":  s.uploaded,
	}
	for route, h := range open {
		s.mux.HandleFunc(route, h)
	}
	for route, h := range keyed {
		s.mux.HandleFunc(route, s.keyed(h))
	}
	s.mux.HandleFunc("/", s.elsewhere)
}

// elsewhere answers what no route does: there is nothing, or not by that method.
func (s *Server) elsewhere(w http.ResponseWriter, r *http.Request) {
	var allowed []string
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE"} {
		other := *r
		other.Method = method
		if _, route := s.mux.Handler(&other); route != "/" {
			allowed = append(allowed, method)
		}
	}
	if len(allowed) > 0 {
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		fail(w, http.StatusMethodNotAllowed, fault.New(fault.Remote, "%s is asked for by %s, and not by %s", r.URL.Path, strings.Join(allowed, ", "), r.Method))
		return
	}
	fail(w, http.StatusNotFound, fault.New(fault.Remote, "there is nothing at %s %s", r.Method, r.URL.Path).
		WithHint("GET /openapi.yaml describes what there is."))
}

// ServeHTTP answers a request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	s.mux.ServeHTTP(w, r)
}

// asked is a request of somebody who is known.
type asked struct {
	w     http.ResponseWriter
	r     *http.Request
	ctx   context.Context
	owner string
	key   *keys.Key // nil where there are none
}

// nobody owns the jobs of a server without keys.
const nobody = "everybody"

// keyed lets those in that have a key.
func (s *Server) keyed(h func(*asked) error) http.HandlerFunc {
	return s.audit.about(func(w http.ResponseWriter, r *http.Request) (who string) {
		a := &asked{w: w, r: r, ctx: r.Context(), owner: nobody}
		asks, err := s.asksForKeys()
		if err != nil {
			s.unreadable(w, err)
			return ""
		}
		if asks {
			scheme, given, _ := strings.Cut(r.Header.Get("Authorization"), " ")
			if !strings.EqualFold(scheme, "Bearer") {
				given = ""
			}
			key, err := s.options.Keys.Find(given)
			if err != nil {
				s.unreadable(w, err)
				return ""
			}
			if key == nil {
				w.Header().Set("WWW-Authenticate", "Bearer")
				fail(w, http.StatusUnauthorized, fault.New(fault.Remote, "the server does not know this API key, or there was none").
					WithHint("Set it: CONFIG.set_default_api_key(...). `nnsight-go key create` makes one."))
				return ""
			}
			a.key, a.owner = key, key.ID
		}
		if err = h(a); err != nil && a.ctx.Err() == nil {
			fail(w, statusOf(err), err)
		}
		return a.owner
	})
}

// asksForKeys reports whether only those are let in that have a key.
func (s *Server) asksForKeys() (bool, error) {
	if s.options.Keys == nil || !s.options.Unlocked || s.locked.Load() {
		return s.options.Keys != nil, nil
	}
	all, err := s.options.Keys.All()
	if len(all) > 0 {
		s.options.Log.Info("there is an API key: from now on nobody is let in without one")
		s.locked.Store(true)
	}
	return len(all) > 0, err
}

func (s *Server) unreadable(w http.ResponseWriter, err error) {
	s.options.Log.Error("keys", "error", err)
	fail(w, http.StatusInternalServerError, fault.New(fault.Remote, "the server cannot read its keys"))
}

// refusal is an error with a status of its own.
type refusal struct {
	status int
	error
}

func (r refusal) Unwrap() error { return r.error }

func statusOf(err error) int {
	var r refusal
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &r):
		return r.status
	case errors.As(err, &large):
		return http.StatusRequestEntityTooLarge
	case errors.Is(err, jobs.ErrNone):
		return http.StatusNotFound
	case errors.Is(err, jobs.ErrNoModel):
		return http.StatusNotFound
	case errors.Is(err, jobs.ErrNoRoom):
		return http.StatusInsufficientStorage
	case errors.Is(err, jobs.ErrFull):
		return http.StatusTooManyRequests
	case fault.As(err).Code == fault.Internal:
		return http.StatusInternalServerError
	case fault.As(err).Cause != nil:
		return http.StatusServiceUnavailable
	}
	return http.StatusBadRequest
}

func fail(w http.ResponseWriter, status int, err error) {
	if status == http.StatusTooManyRequests && w.Header().Get("Retry-After") == "" {
		w.Header().Set("Retry-After", "1")
	}
	reply(w, status, map[string]any{"error": fault.As(err)})
}

func reply(w http.ResponseWriter, status int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		status, data = http.StatusInternalServerError, []byte(`{"error": {"code": "InternalError", "message": "the answer cannot be written"}}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(data)
}

func plain(w http.ResponseWriter, kind string, data []byte) {
	w.Header().Set("Content-Type", kind)
	_, _ = w.Write(data)
}

// body reads what a request carries, decompressed, and not more than is allowed.
func (s *Server) body(a *asked) ([]byte, error) {
	limited := http.MaxBytesReader(a.w, a.r.Body, s.options.Body)
	switch a.r.Header.Get("Content-Encoding") {
	case "":
		return read(limited, a.r.ContentLength, s.options.Body)
	case "zstd":
		d, err := zstd.NewReader(limited, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(uint64(s.options.Body)),
			zstd.WithDecoderMaxWindow(64<<20))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return read(d, -1, s.options.Body)
	}
	return nil, refusal{http.StatusUnsupportedMediaType, fault.New(fault.Remote, "a body is plain or zstd, and not %q",
		a.r.Header.Get("Content-Encoding"))}
}

// read reads to the end, or to an error where there is more than most.
func read(r io.Reader, size, most int64) ([]byte, error) {
	var out []byte
	if size > 0 && size <= 64<<20 { // a larger one is believed as it comes
		out = make([]byte, 0, size+1)
	}
	out, err := appendAll(out, io.LimitReader(r, most+1))
	if errors.Is(err, zstd.ErrDecoderSizeExceeded) || errors.Is(err, zstd.ErrWindowSizeExceeded) || int64(len(out)) > most {
		return nil, refusal{http.StatusRequestEntityTooLarge, fault.New(fault.Remote, "the request is larger than the %d bytes that this server takes", most)}
	}
	var large *http.MaxBytesError
	if err != nil && !errors.As(err, &large) {
		return nil, refusal{http.StatusBadRequest, fault.New(fault.Remote, "the body cannot be read: %v", err)}
	}
	return out, err
}

func appendAll(out []byte, r io.Reader) ([]byte, error) {
	for {
		if len(out) == cap(out) {
			out = append(out, 0)[:len(out)]
		}
		n, err := r.Read(out[len(out):cap(out)])
		if out = out[:len(out)+n]; err == io.EOF {
			return out, nil
		} else if err != nil {
			return out, err
		}
	}
}

// seconds reads how long a client waits for an answer.
func seconds(r *http.Request) (time.Duration, error) {
	text := r.URL.Query().Get("wait")
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || !(n >= 0 && n <= 1e6) {
		return 0, refusal{http.StatusBadRequest, fault.New(fault.Remote, "wait is a number of seconds, and not %q", text)}
	}
	return min(time.Duration(n*float64(time.Second)), maxWait), nil
}

// unhurried is the error of a key that sends more than the server takes from one.
func (s *Server) unhurried(a *asked) error {
	if wait := s.rates.take(a); wait > 0 {
		a.w.Header().Set("Retry-After", strconv.Itoa(int(wait/time.Second)+1))
		return refusal{http.StatusTooManyRequests, fault.New(fault.Remote, "this key sends jobs and tensors faster than the server takes them")}
	}
	return nil
}

func (s *Server) submit(a *asked) error {
	if err := s.unhurried(a); err != nil {
		return err
	}
	wait, err := seconds(a.r)
	if err != nil {
		return err
	}
	mark := a.r.Header.Get("Idempotency-Key")
	if len(mark) > 256 || strings.ContainsFunc(mark, func(c rune) bool { return c < '!' || c > '~' }) {
		return refusal{http.StatusBadRequest, fault.New(fault.Remote, "an idempotency key has 256 characters at most, none of them blank or beyond ASCII")}
	}
	data, err := s.body(a)
	if err != nil {
		return err
	}
	head, err := remote.ReadHead(data)
	if err != nil {
		return refusal{http.StatusBadRequest, err}
	}
	names(a.w, head.Model)
	in := &jobs.Submission{Owner: a.owner, Model: head.Model, Kind: head.Kind, Mark: mark, Request: data}
	if a.key != nil {
		in.Priority, in.Limits = jobs.Priority(a.key.Priority), a.key.Limits
	}
	job, err := s.store.Submit(a.ctx, in)
	if err != nil {
		return err
	}
	s.metrics.submitted(head.Model)
	s.options.Log.Info("submitted", "id", job.ID, "key", a.owner, "model", head.Model, "kind", head.Kind, "bytes", len(data))
	a.w.Header().Set("Nnsight-Job", job.ID)
	a.w.Header().Set("Location", "/v1/jobs/"+job.ID)
	if wait == 0 {
		reply(a.w, http.StatusAccepted, job)
		return nil
	}
	return s.outcome(a, job.ID, wait)
}

func (s *Server) result(a *asked) error {
	wait, err := seconds(a.r)
	if err != nil {
		return err
	}
	return s.outcome(a, a.r.PathValue("id"), wait)
}

// outcome answers with what came of a job, once it is final, or with its state after a time.
func (s *Server) outcome(a *asked, id string, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(a.ctx, max(wait, time.Second))
	defer cancel()
	var job *jobs.Job
	var err error
	if wait == 0 {
		job, err = s.store.Get(ctx, a.owner, id)
	} else {
		job, err = s.store.Wait(ctx, a.owner, id)
	}
	if err != nil {
		return err
	}
	switch job.State {
	case jobs.Completed:
	case jobs.Failed:
		reply(a.w, http.StatusUnprocessableEntity, map[string]any{"error": job.Error, "id": id})
		return nil
	case jobs.Cancelled:
		reply(a.w, http.StatusConflict, map[string]any{"error": fault.New(fault.Cancelled, "the job was cancelled"), "id": id})
		return nil
	default:
		reply(a.w, http.StatusAccepted, job)
		return nil
	}
	data, err := s.store.Result(a.ctx, a.owner, id)
	if err != nil {
		if fault.As(err).Cause == nil {
			return refusal{http.StatusGone, err}
		}
		return err
	}
	h := a.w.Header()
	h.Set("Content-Type", remote.Media)
	h.Set("Nnsight-Job", id)
	if len(data) > 64<<10 && strings.Contains(a.r.Header.Get("Accept-Encoding"), "zstd") {
		h.Set("Content-Encoding", "zstd")
		data = encoder.EncodeAll(data, nil)
	}
	h.Set("Content-Length", strconv.Itoa(len(data)))
	_, _ = a.w.Write(data)
	return nil
}

func (s *Server) job(a *asked) error {
	job, err := s.store.Get(a.ctx, a.owner, a.r.PathValue("id"))
	if err == nil {
		reply(a.w, http.StatusOK, job)
	}
	return err
}

func (s *Server) cancel(a *asked) error {
	job, err := s.store.Cancel(a.ctx, a.owner, a.r.PathValue("id"))
	if err == nil {
		reply(a.w, http.StatusOK, job)
	}
	return err
}

func (s *Server) list(a *asked) error {
	all, err := s.store.List(a.ctx, a.owner, recent)
	if err == nil {
		reply(a.w, http.StatusOK, map[string]any{"jobs": all})
	}
	return err
}

// events tells the states of a job as they come, as server-sent events.
func (s *Server) events(a *asked) error {
	begun := false
	control := http.NewResponseController(a.w)
	err := s.store.Watch(a.ctx, a.owner, a.r.PathValue("id"), func(j *jobs.Job) error {
		if !begun {
			begun = true
			a.w.Header().Set("Content-Type", "text/event-stream")
			a.w.Header().Set("Cache-Control", "no-store")
		}
		data, err := json.Marshal(j)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(a.w, "event: status\ndata: %s\n\n", data); err != nil {
			return err
		}
		return control.Flush()
	})
	if begun {
		return nil
	}
	return err
}

func (s *Server) models(a *asked) error {
	names, err := s.store.Models(a.ctx)
	if err != nil {
		return err
	}
	present := map[string]int{} // workers, by model
	for _, w := range s.workers() {
		for _, m := range w.Models {
			present[m]++
		}
	}
	out := []map[string]any{}
	for _, name := range names {
		data, err := s.store.Model(a.ctx, name)
		if err != nil {
			continue // gone meanwhile
		}
		var d struct {
			Architecture string `json:"architecture"`
			DType        string `json:"dtype"`
			Context      int    `json:"context"`
		}
		if err := json.Unmarshal(data, &d); err != nil {
			return err
		}
		depth, err := s.store.Depth(a.ctx, name)
		if err != nil {
			return err
		}
		out = append(out, map[string]any{"name": name, "architecture": d.Architecture, "dtype": d.DType, "context": d.Context,
			"workers": present[name], "waiting": depth})
	}
	reply(a.w, http.StatusOK, map[string]any{"models": out, "version": engine.Version})
	return nil
}

func (s *Server) model(a *asked) error {
	data, err := s.store.Model(a.ctx, a.r.PathValue("name"))
	if err != nil {
		return err
	}
	plain(a.w, "application/json", data)
	return nil
}

func (s *Server) upload(a *asked) error {
	if err := s.unhurried(a); err != nil {
		return err
	}
	data, err := s.body(a)
	if err != nil {
		return err
	}
	blob, err := remote.ReadUpload(data)
	if err != nil {
		return refusal{http.StatusBadRequest, err}
	}
	if hash := blob.Hash(); hash != a.r.PathValue("hash") {
		return refusal{http.StatusBadRequest, fault.New(fault.Remote, "the tensor's hash is %s, and not the one in the address", hash)}
	}
	if err := s.store.Upload(a.ctx, a.owner, a.r.PathValue("hash"), data); err != nil {
		return err
	}
	a.w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) uploaded(a *asked) error {
	there, err := s.store.Has(a.ctx, a.owner, a.r.PathValue("hash"))
	if err != nil {
		return err
	}
	if there {
		a.w.WriteHeader(http.StatusNoContent)
	} else {
		a.w.WriteHeader(http.StatusNotFound)
	}
	return nil
}

func (s *Server) ready(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
	defer cancel()
	if err := s.store.Ready(ctx); err != nil {
		fail(w, http.StatusServiceUnavailable, err)
		return
	}
	plain(w, "text/plain", []byte("ready\n"))
}
