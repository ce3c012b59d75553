// Package work runs the jobs of a server on the models that a process holds.
package work

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/remote"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
)

// Options say how a worker runs jobs.
type Options struct {
	Limits remote.Limits
	Time   time.Duration // that a job may run; 0 is five minutes
	Log    *slog.Logger  // is told of jobs, never of what is in them
	Done   func(model string, state jobs.State, took time.Duration)
}

// Worker runs the jobs of its models, one of each model at a time.
type Worker struct {
	id      string
	store   *jobs.Store
	options Options
	models  []*served
	running atomic.Int32
	done    atomic.Int64
	close   context.CancelFunc // takes no more
	abandon context.CancelCauseFunc
	group   sync.WaitGroup
}

// served is a model, and the queue of its jobs.
type served struct {
	name   string
	model  *engine.Model
	queue  *jobs.Queue
	chains *remote.Chains
}

const (
	window    = 64               // tasks that wait in a worker, among which owners take turns
	kept      = 16               // generations of a model that go on
	keptFor   = 30 * time.Second // without a request for them
	announced = 5 * time.Second
)

// errStopped is why a job is abandoned when its worker stops.
var errStopped = fault.New(fault.Cancelled, "the worker stops")

// Start begins to run the jobs of models, which stay the caller's, and whose weights nothing can write to
// any more.
func Start(ctx context.Context, store *jobs.Store, models map[string]*engine.Model, o Options) (*Worker, error) {
	if o.Time == 0 {
		o.Time = 5 * time.Minute
	}
	var id [6]byte
	_, _ = rand.Read(id[:]) // never fails
	w := &Worker{id: hex.EncodeToString(id[:]), store: store, options: o}
	for name, m := range models {
		if err := m.Protect(); err != nil {
			return nil, err
		}
		description, err := json.Marshal(public(m))
		if err != nil {
			return nil, err
		}
		if err := store.AddModel(ctx, name, description); err != nil {
			return nil, err
		}
		q, err := store.Queue(ctx, name, window)
		if err != nil {
			return nil, err
		}
		w.models = append(w.models, &served{name, m, q, remote.NewChains(kept, keptFor)})
	}
	taking, stop := context.WithCancel(context.Background())
	running, abandon := context.WithCancelCause(context.Background())
	w.close, w.abandon = stop, abandon
	for _, s := range w.models {
		w.group.Go(func() { w.serve(taking, running, s) })
	}
	w.group.Go(func() { w.announce(taking) })
	return w, nil
}

// public is what strangers may know of a model: not where it lies.
func public(m *engine.Model) any {
	d := *m.Describe()
	d.Directory = ""
	return &d
}

// Close takes no more jobs. Those under way come to their end or, when ctx ends, are given back.
func (w *Worker) Close(ctx context.Context) {
	w.close()
	ended := make(chan struct{})
	go func() { w.group.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-ctx.Done():
		w.abandon(errStopped)
		<-ended
	}
}

func (w *Worker) announce(ctx context.Context) {
	var names []string
	for _, s := range w.models {
		names = append(names, s.name)
	}
	tick := time.NewTicker(announced)
	defer tick.Stop()
	for {
		w.store.Announce(jobs.Worker{ID: w.id, Models: names, Running: int(w.running.Load()), Done: w.done.Load()})
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (w *Worker) serve(taking, running context.Context, s *served) {
	defer s.chains.Close()
	defer s.queue.Close()
	runtime.LockOSThread() // torch's threads belong to the one that computes: another would have to make them anew
	defer runtime.UnlockOSThread()
	for t := s.queue.Take(taking); t != nil; t = s.queue.Take(taking) {
		w.running.Add(1)
		w.job(running, s, t)
		w.running.Add(-1)
		w.done.Add(1)
	}
}

// job runs one, and tells what came of it.
func (w *Worker) job(running context.Context, s *served, t *jobs.Task) {
	begun := time.Now()
	late := fault.New(fault.Remote, "the job has run for %v, which is as long as this server lets one", w.options.Time).
		WithHint("Split it, or make it smaller.")
	ctx, cancel := context.WithTimeoutCause(running, w.options.Time, late)
	defer cancel()
	cancelled, stop := t.Cancelled()
	defer stop()
	go func() {
		select {
		case <-cancelled:
			cancel()
		case <-ctx.Done():
		}
	}()
	result, err := w.perform(ctx, s, t)
	state := jobs.Completed
	keep := context.WithoutCancel(ctx)
	switch {
	case err == nil:
		t.Complete(keep, result)
	case context.Cause(running) == errStopped:
		t.Retry(keep)
		return
	default:
		state = jobs.Failed
		t.Fail(keep, err)
	}
	took := time.Since(begun)
	if w.options.Log != nil {
		w.options.Log.Info("job", "id", t.ID, "key", t.Owner, "model", s.name, "state", state, "seconds", took.Seconds(), "bytes", len(result))
	}
	if w.options.Done != nil {
		w.options.Done(s.name, state, took)
	}
}

// perform runs the request of a task. What it does to this process is an error of the task's.
func (w *Worker) perform(ctx context.Context, s *served, t *jobs.Task) (out []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			if w.options.Log != nil {
				w.options.Log.Error("panic", "job", t.ID, "what", p, "stack", string(debug.Stack()))
			}
			err = fault.New(fault.Internal, "the server failed at this job").WithHint("Tell who runs the server: job %s.", t.ID)
		}
	}()
	r, err := remote.Parse(t.Request, w.options.Limits)
	if err != nil {
		return nil, err
	}
	p := &remote.Performer{Model: s.model.Native, Limits: w.options.Limits, Chains: s.chains, Upload: func(hash string) (remote.Blob, error) {
		data, err := t.Upload(ctx, hash)
		if err != nil {
			return remote.Blob{}, err
		}
		return remote.ReadUpload(data)
	}}
	return p.Perform(ctx, t.Owner, r)
}
