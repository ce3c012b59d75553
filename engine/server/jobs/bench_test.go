package jobs

import (
	"context"
	"testing"
)

func BenchmarkJob(b *testing.B) {
	s, end := open(b, b.TempDir(), Options{})
	defer end()
	q := queue(b, s)
	defer q.Close()
	ctx, stop := context.WithCancel(b.Context())
	defer stop()
	go func() {
		for t := q.Take(ctx); t != nil; t = q.Take(ctx) {
			t.Complete(ctx, []byte("result"))
		}
	}()
	for b.Loop() {
		j := submit(b, s, "me", "request")
		if _, err := s.Wait(b.Context(), "me", j.ID); err != nil {
			b.Fatal(err)
		}
		if _, err := s.Result(b.Context(), "me", j.ID); err != nil {
			b.Fatal(err)
		}
	}
}
