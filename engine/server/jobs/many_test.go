package jobs

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Many clients, each of which waits for its job before it sends the next: none is forgotten in the queue.
func TestManyClientsAtOnce(t *testing.T) {
	s, end := open(t, t.TempDir(), Options{})
	defer end()
	q := queue(t, s)
	defer q.Close()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go func() {
		for t := q.Take(ctx); t != nil; t = q.Take(ctx) {
			all := []*Task{t}
			for t := q.TryTake(ctx); t != nil; t = q.TryTake(ctx) {
				all = append(all, t)
			}
			for _, t := range all {
				t.Complete(ctx, []byte("result"))
			}
		}
	}()
	var longest atomic.Int64
	var clients sync.WaitGroup
	for range 32 {
		clients.Go(func() {
			for range 50 {
				begun := time.Now()
				j := submit(t, s, "me", "request")
				_, err := s.Wait(t.Context(), "me", j.ID)
				require.NoError(t, err)
				_, err = s.Result(t.Context(), "me", j.ID)
				require.NoError(t, err)
				if took := int64(time.Since(begun)); took > longest.Load() {
					longest.Store(took)
				}
			}
		})
	}
	clients.Wait()
	t.Log(time.Duration(longest.Load()))
	require.Less(t, time.Duration(longest.Load()), 10*time.Second)
}
