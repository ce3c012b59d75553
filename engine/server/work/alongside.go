package work

import (
	"context"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/remote"
)

// Generations of one company go on in the same steps, and others of it join between two steps, as they come. Once
// something else waits in the queue nothing joins any more, so that it has its turn when those under way are done.

// herd is generations that a worker lets grow together.
type herd struct {
	*Worker
	served  *served
	running context.Context
	batch   *remote.Alongside
	company any
	members map[*remote.Request]*member
	tokens  int    // of all members
	shared  bool   // there have been several at once, or were about to be
	apart   []*job // those that there was no room for: they run when the others are done
}

// member is a job among others.
type member struct {
	*job
	cancelled <-chan struct{}
	stop      func()
	late      time.Time
}

// alongside runs generations of one company, and those of it that come meanwhile. It gives the job that comes next, if
// one was taken to see that it may not join.
func (w *Worker) alongside(taking, running context.Context, s *served, all []*job, next *job) *job {
	h := &herd{Worker: w, served: s, running: running, batch: w.performer(s, all[0]).Alongside(), company: all[0].company(),
		members: map[*remote.Request]*member{}}
	defer func() { h.batch.Free() }()
	h.join(all)
	for h.grown(); h.batch.Open() > 0; h.grown() {
		if next == nil && len(h.apart) == 0 && taking.Err() == nil {
			var fresh []*job
			if fresh, next = h.fresh(taking); len(fresh) > 0 {
				h.join(fresh)
				h.grown()
			}
		}
		if h.unwanted(); h.batch.Open() == 0 {
			continue
		}
		if late, err := h.step(); err != nil && !late { // who is late ends, and the others do the step again
			h.scatter()
			continue
		}
		for _, r := range h.batch.Apart() {
			h.apart = append(h.apart, h.gone(r))
		}
	}
	for _, j := range h.apart {
		j.Say("begins anew, alone: it, or something beside it, failed")
		j.beside = 0
		w.alone(running, s, j)
	}
	return next
}

// step does the next step of all, unless one of them becomes late meanwhile: lines may take as long as they like.
func (h *herd) step() (late bool, err error) {
	var first time.Time
	for _, m := range h.members {
		if first.IsZero() || m.late.Before(first) {
			first = m.late
		}
	}
	ctx, cancel := context.WithDeadlineCause(h.running, first, h.late())
	defer cancel()
	err = h.unharmed("several", func() error { return h.batch.Step(ctx) })
	return err != errPanic && h.batch.Open() > 0 && ctx.Err() != nil && h.running.Err() == nil, err
}

// fresh takes what waits in the queue and may join, up to the first job that may not.
func (h *herd) fresh(ctx context.Context) (fresh []*job, next *job) {
	tokens := h.tokens
	for len(h.members)+len(fresh) < mostTogether {
		t := h.served.queue.TryTake(ctx)
		if t == nil {
			break
		}
		j := h.read(t)
		if j == nil {
			continue
		}
		if tokens += j.request.Tokens(); tokens > tokensTogether || j.company() != h.company {
			return fresh, j
		}
		fresh = append(fresh, j)
	}
	return fresh, nil
}

// join lets jobs begin, all at once or, where that fails, one by one.
func (h *herd) join(fresh []*job) {
	var requests []*remote.Request
	for _, j := range fresh {
		requests = append(requests, j.request)
	}
	h.shared = h.shared || len(h.members)+len(fresh) > 1
	ctx, cancel := context.WithTimeoutCause(h.running, h.options.Time, h.late())
	defer cancel()
	err := h.unharmed("several", func() error { return h.batch.Join(ctx, requests) })
	switch {
	case err == nil:
		for _, j := range fresh {
			m := &member{job: j, late: time.Now().Add(h.options.Time)}
			m.cancelled, m.stop = j.Cancelled()
			h.members[j.request] = m
			h.tokens += j.request.Tokens()
		}
		for _, m := range h.members {
			m.beside = max(m.beside, len(h.members)-1)
		}
	case len(fresh) > 1:
		for _, j := range fresh {
			h.join([]*job{j})
		}
	case fault.As(err).Code == fault.Input || fault.As(err).Code == fault.Remote: // what it asks for is refused
		h.failed(fresh[0], err)
	default:
		h.apart = append(h.apart, fresh[0])
	}
}

// grown stores what came of those that are done.
func (h *herd) grown() {
	done := h.batch.Grown()
	if len(done) > 0 {
		h.served.ending.Wait() // no more results than those of one step wait for the store
	}
	for _, g := range done {
		h.complete(h.served, h.gone(g.Request), g.Response)
	}
}

// gone forgets a member.
func (h *herd) gone(r *remote.Request) *job {
	m := h.members[r]
	m.stop()
	delete(h.members, r)
	h.tokens -= r.Tokens()
	return m.job
}

// unwanted ends those whose owner does not want them any more, and those that have run for too long. Where there was company,
// that may be what took so long: they begin anew, alone.
func (h *herd) unwanted() {
	for r, m := range h.members {
		var why error
		select {
		case <-m.cancelled:
			why = fault.New(fault.Cancelled, "the job was cancelled")
		default:
			if time.Now().After(m.late) {
				why = h.late()
			}
		}
		if why == nil {
			continue
		}
		if j := h.gone(r); fault.As(why).Code != fault.Cancelled && h.shared {
			h.apart = append(h.apart, j)
		} else {
			h.failed(j, why)
		}
		if err := h.unharmed("several", func() error { return h.batch.Leave(r) }); err != nil {
			h.scatter()
			return
		}
	}
}

// scatter has all that are under way begin anew, alone: one of them may be to blame, and the others are not to know.
func (h *herd) scatter() {
	h.grown()
	h.batch.Free()
	for r := range h.members {
		h.apart = append(h.apart, h.gone(r))
	}
}
