package jobs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// attempts is how often a job is begun: one that ends its worker that often is a danger to all others.
const attempts = 3

func streamOf(model string) string { return "WORK-" + token(model) }

// AddModel makes the queue of a model, if there is none yet, and keeps its description for clients.
func (s *Store) AddModel(ctx context.Context, name string, description []byte) error {
	return s.settled(ctx, func() error { return s.addModel(ctx, name, description) })
}

func (s *Store) addModel(ctx context.Context, name string, description []byte) error {
	_, err := s.js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: streamOf(name), Subjects: []string{"work." + token(name) + ".>"}, Retention: jetstream.WorkQueuePolicy,
		Storage: jetstream.FileStorage, Replicas: s.options.Replicas, MaxAge: s.options.Keep, MaxBytes: s.options.Storage,
		Discard: jetstream.DiscardNew, Duplicates: min(memory, s.options.Keep)})
	if err != nil {
		return unreachable(err)
	}
	for _, p := range Priorities {
		if _, err := s.js.CreateOrUpdateConsumer(ctx, streamOf(name), jetstream.ConsumerConfig{
			Durable: string(p), FilterSubject: "work." + token(name) + "." + string(p) + ".>", AckPolicy: jetstream.AckExplicitPolicy,
			AckWait: s.options.Lease, MaxAckPending: 4096}); err != nil {
			return unreachable(err)
		}
	}
	meta := jetstream.ObjectMeta{Name: token(name), Description: name}
	if known, err := s.models.GetBytes(ctx, meta.Name); err == nil && string(known) == string(description) {
		return nil
	}
	if _, err := s.models.Put(ctx, meta, bytes.NewReader(description)); err != nil {
		return unreachable(err)
	}
	return nil
}

// Model gives the description of a model.
func (s *Store) Model(ctx context.Context, name string) ([]byte, error) {
	data, err := s.models.GetBytes(ctx, token(name))
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return nil, NoModel(name)
	} else if err != nil {
		return nil, unreachable(err)
	}
	return data, nil
}

// Models gives the names of all models that have a queue.
func (s *Store) Models(ctx context.Context) ([]string, error) {
	infos, err := s.models.List(ctx)
	if errors.Is(err, jetstream.ErrNoObjectsFound) {
		return nil, nil
	} else if err != nil {
		return nil, unreachable(err)
	}
	var names []string
	for _, info := range infos {
		names = append(names, info.Description)
	}
	return names, nil
}

// Depth is how many jobs wait for a model, those under way included.
func (s *Store) Depth(ctx context.Context, model string) (int, error) {
	stream, err := s.queueOf(ctx, model)
	if err != nil {
		return 0, err
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return 0, unreachable(err)
	}
	return int(info.State.Msgs), nil
}

// Task is a job that a worker has taken. Whoever takes it ends it with Complete, Fail or Release.
type Task struct {
	Owner   string
	ID      string
	Request []byte

	store *Store
	msg   jetstream.Msg
	once  sync.Once
	stop  chan struct{}
	r     record
}

// Queue gives the tasks of a model, each to one worker, those of a higher priority first, and among the
// owners in turn. Close it.
type Queue struct {
	store  *Store
	model  string
	window int
	mu     sync.Mutex
	ready  chan struct{} // has an element where tasks may be there
	tasks  map[string]*line
	held   int
	room   *sync.Cond
	closed bool
	done   sync.WaitGroup
}

// line is the tasks of a priority, by owner, the owners in turn.
type line struct {
	owners []string
	tasks  map[string][]*Task
}

// Queue opens the queue of a model. It holds about so many tasks at most that nobody has taken yet.
func (s *Store) Queue(ctx context.Context, model string, window int) (*Queue, error) {
	q := &Queue{store: s, model: model, window: window, ready: make(chan struct{}, 1), tasks: map[string]*line{}}
	q.room = sync.NewCond(&q.mu)
	for _, p := range Priorities {
		consumer, err := asked(ctx, s, func() (jetstream.Consumer, error) { return s.js.Consumer(ctx, streamOf(model), string(p)) })
		if err != nil {
			q.Close()
			return nil, unreachable(err)
		}
		q.tasks[string(p)] = &line{tasks: map[string][]*Task{}}
		q.done.Go(func() { q.pull(string(p), consumer) })
	}
	return q, nil
}

// patience is how long one request for messages stands. Close waits for those that do.
const patience = time.Second

// pull takes messages of a priority while there is room. It asks for as many as there is room for: jetstream's
// iterator asks for the next one while the last request may still be on its way, and then at times not at all.
func (q *Queue) pull(class string, consumer jetstream.Consumer) {
	for room := q.hasRoom(); room > 0; room = q.hasRoom() {
		batch, err := consumer.Fetch(room, jetstream.FetchMaxWait(patience))
		if err == nil {
			for msg := range batch.Messages() {
				q.put(class, msg)
			}
			err = batch.Error()
		}
		if err != nil {
			time.Sleep(patience / 10) // the connection is gone, and comes back by itself
		}
	}
}

// hasRoom waits until there is room for several tasks, and gives for how many; none once the queue is closed.
func (q *Queue) hasRoom() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.held > q.window/2 && !q.closed {
		q.room.Wait()
	}
	if q.closed {
		return 0
	}
	return q.window - q.held
}

// put adds the task of a message.
func (q *Queue) put(class string, msg jetstream.Msg) {
	t := &Task{store: q.store, msg: msg, Owner: msg.Headers().Get("Owner"), ID: msg.Headers().Get("Job"), stop: make(chan struct{})}
	t.beat()
	q.mu.Lock()
	l := q.tasks[class]
	if len(l.tasks[t.Owner]) == 0 {
		l.owners = append(l.owners, t.Owner)
	}
	l.tasks[t.Owner] = append(l.tasks[t.Owner], t)
	q.held++
	q.mu.Unlock()
	q.wake()
}

func (q *Queue) wake() {
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

// Take gives a task that has been begun, once there is one, or nil when ctx ends. A job that is final, or
// that has ended its worker too often, is not given.
func (q *Queue) Take(ctx context.Context) *Task {
	for {
		if t := q.pop(); t != nil {
			if t.begin(ctx) {
				return t
			}
			continue
		}
		select {
		case <-q.ready:
		case <-ctx.Done():
			return nil
		}
	}
}

// TryTake is Take of a task that is there now.
func (q *Queue) TryTake(ctx context.Context) *Task {
	for t := q.pop(); t != nil; t = q.pop() {
		if t.begin(ctx) {
			return t
		}
	}
	return nil
}

// TakeWithin is Take of a task that is there before a time has passed.
func (q *Queue) TakeWithin(ctx context.Context, d time.Duration) *Task {
	late := time.NewTimer(d)
	defer late.Stop()
	for {
		if t := q.TryTake(ctx); t != nil {
			return t
		}
		select {
		case <-q.ready:
		case <-late.C:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

func (q *Queue) pop() *Task {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, p := range Priorities {
		l := q.tasks[string(p)]
		if l == nil || len(l.owners) == 0 {
			continue
		}
		owner := l.owners[0]
		t := l.tasks[owner][0]
		l.owners = l.owners[1:]
		if l.tasks[owner] = l.tasks[owner][1:]; len(l.tasks[owner]) > 0 {
			l.owners = append(l.owners, owner)
		} else {
			delete(l.tasks, owner)
		}
		q.held--
		q.room.Broadcast()
		return t
	}
	return nil
}

// Close gives back what nobody has taken.
func (q *Queue) Close() {
	q.mu.Lock()
	q.closed = true
	q.room.Broadcast()
	q.mu.Unlock()
	q.done.Wait() // what is still asked for comes, and is given back below
	for t := q.pop(); t != nil; t = q.pop() {
		t.Release()
	}
	_ = q.store.nc.FlushTimeout(time.Second)
}

// beat keeps the task ours until it is ended.
func (t *Task) beat() {
	go func() {
		tick := time.NewTicker(t.store.options.Lease / 4)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				_ = t.msg.InProgress()
			case <-t.stop:
				return
			}
		}
	}()
}

// begin notes that the job runs, and reads its request.
func (t *Task) begin(ctx context.Context) bool {
	for {
		r, err := t.store.get(ctx, t.Owner, t.ID)
		if err == ErrNone || err == nil && r.State.Final() {
			t.ack()
			return false
		} else if err != nil {
			t.Release()
			return false
		}
		if t.r = r; r.Attempts >= attempts {
			t.Fail(ctx, fault.New(fault.Remote, "the job has ended %d workers", r.Attempts).
				WithHint("Something in it stops the process that runs it: tell who runs the server."))
			return false
		}
		if t.Request, err = t.payload(ctx); err != nil {
			t.Fail(ctx, err)
			return false
		}
		now := time.Now()
		t.r.State, t.r.Started, t.r.Attempts = Running, &now, r.Attempts+1
		if r.Attempts > 0 {
			t.Say("begun again: the worker that had begun it is lost")
		} else {
			t.Say("begun")
		}
		switch err := t.store.change(ctx, &t.r); {
		case err == errRaced: // cancelled
		case err != nil:
			t.Release()
			return false
		default:
			return true
		}
	}
}

// Say adds a line to the log of the job. Its owner sees it with the next state.
func (t *Task) Say(format string, args ...any) {
	if len(t.r.Log) < mostLines {
		t.r.Log = append(t.r.Log, Line{time.Now().UTC(), fmt.Sprintf(format, args...)})
	}
}

func (t *Task) payload(ctx context.Context) ([]byte, error) {
	if t.msg.Headers().Get("Object") == "" {
		return t.msg.Data(), nil
	}
	data, err := t.store.payloads.GetBytes(ctx, t.Owner+"."+t.ID)
	if err != nil {
		return nil, fault.New(fault.Remote, "the request of the job is no longer kept: %v", err)
	}
	return data, nil
}

// Model is the model that the task is for.
func (t *Task) Model() string { return t.r.Model }

// Attempts is how often a worker has begun the task, this time included.
func (t *Task) Attempts() int { return t.r.Attempts }

// Limits are those that the task brings along.
func (t *Task) Limits() Limits { return t.r.Limits }

// Cancelled is closed once the job's owner does not want it any more. Call stop when the job has ended.
func (t *Task) Cancelled() (cancelled <-chan struct{}, stop func()) {
	c := make(chan struct{})
	var once sync.Once
	sub, err := t.store.nc.Subscribe("cancel."+t.Owner+"."+t.ID, func(*nats.Msg) { once.Do(func() { close(c) }) })
	if err != nil {
		return c, func() {}
	}
	return c, func() { _ = sub.Unsubscribe() }
}

// Complete stores the result, and ends the task. One that was cancelled, or that another worker has
// ended meanwhile, stays as it is.
func (t *Task) Complete(ctx context.Context, result []byte) {
	if err := t.store.settled(ctx, func() error { return t.store.storeResult(ctx, &t.r, result) }); err != nil {
		t.Fail(ctx, err)
		return
	}
	t.r.Bytes = int64(len(result))
	t.end(ctx, Completed, nil)
}

// Fail ends the task with an error that its owner will read.
func (t *Task) Fail(ctx context.Context, err error) { t.end(ctx, Failed, fault.As(err)) }

func (t *Task) end(ctx context.Context, state State, failed *fault.Error) {
	now := time.Now()
	t.r.State, t.r.Error, t.r.Ended = state, failed, &now
	if err := t.store.settled(ctx, func() error { return t.store.change(ctx, &t.r) }); err != nil && err != errRaced {
		t.Release() // another tries again
		return
	}
	if t.msg.Headers().Get("Object") != "" {
		_ = t.store.payloads.Delete(ctx, t.Owner+"."+t.ID)
	}
	t.ack()
}

// Release gives the task back, for another worker or a later time.
func (t *Task) Release() {
	t.once.Do(func() { close(t.stop); _ = t.msg.Nak() })
}

// Retry gives a task back whose worker stops, as if it had not been begun.
func (t *Task) Retry(ctx context.Context) {
	t.r.State, t.r.Started = Queued, nil
	t.r.Attempts--
	t.Say("back in the queue: its worker stops")
	_ = t.store.change(ctx, &t.r) // who cancelled it meanwhile has the last word
	t.Release()
}

func (t *Task) ack() {
	t.once.Do(func() { close(t.stop); _ = t.msg.Ack() })
}

// Upload gives a tensor that the task's owner has uploaded.
func (t *Task) Upload(ctx context.Context, hash string) ([]byte, error) {
	data, err := t.store.Uploaded(ctx, t.Owner, hash)
	if err == nil && data == nil {
		err = fault.New(fault.Remote, "the request names an uploaded tensor %s that is not there", hash).
			WithHint("PUT it to /v1/tensors/%s.", hash)
	}
	return data, err
}

// Worker is a process that takes jobs, as others see it.
type Worker struct {
	ID      string    `json:"id"`
	Models  []string  `json:"models"`
	Running int       `json:"running"`
	Done    int64     `json:"done"`
	Seen    time.Time `json:"seen"`
}

// present is how long a worker is thought to be there without a word of it.
const present = 15 * time.Second

// Announce tells that a worker is there, by a message that nobody keeps.
func (s *Store) Announce(w Worker) {
	w.Seen = time.Now()
	if data, err := json.Marshal(w); err == nil {
		_ = s.nc.Publish("worker."+w.ID, data)
	}
}

// Workers listens to workers. The function gives those that are there, until the store's connection ends.
func (s *Store) Workers() (func() []Worker, error) {
	var mu sync.Mutex
	known := map[string]Worker{}
	_, err := s.nc.Subscribe("worker.*", func(m *nats.Msg) {
		var w Worker
		if json.Unmarshal(m.Data, &w) == nil {
			mu.Lock()
			known[w.ID] = w
			mu.Unlock()
		}
	})
	if err != nil {
		return nil, fmt.Errorf("workers cannot be listened to: %w", err)
	}
	return func() []Worker {
		mu.Lock()
		defer mu.Unlock()
		out := []Worker{}
		for id, w := range known {
			if time.Since(w.Seen) > present {
				delete(known, id)
			} else {
				out = append(out, w)
			}
		}
		return out
	}, nil
}
