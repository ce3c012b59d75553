package jobs

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// idLength is how many letters the id of a job has: 160 bits that nobody can guess.
const idLength = 32

// newID gives the id of a new job. The same owner's same mark, if it has one, gives the same.
func newID(owner, mark string) string {
	var bits [20]byte
	if mark == "" {
		_, _ = rand.Read(bits[:]) // never fails
	} else {
		sum := sha256.Sum256([]byte(owner + "\x00" + mark))
		copy(bits[:], sum[:])
	}
	return letters(bits[:])
}

// Submission is a request on its way into the queue.
type Submission struct {
	Owner    string
	Model    string
	Kind     string
	Priority Priority
	Limits   Limits
	Mark     string // whoever sends the same one twice has sent one job; "" is none
	Request  []byte
}

// ErrFull is the error of an owner with too many jobs in the queue.
var ErrFull = fault.New(fault.Remote, "too many of your jobs wait already").WithHint("Wait for some of them.")

// Submit queues a request. The model must have a queue: see [Store.AddModel].
func (s *Store) Submit(ctx context.Context, in *Submission) (*Job, error) {
	r := record{Owner: in.Owner, Class: classOf(in.Priority), Limits: in.Limits, Job: Job{
		ID: newID(in.Owner, in.Mark), Model: in.Model, Kind: in.Kind, State: Queued, Created: time.Now()}}
	if err := s.room(ctx, &r); err != nil {
		return nil, err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	r.revision, err = asked(ctx, s, func() (uint64, error) { return s.jobs.Create(ctx, r.key(), data) })
	if errors.Is(err, jetstream.ErrKeyExists) {
		return s.again(ctx, in, r.ID)
	} else if err != nil {
		return nil, unreachable(err)
	}
	if err := s.enqueue(ctx, &r, in.Request); err != nil {
		s.forget(ctx, &r)
		return nil, err
	}
	return &r.Job, nil
}

// again gives a job that was sent before. One that has never been begun may have not come into the queue: if it
// has, it is known there.
func (s *Store) again(ctx context.Context, in *Submission, id string) (*Job, error) {
	r, err := s.get(ctx, in.Owner, id)
	if err != nil {
		return nil, err
	}
	if r.State == Queued && time.Since(r.Created) < memory {
		if err := s.enqueue(ctx, &r, in.Request); err != nil {
			return nil, err
		}
	}
	return s.Get(ctx, in.Owner, id)
}

// memory is for how long a queue knows what came into it.
const memory = 2 * time.Minute

// room reports an error where an owner has too many jobs in a queue. Their number is asked for when as many have come
// as there was room for: of those that came since, some may have ended.
func (s *Store) room(ctx context.Context, r *record) error {
	name := r.Owner + " " + r.Model
	if s.rooms.take(name) {
		return nil
	}
	stream, err := s.queueOf(ctx, r.Model)
	if err != nil {
		return err
	}
	subjects := jetstream.WithSubjectFilter("work." + token(r.Model) + ".*." + r.Owner + ".*")
	for range 4 {
		info, err := asked(ctx, s, func() (*jetstream.StreamInfo, error) { return stream.Info(ctx, subjects) })
		if err != nil {
			return unreachable(err)
		}
		if left := s.options.MaxQueue - len(info.State.Subjects); left > 0 {
			s.rooms.put(name, left-1)
			return nil
		}
		time.Sleep(lag)
	}
	return ErrFull
}

// lag is for how long a job may stand in the queue after its owner has been told that it has ended.
const lag = 25 * time.Millisecond

// rooms holds how many jobs may come without asking, by owner and model.
type rooms struct {
	mu   sync.Mutex
	left map[string]int
}

// mostRooms is how many owners are known at once: the others are asked for each time.
const mostRooms = 1 << 14

func (r *rooms) take(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	left := r.left[name]
	if left > 1 {
		r.left[name] = left - 1
	} else {
		delete(r.left, name)
	}
	return left > 0
}

func (r *rooms) put(name string, left int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if left > 0 && len(r.left) < mostRooms {
		r.left[name] = left
	}
}

// enqueue puts a job into the queue of its model.
func (s *Store) enqueue(ctx context.Context, r *record, request []byte) error {
	m := nats.NewMsg(r.subject())
	m.Header.Set("Job", r.ID)
	m.Header.Set("Owner", r.Owner)
	if len(request) <= inline {
		m.Data = request
	} else {
		m.Header.Set("Object", "1")
		if _, err := s.payloads.PutBytes(ctx, r.key(), request); err != nil {
			return unreachable(err)
		}
	}
	_, err := asked(ctx, s, func() (*jetstream.PubAck, error) {
		return s.js.PublishMsg(ctx, m, jetstream.WithMsgID(fmt.Sprintf("%s.%d", r.ID, r.revision)))
	})
	if err != nil {
		return unreachable(err)
	}
	return nil
}

// ErrNoModel is the cause of the error of a model that nobody serves.
var ErrNoModel = errors.New("no such model")

// NoModel is that error.
func NoModel(name string) error {
	return fault.New(fault.Remote, "this server has no model %q", name).WithCause(ErrNoModel).
		WithHint("nnsight_go.status() lists those that it has.")
}

// forget takes back a job that never came into the queue.
func (s *Store) forget(ctx context.Context, r *record) {
	ctx = context.WithoutCancel(ctx)
	_ = s.jobs.Purge(ctx, r.key())
}

func classOf(p Priority) string { return string(cmp.Or(p, Normal)) }

func latestFirst(all []*Job) {
	slices.SortFunc(all, func(a, b *Job) int { return b.Created.Compare(a.Created) })
}
