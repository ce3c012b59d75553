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
	Line   float64       // multiplications that one operator of a job may need; 0 is no limit
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
	ending sync.WaitGroup // results on their way into the store
	shared int            // jobs of the last pass, if there were several
	took   time.Duration  // that it took
}

const (
	window    = 64               // tasks that wait in a worker, among which owners take turns
	kept      = 16               // generations of a model that go on
	keptFor   = 30 * time.Second // without a request for them
	announced = 5 * time.Second

	mostTogether   = 64   // jobs that share a forward pass
	tokensTogether = 4096 // and their tokens

	mostPatience = 5 * time.Millisecond // for the next that may share it
	patientPart  = 10                   // and this part of what the last one took
)

// errStopped is why a job is abandoned when its worker stops.
var errStopped = fault.New(fault.Cancelled, "the worker stops")

// Start begins to run the jobs of models, which stay the caller's, and whose weights nothing can write to
// any more.
func Start(ctx context.Context, store *jobs.Store, models map[string]*engine.Model, o Options) (*Worker, error) {
	if o.Time == 0 {
		o.Time = 5 * time.Minute
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	var id [6]byte
	_, _ = rand.Read(id[:]) // never fails
	w := &Worker{id: hex.EncodeToString(id[:]), store: store, options: o}
	for name, m := range models {
		m.Protect(true)
		m.LimitWork(o.Line)
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
		w.models = append(w.models, &served{name: name, model: m, queue: q, chains: remote.NewChains(kept, keptFor)})
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
	defer s.ending.Wait()
	runtime.LockOSThread() // torch's threads belong to the one that computes: another would have to make them anew
	defer runtime.UnlockOSThread()
	var next *job
	for {
		first := next
		if next = nil; first == nil {
			t := s.queue.Take(taking)
			if t == nil {
				return
			}
			first = w.read(t)
		}
		if first == nil {
			continue
		}
		var all []*job
		all, next = w.gather(taking, s, first)
		if first.request.Kind == remote.Generate && first.company() != nil {
			next = w.alongside(taking, running, s, all, next)
			s.shared = 0
			continue
		}
		begun := time.Now()
		w.run(running, s, all)
		s.shared, s.took = 0, time.Since(begun)
		if len(all) > 1 {
			s.shared = len(all)
		}
	}
}

// job is a task whose request has been read.
type job struct {
	*jobs.Task
	request *remote.Request
	limits  remote.Limits // the worker's and its key's
	begun   time.Time
	beside  int // others that its passes were shared with, the most at one time
}

// ends says how a job has ended.
func (j *job) ends(how string) {
	took := time.Since(j.begun).Round(time.Millisecond)
	if j.beside > 0 {
		j.Say("%s after %v, in passes with up to %d others", how, took, j.beside)
	} else {
		j.Say("%s after %v", how, took)
	}
}

// read reads the request of a task. It ends the task, and gives nil, where that cannot be done.
func (w *Worker) read(t *jobs.Task) *job {
	own := t.Limits()
	j := &job{Task: t, begun: time.Now(),
		limits: w.options.Limits.Within(remote.Limits{Work: own.Work, Memory: own.Memory, Output: own.Output})}
	w.running.Add(1)
	err := w.guarded(j, func() (err error) {
		j.request, err = remote.Parse(t.Request, j.limits)
		return err
	})
	if err != nil {
		w.failed(j, err)
		return nil
	}
	j.request.Upload = func(hash string) (remote.Blob, error) {
		data, err := t.Upload(context.Background(), hash)
		if err != nil {
			return remote.Blob{}, err
		}
		return remote.ReadUpload(data)
	}
	return j
}

// limited is company that keeps to the same limits.
type limited struct {
	of     any
	limits remote.Limits
}

// company says with which jobs it may share forward passes; nil is none. One whose worker has ended may be why, and is not to
// end others' as well.
func (j *job) company() any {
	of := j.request.Company()
	if of == nil || j.Attempts() > 1 {
		return nil
	}
	return limited{of, j.limits}
}

// gather gives a job and those that wait already and may share its forward pass, and the next one, if that was
// taken to see that it may not. Where the last pass was shared, it waits a little for those that were in it: whoever
// sends one job after the other sends the next soon after the last.
func (w *Worker) gather(ctx context.Context, s *served, first *job) (all []*job, next *job) {
	all = []*job{first}
	company := first.company()
	if company == nil {
		return all, nil
	}
	tokens := first.request.Tokens()
	for len(all) < mostTogether && tokens < tokensTogether {
		t := s.queue.TryTake(ctx)
		if t == nil && len(all) < s.shared && first.request.Kind == remote.Trace { // generations may join later

			t = s.queue.TakeWithin(ctx, min(mostPatience, s.took/patientPart))
		}
		if t == nil {
			break
		}
		j := w.read(t)
		if j == nil {
			continue
		}
		if tokens += j.request.Tokens(); tokens > tokensTogether || j.company() != company {
			return all, j
		}
		all = append(all, j)
	}
	return all, nil
}

// run runs jobs, together if there are several, and tells what came of each.
func (w *Worker) run(running context.Context, s *served, all []*job) {
	if len(all) > 1 && w.together(running, s, all) {
		return
	}
	for _, j := range all {
		w.alone(running, s, j)
	}
}

// late is the error of a job that has run for too long.
func (w *Worker) late() error {
	return fault.New(fault.Remote, "the job has run for %v, which is as long as this server lets one", w.options.Time).
		WithHint("Split it, or make it smaller.")
}

// together runs jobs in one forward pass, and reports whether all went well. Else none has ended: one of them
// may be to blame, and the others are not to know.
func (w *Worker) together(running context.Context, s *served, all []*job) bool {
	ctx, cancel := context.WithTimeoutCause(running, w.options.Time, w.late())
	defer cancel()
	var requests []*remote.Request
	for _, j := range all {
		requests = append(requests, j.request)
	}
	var results [][]byte
	err := w.guarded(all[0], func() (err error) {
		results, err = w.performer(s, all[0]).PerformTogether(ctx, requests)
		return err
	})
	if err != nil {
		return false
	}
	s.ending.Wait() // no more results than those of one pass wait for the store
	for i, j := range all {
		j.beside = len(all) - 1
		w.complete(s, j, results[i])
	}
	return true
}

// performer runs a job, or several of the same limits.
func (w *Worker) performer(s *served, j *job) *remote.Performer {
	return &remote.Performer{Model: s.model.Native, Limits: j.limits, Chains: s.chains}
}

// alone runs one job.
func (w *Worker) alone(running context.Context, s *served, j *job) {
	ctx, cancel := context.WithTimeoutCause(running, w.options.Time, w.late())
	defer cancel()
	cancelled, stop := j.Cancelled()
	defer stop()
	go func() {
		select {
		case <-cancelled:
			cancel()
		case <-ctx.Done():
		}
	}()
	var result []byte
	err := w.guarded(j, func() (err error) {
		result, err = w.performer(s, j).Perform(ctx, j.Owner, j.request)
		return err
	})
	switch {
	case err == nil:
		s.ending.Wait()
		w.complete(s, j, result)
	case context.Cause(running) == errStopped:
		j.Retry(context.Background())
		w.running.Add(-1)
	default:
		w.failed(j, err)
	}
}

// complete stores what came of a job, while the next ones run.
func (w *Worker) complete(s *served, j *job, result []byte) {
	s.ending.Go(func() {
		j.ends("done")
		j.Complete(context.Background(), result)
		w.ended(j, jobs.Completed, len(result))
	})
}

func (w *Worker) failed(j *job, err error) {
	j.ends("failed")
	j.Fail(context.Background(), err)
	w.ended(j, jobs.Failed, 0)
}

// ended tells of a job that has ended, to the log and to who counts.
func (w *Worker) ended(j *job, state jobs.State, bytes int) {
	w.running.Add(-1)
	w.done.Add(1)
	took := time.Since(j.begun)
	w.options.Log.Info("job", "id", j.ID, "key", j.Owner, "model", j.Model(), "state", state, "seconds", took.Seconds(), "bytes", bytes)
	if w.options.Done != nil {
		w.options.Done(j.Model(), state, took)
	}
}

// guarded does something for a job. What that does to this process is an error of the job's.
func (w *Worker) guarded(j *job, f func() error) error {
	err := w.unharmed(j.ID, f)
	if err == errPanic {
		return fault.New(fault.Internal, "the server failed at this job").WithHint("Tell who runs the server: job %s.", j.ID)
	}
	return err
}

// errPanic is why something for several jobs was not done.
var errPanic = fault.New(fault.Internal, "the server failed at one of these jobs")

// unharmed does something, and gives errPanic where that panics.
func (w *Worker) unharmed(job string, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			w.options.Log.Error("panic", "job", job, "what", p, "stack", string(debug.Stack()))
			err = errPanic
		}
	}()
	return f()
}
