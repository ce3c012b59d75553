package jobs

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/stretchr/testify/require"
)

func open(t testing.TB, dir string, o Options) (*Store, func()) {
	e, err := Embed(dir, "", 0, "")
	require.NoError(t, err)
	nc, err := e.Connect("")
	require.NoError(t, err)
	o.Lease = time.Second
	s, err := Open(t.Context(), nc, o)
	require.NoError(t, err)
	require.NoError(t, s.AddModel(t.Context(), "some/model", []byte(`{"modules": []}`)))
	return s, sync.OnceFunc(func() { nc.Close(); e.Close() })
}

func submit(t testing.TB, s *Store, owner, text string) *Job {
	j, err := s.Submit(t.Context(), &Submission{Owner: owner, Model: "some/model", Kind: "trace", Request: []byte(text)})
	require.NoError(t, err)
	return j
}

func queue(t testing.TB, s *Store) *Queue {
	q, err := s.Queue(t.Context(), "some/model", 16)
	require.NoError(t, err)
	return q
}

func TestAJobGoesThrough(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	for _, size := range []int{5, inline, inline + 1, 3 * inline} {
		request := bytes.Repeat([]byte("x"), size)
		j, err := s.Submit(t.Context(), &Submission{Owner: "me", Model: "some/model", Request: request})
		require.NoError(t, err)
		require.Equal(t, Queued, j.State)
		q := queue(t, s)
		task := q.Take(t.Context())
		require.Equal(t, request, task.Request)
		now, err := s.Get(t.Context(), "me", j.ID)
		require.NoError(t, err)
		require.Equal(t, Running, now.State)
		task.Complete(t.Context(), append(request, 'y'))
		done, err := s.Wait(t.Context(), "me", j.ID)
		require.NoError(t, err)
		require.Equal(t, Completed, done.State)
		got, err := s.Result(t.Context(), "me", j.ID)
		require.NoError(t, err)
		require.Equal(t, append(request, 'y'), got)
		q.Close()
	}
	depth, err := s.Depth(t.Context(), "some/model")
	require.NoError(t, err)
	require.Zero(t, depth)
}

func TestNobodySeesAnothersJobs(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	j := submit(t, s, "me", "x")
	for _, id := range []string{j.ID, "", "*", ">", "me." + j.ID, j.ID + ".x", "../" + j.ID} {
		_, err := s.Get(t.Context(), "you", id)
		require.Equal(t, ErrNone, err)
		_, err = s.Cancel(t.Context(), "you", id)
		require.Equal(t, ErrNone, err)
		require.Equal(t, ErrNone, s.Watch(t.Context(), "you", id, nil))
		_, err = s.Result(t.Context(), "you", id)
		require.Error(t, err)
	}
	mine, err := s.List(t.Context(), "me", 10)
	require.NoError(t, err)
	require.Len(t, mine, 1)
	yours, err := s.List(t.Context(), "you", 10)
	require.NoError(t, err)
	require.Empty(t, yours)
	require.NoError(t, s.Upload(t.Context(), "me", "abc", []byte("tensor")))
	there, err := s.Has(t.Context(), "me", "abc")
	require.NoError(t, err)
	require.True(t, there)
	there, err = s.Has(t.Context(), "you", "abc")
	require.NoError(t, err)
	require.False(t, there)
}

func TestAJobIsSentOnce(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	in := &Submission{Owner: "me", Model: "some/model", Mark: "once", Request: []byte("x")}
	one, err := s.Submit(t.Context(), in)
	require.NoError(t, err)
	two, err := s.Submit(t.Context(), in)
	require.NoError(t, err)
	require.Equal(t, one.ID, two.ID)
	in.Owner = "you"
	other, err := s.Submit(t.Context(), in)
	require.NoError(t, err)
	require.NotEqual(t, one.ID, other.ID)
	depth, err := s.Depth(t.Context(), "some/model")
	require.NoError(t, err)
	require.Equal(t, 2, depth)
}

func TestAnUnknownModelKeepsNothing(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	_, err := s.Submit(t.Context(), &Submission{Owner: "me", Model: "other", Request: []byte("x")})
	require.ErrorContains(t, err, `no model "other"`)
	mine, err := s.List(t.Context(), "me", 10)
	require.NoError(t, err)
	require.Empty(t, mine)
	description, err := s.Model(t.Context(), "some/model")
	require.NoError(t, err)
	require.JSONEq(t, `{"modules": []}`, string(description))
	_, err = s.Model(t.Context(), "other")
	require.ErrorContains(t, err, `no model "other"`)
	names, err := s.Models(t.Context())
	require.NoError(t, err)
	require.Equal(t, []string{"some/model"}, names)
}

func TestOwnersTakeTurns(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	for i := range 6 {
		submit(t, s, "greedy", strconv.Itoa(i))
	}
	submit(t, s, "modest", "0")
	_, err := s.Submit(t.Context(), &Submission{Owner: "urgent", Model: "some/model", Priority: High, Request: []byte("0")})
	require.NoError(t, err)
	q := queue(t, s)
	defer q.Close()
	require.Eventually(t, func() bool { q.mu.Lock(); defer q.mu.Unlock(); return q.held == 8 }, 10*time.Second, time.Millisecond)
	var order []string
	for range 8 {
		task := q.Take(t.Context())
		order = append(order, task.Owner+string(task.Request))
		task.Complete(t.Context(), nil)
	}
	require.Equal(t, "urgent0", order[0])
	require.Less(t, slices.Index(order, "modest0"), 4)
}

func TestAnOwnerCannotFillTheQueue(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{MaxQueue: 3})
	defer end()
	var last *Job
	for range 3 {
		last = submit(t, s, "me", "x")
	}
	_, err := s.Submit(t.Context(), &Submission{Owner: "me", Model: "some/model", Request: []byte("x")})
	require.Equal(t, ErrFull, err)
	submit(t, s, "you", "x")
	_, err = s.Cancel(t.Context(), "me", last.ID)
	require.NoError(t, err)
	submit(t, s, "me", "x")
}

func TestWhatIsCancelledIsNotRun(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	waiting, running := submit(t, s, "me", "waiting"), submit(t, s, "you", "running")
	j, err := s.Cancel(t.Context(), "me", waiting.ID)
	require.NoError(t, err)
	require.Equal(t, Cancelled, j.State)
	q := queue(t, s)
	defer q.Close()
	task := q.Take(t.Context())
	require.Equal(t, "running", string(task.Request))
	cancelled, stop := task.Cancelled()
	defer stop()
	_, err = s.Cancel(t.Context(), "you", running.ID)
	require.NoError(t, err)
	<-cancelled
	task.Complete(t.Context(), []byte("too late"))
	j, err = s.Get(t.Context(), "you", running.ID)
	require.NoError(t, err)
	require.Equal(t, Cancelled, j.State, "what was cancelled stays so")
	require.Nil(t, q.TryTake(t.Context()))
}

func TestFailuresAreTold(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	j := submit(t, s, "me", "x")
	q := queue(t, s)
	defer q.Close()
	var states []State
	told := make(chan struct{})
	watched := make(chan error)
	go func() {
		watched <- s.Watch(t.Context(), "me", j.ID, func(j *Job) error {
			if states = append(states, j.State); len(states) == 1 {
				close(told)
			}
			return nil
		})
	}()
	<-told
	q.Take(t.Context()).Fail(t.Context(), fault.New(fault.Op, "no %s", "good"))
	require.NoError(t, <-watched)
	require.Equal(t, Queued, states[0])
	require.Equal(t, Failed, states[len(states)-1])
	done, err := s.Get(t.Context(), "me", j.ID)
	require.NoError(t, err)
	require.Equal(t, fault.Op, done.Error.Code)
	require.Equal(t, "no good", done.Error.Message)
}

func TestAJobThatEndsItsWorkersEnds(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	j := submit(t, s, "me", "x")
	for range attempts {
		q := queue(t, s)
		task := q.Take(t.Context())
		q.Close()
		task.Release() // as the lease does of a worker that is gone
	}
	q := queue(t, s)
	defer q.Close()
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { defer close(done); require.Nil(t, q.Take(ctx)) }()
	failed, err := s.Wait(t.Context(), "me", j.ID)
	require.NoError(t, err)
	require.Equal(t, Failed, failed.State)
	require.ErrorContains(t, failed.Error, "has ended 3 workers")
	require.Len(t, failed.Log, 3)
	require.Equal(t, "begun", failed.Log[0].Text)
	require.Contains(t, failed.Log[2].Text, "begun again")
	cancel()
	<-done
}

func TestAServerThatComesBack(t *testing.T) {
	dir := t.TempDir()
	s, end := open(t, dir, Options{})
	done, waiting := submit(t, s, "me", "done"), submit(t, s, "me", "waiting")
	q := queue(t, s)
	q.Take(t.Context()).Complete(t.Context(), []byte("result"))
	q.Close()
	end()
	s, end = open(t, dir, Options{})
	defer end()
	got, err := s.Result(t.Context(), "me", done.ID)
	require.NoError(t, err)
	require.Equal(t, "result", string(got))
	q = queue(t, s)
	defer q.Close()
	task := q.Take(t.Context())
	require.Equal(t, waiting.ID, task.ID)
	require.Equal(t, "waiting", string(task.Request))
	task.Complete(t.Context(), nil)
}

func TestEachJobIsDoneOnceByManyWorkers(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{MaxQueue: 1000})
	defer end()
	const jobs, workers = 300, 4
	var runs [jobs]atomic.Int32
	ctx, stop := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for w := range workers {
		q := queue(t, s)
		group.Go(func() {
			defer q.Close()
			for task := q.Take(ctx); task != nil; task = q.Take(ctx) {
				n, err := strconv.Atoi(string(task.Request))
				require.NoError(t, err)
				if w == 0 && n%7 == 0 { // gives some back
					task.Retry(ctx)
					time.Sleep(time.Millisecond)
					continue
				}
				runs[n].Add(1)
				task.Complete(ctx, fmt.Appendf(nil, "%d", 2*n))
			}
		})
	}
	var ids []string
	for i := range jobs {
		ids = append(ids, submit(t, s, "me"+strconv.Itoa(i%5), strconv.Itoa(i)).ID)
	}
	for i, id := range ids {
		owner := "me" + strconv.Itoa(i%5)
		j, err := s.Wait(t.Context(), owner, id)
		require.NoError(t, err)
		require.Equal(t, Completed, j.State)
		got, err := s.Result(t.Context(), owner, id)
		require.NoError(t, err)
		require.Equal(t, strconv.Itoa(2*i), string(got))
		require.EqualValues(t, 1, runs[i].Load())
	}
	stop()
	group.Wait()
}

func TestWorkersAreSeen(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	workers, err := s.Workers()
	require.NoError(t, err)
	require.Empty(t, workers())
	s.Announce(Worker{ID: "w1", Models: []string{"some/model"}})
	require.Eventually(t, func() bool { return len(workers()) == 1 }, 10*time.Second, time.Millisecond)
	require.NoError(t, s.Ready(t.Context()))
}
