package jobs

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// inline is the most bytes of a request or result that travel in one message; larger ones are objects.
const inline = 512 << 10

// Options say how jobs are kept.
type Options struct {
	Keep     time.Duration // jobs and results, from their last change on; 0 is a day
	Lease    time.Duration // how long a worker may be silent before others take its jobs; 0 is 12 seconds
	Replicas int           // of everything, in a cluster; 0 is one
	MaxQueue int           // jobs of one owner that wait for one model; 0 is 64
	Storage  int64         // bytes on disk of each queue, of requests, uploads and results; 0 is as much as there is
}

// Store keeps jobs. Any number of goroutines may use it.
type Store struct {
	options  Options
	nc       *nats.Conn
	js       jetstream.JetStream
	jobs     jetstream.KeyValue // owner.id -> record
	models   jetstream.ObjectStore
	uploads  jetstream.ObjectStore
	payloads jetstream.ObjectStore
	results  jetstream.ObjectStore
	answers  jetstream.Stream // small results
	queues   sync.Map         // name -> jetstream.Stream, as far as they were used
	rooms    rooms
	fresh    fresh

	reconnected atomic.Int64 // when, in nanoseconds
}

// Open finds the store of a NATS server or cluster, or makes it there.
func Open(ctx context.Context, nc *nats.Conn, o Options) (*Store, error) {
	if o.Keep == 0 {
		o.Keep = 24 * time.Hour
	}
	if o.Lease == 0 {
		o.Lease = 12 * time.Second
	}
	if o.Replicas == 0 {
		o.Replicas = 1
	}
	if o.MaxQueue == 0 {
		o.MaxQueue = 64
	}
	if o.Storage == 0 {
		o.Storage = -1
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, err
	}
	s := &Store{options: o, nc: nc, js: js, rooms: rooms{left: map[string]int{}}}
	return s, s.settled(ctx, func() error { return s.make(ctx) })
}

// make makes what is not there yet.
func (s *Store) make(ctx context.Context) (err error) {
	o, js := s.options, s.js
	if s.jobs, err = js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: "jobs", TTL: o.Keep, Storage: jetstream.FileStorage, Replicas: o.Replicas, History: 1}); err != nil {
		return unreachable(err)
	}
	if err = s.consistent(ctx, "KV_jobs"); err == nil {
		s.jobs, err = js.KeyValue(ctx, "jobs")
	}
	if err != nil {
		return unreachable(err)
	}
	for _, b := range []struct {
		to   *jetstream.ObjectStore
		name string
		keep time.Duration
	}{{&s.models, "models", 0}, {&s.uploads, "uploads", o.Keep}, {&s.payloads, "payloads", o.Keep}, {&s.results, "results", o.Keep}} {
		if *b.to, err = js.CreateOrUpdateObjectStore(ctx, jetstream.ObjectStoreConfig{
			Bucket: b.name, TTL: b.keep, Storage: jetstream.FileStorage, Replicas: o.Replicas, MaxBytes: o.Storage}); err != nil {
			return unreachable(err)
		}
		if err = s.consistent(ctx, "OBJ_"+b.name); err == nil {
			*b.to, err = js.ObjectStore(ctx, b.name)
		}
		if err != nil {
			return unreachable(err)
		}
	}
	s.answers, err = js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: "ANSWERS", Subjects: []string{"answer.>"}, MaxAge: o.Keep, MaxMsgsPerSubject: 1, MaxBytes: o.Storage,
		Discard: jetstream.DiscardOld, Storage: jetstream.FileStorage, Replicas: o.Replicas, AllowDirect: o.Replicas == 1})
	if err != nil {
		return unreachable(err)
	}
	return nil
}

// consistent lets the leader of a stream alone be read, where there are copies: others are behind, and a job that one
// of them has not heard of yet is there all the same. Whoever reads it by what it was before keeps to that.
func (s *Store) consistent(ctx context.Context, name string) error {
	if s.options.Replicas == 1 {
		return nil
	}
	stream, err := s.js.Stream(ctx, name)
	if err != nil {
		return err
	}
	config := stream.CachedInfo().Config
	config.AllowDirect = false
	_, err = s.js.UpdateStream(ctx, config)
	return err
}

// token is a name as part of a subject.
func token(name string) string {
	sum := sha256.Sum256([]byte(name))
	return letters(sum[:10])
}

// letters writes bytes in small letters and digits, five bits each.
func letters(bits []byte) string {
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(bits))
}

func (o record) key() string { return o.Owner + "." + o.ID }

// subject is where its message stands in the queue, alone.
func (o record) subject() string {
	return "work." + token(o.Model) + "." + o.Class + "." + o.Owner + "." + o.ID
}

// ErrNoRoom is the error of what there is no room for on disk: [Options.Storage].
var ErrNoRoom = fault.New(fault.Remote, "the server has no room for more: its requests, uploads and results are kept for a while").
	WithHint("Send it again later, send less, or ask who runs the server for more room.")

// unreachable is the error of a queue that cannot be asked.
func unreachable(err error) error {
	if strings.Contains(err.Error(), "maximum bytes exceeded") { // in the words of JetStream, which has no code for it
		return ErrNoRoom
	}
	return fault.New(fault.Remote, "the queue of the server does not answer: %v", err).WithCause(err).
		WithHint("Try again in a moment.")
}

// ErrNone is the error of a job that is not there, or is another's.
var ErrNone = fault.New(fault.Remote, "there is no such job").WithHint("Jobs are kept for a day, and seen by the key that sent them.")

// get reads a job.
func (s *Store) get(ctx context.Context, owner, id string) (r record, err error) {
	if !wellFormed(id) {
		return r, ErrNone
	}
	return s.read(ctx, owner+"."+id)
}

func (s *Store) read(ctx context.Context, key string) (r record, err error) {
	entry, err := asked(ctx, s, func() (jetstream.KeyValueEntry, error) { return s.jobs.Get(ctx, key) })
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return r, ErrNone
	} else if err != nil {
		return r, unreachable(err)
	}
	if err := json.Unmarshal(entry.Value(), &r); err != nil {
		return r, err
	}
	r.revision = entry.Revision()
	return r, nil
}

// wellFormed reports whether a string can be the id of a job.
func wellFormed(id string) bool {
	return len(id) == idLength && strings.Trim(id, "abcdefghijklmnopqrstuvwxyz234567") == ""
}

// errRaced is the error of a change to a job that somebody else has changed meanwhile.
var errRaced = errors.New("the job has changed")

// change stores a job that was read before, unless it has changed since, and tells who waits for it.
func (s *Store) change(ctx context.Context, r *record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	revision, err := s.jobs.Update(ctx, r.key(), data, r.revision)
	if errors.Is(err, jetstream.ErrKeyExists) {
		return errRaced
	} else if err != nil {
		return unreachable(err)
	}
	r.revision = revision
	s.tell(r)
	return nil
}

// tell publishes the state of a job to those that wait for it now; whoever comes later reads it.
func (s *Store) tell(r *record) {
	if data, err := json.Marshal(r.Job); err == nil {
		_ = s.nc.Publish("event."+r.key(), data)
	}
}

// Get gives a job to its owner, with its position in the queue.
func (s *Store) Get(ctx context.Context, owner, id string) (*Job, error) {
	r, err := s.get(ctx, owner, id)
	if err != nil {
		return nil, err
	}
	if r.State == Queued {
		r.Position = s.position(ctx, &r)
	}
	return &r.Job, nil
}

// position counts the jobs that are taken before a queued one, as far as that can be known.
func (s *Store) position(ctx context.Context, r *record) int {
	stream, err := s.queueOf(ctx, r.Model)
	if err != nil {
		return 0
	}
	message, err := stream.GetLastMsgForSubject(ctx, r.subject())
	if err != nil {
		return 0
	}
	consumer, err := stream.Consumer(ctx, r.Class)
	if err != nil {
		return 0
	}
	info := consumer.CachedInfo()
	ahead := min(message.Sequence-min(message.Sequence, info.AckFloor.Stream), uint64(info.NumAckPending)+info.NumPending)
	return int(ahead)
}

// queueOf finds the queue of a model.
func (s *Store) queueOf(ctx context.Context, model string) (jetstream.Stream, error) {
	name := streamOf(model)
	if known, ok := s.queues.Load(name); ok {
		return known.(jetstream.Stream), nil
	}
	stream, err := s.js.Stream(ctx, name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, NoModel(model)
	} else if err != nil {
		return nil, unreachable(err)
	}
	s.queues.Store(name, stream)
	return stream, nil
}

// List gives an owner's jobs, the latest first, so many at most.
func (s *Store) List(ctx context.Context, owner string, most int) ([]*Job, error) {
	keys, err := s.jobs.ListKeysFiltered(ctx, owner+".>")
	if err != nil {
		return nil, unreachable(err)
	}
	out := []*Job{}
	for key := range keys.Keys() {
		r, err := s.read(ctx, key)
		if err != nil {
			continue // gone meanwhile
		}
		out = append(out, &r.Job)
	}
	latestFirst(out)
	return out[:min(most, len(out))], nil
}

// Watch calls told with each state that a job goes through from now on, until ctx ends or it is final.
// It begins with the one that the job is in.
func (s *Store) Watch(ctx context.Context, owner, id string, told func(*Job) error) error {
	var last State
	return s.follow(ctx, owner, id, func(*Job) (final bool, err error) {
		j, err := s.Get(ctx, owner, id) // for its position, and because an event may be lost
		if err != nil {
			return false, err
		}
		if j.State != last || j.State == Queued {
			if err := told(j); err != nil {
				return false, err
			}
		}
		last = j.State
		return last.Final(), nil
	})
}

// Wait gives a job once it is final, or as it is when ctx ends.
func (s *Store) Wait(ctx context.Context, owner, id string) (*Job, error) {
	var last *Job
	err := s.follow(ctx, owner, id, func(event *Job) (bool, error) {
		if event == nil {
			r, err := s.get(ctx, owner, id)
			if err != nil {
				return false, err
			}
			event = &r.Job
		}
		last = event
		return last.State.Final(), nil
	})
	if last != nil && ctx.Err() != nil {
		if last.State == Queued {
			if now, err := s.Get(context.WithoutCancel(ctx), owner, id); err == nil { // with its position
				last = now
			}
		}
		return last, nil
	}
	return last, err
}

// follow calls f at once, at each event of a job and from time to time, until that says that the job is final.
// What an event says of the job is given to f; nil where it is to look itself.
func (s *Store) follow(ctx context.Context, owner, id string, f func(event *Job) (final bool, err error)) error {
	if !wellFormed(id) {
		return ErrNone
	}
	events := make(chan *nats.Msg, 16)
	sub, err := s.nc.ChanSubscribe("event."+owner+"."+id, events)
	if err != nil {
		return unreachable(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	again := time.NewTicker(5 * time.Second) // an event may be lost with a connection
	defer again.Stop()
	var event *Job
	for {
		if final, err := f(event); final || err != nil {
			return err
		}
		event = nil
		select {
		case m := <-events:
			var j Job
			if json.Unmarshal(m.Data, &j) == nil {
				event = &j
			}
		case <-again.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Cancel ends a job, if it is not final already, and gives it.
func (s *Store) Cancel(ctx context.Context, owner, id string) (*Job, error) {
	for {
		r, err := s.get(ctx, owner, id)
		if err != nil || r.State.Final() {
			return &r.Job, err
		}
		now := time.Now()
		r.State, r.Ended = Cancelled, &now
		switch err = s.change(ctx, &r); err {
		case nil:
			_ = s.nc.Publish("cancel."+r.key(), nil)
			s.dequeue(ctx, &r)
			return &r.Job, nil
		case errRaced:
		default:
			return nil, err
		}
	}
}

// dequeue takes the message of a job that nobody will run out of the queue.
func (s *Store) dequeue(ctx context.Context, r *record) {
	stream, err := s.queueOf(ctx, r.Model)
	if err != nil {
		return
	}
	if message, err := stream.GetLastMsgForSubject(ctx, r.subject()); err == nil {
		_ = stream.DeleteMsg(ctx, message.Sequence) // else a worker finds that the job is final
	}
}

// Result gives what came of a completed job.
func (s *Store) Result(ctx context.Context, owner, id string) ([]byte, error) {
	if !wellFormed(id) {
		return nil, ErrNone
	}
	key := owner + "." + id
	if data := s.fresh.take(key); data != nil {
		return data, nil
	}
	message, err := asked(ctx, s, func() (*jetstream.RawStreamMsg, error) {
		return s.answers.GetLastMsgForSubject(ctx, "answer."+key)
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil, fault.New(fault.Remote, "the result of job %s is no longer kept", id).WithHint("Run it again.")
	} else if err != nil {
		return nil, unreachable(err)
	}
	if message.Header.Get("Object") == "" {
		return message.Data, nil
	}
	data, err := asked(ctx, s, func() ([]byte, error) { return s.results.GetBytes(ctx, key) })
	if err != nil {
		return nil, unreachable(err)
	}
	return data, nil
}

// storeResult keeps what came of a job.
func (s *Store) storeResult(ctx context.Context, r *record, data []byte) error {
	m := nats.NewMsg("answer." + r.key())
	if len(data) <= inline {
		m.Data = data
	} else {
		m.Header.Set("Object", "1")
		if _, err := s.results.PutBytes(ctx, r.key(), data); err != nil {
			return fault.New(fault.Remote, "the result, %d bytes, cannot be kept: %v", len(data), err).WithCause(err)
		}
	}
	if _, err := s.js.PublishMsg(ctx, m); err != nil {
		return err
	}
	s.fresh.put(r.key(), data)
	return nil
}

// fresh holds the latest results that this process has stored: most are asked for at once, and once.
type fresh struct {
	mu      sync.Mutex
	bytes   int
	order   []string
	results map[string][]byte
}

// mostFresh is how many bytes of results, or results, are held.
const mostFresh, mostFreshResults = 32 << 20, 256

func (f *fresh) put(key string, data []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.results == nil {
		f.results = map[string][]byte{}
	}
	if _, there := f.results[key]; !there {
		f.order = append(f.order, key)
	}
	f.bytes += len(data) - len(f.results[key])
	f.results[key] = data
	for f.bytes > mostFresh || len(f.order) > mostFreshResults {
		f.bytes -= len(f.results[f.order[0]])
		delete(f.results, f.order[0])
		f.order = f.order[1:]
	}
}

// take gives a result and holds it no longer.
func (f *fresh) take(key string) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	data := f.results[key]
	if data != nil {
		f.bytes -= len(data)
		delete(f.results, key)
	}
	return data
}

// Upload keeps a tensor that requests of its owner name by its hash.
func (s *Store) Upload(ctx context.Context, owner, hash string, data []byte) error {
	if _, err := s.uploads.PutBytes(ctx, owner+"."+hash, data); err != nil {
		return unreachable(err)
	}
	return nil
}

// Uploaded gives such a tensor, or nil where there is none.
func (s *Store) Uploaded(ctx context.Context, owner, hash string) ([]byte, error) {
	data, err := s.uploads.GetBytes(ctx, owner+"."+hash)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, unreachable(err)
	}
	return data, nil
}

// Has reports whether a tensor was uploaded.
func (s *Store) Has(ctx context.Context, owner, hash string) (bool, error) {
	_, err := s.uploads.GetInfo(ctx, owner+"."+hash)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return false, nil
	} else if err != nil {
		return false, unreachable(err)
	}
	return true, nil
}

// Ready reports whether the queue answers.
func (s *Store) Ready(ctx context.Context) error {
	if _, err := s.js.AccountInfo(ctx); err != nil {
		return unreachable(fmt.Errorf("no answer: %w", err))
	}
	return nil
}
