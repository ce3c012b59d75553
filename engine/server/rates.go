package server

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// rates hold each owner to a number of jobs and uploads a second, with room for a burst of twice as many.
type rates struct {
	mu      sync.Mutex
	general float64
	known   map[string]*rate.Limiter
}

func newRates(general float64) *rates {
	return &rates{general: general, known: map[string]*rate.Limiter{}}
}

// take notes a job or an upload, and gives how long its owner has to wait first: then it was not noted. Where there are no keys
// nobody is to be kept from anybody, and nobody waits.
func (r *rates) take(a *asked) time.Duration {
	if a.key == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	limiter := r.known[a.owner]
	if limiter == nil {
		own := r.general
		if a.key.Rate > 0 {
			own = a.key.Rate
		}
		limiter = rate.NewLimiter(rate.Limit(own), max(1, int(2*own)))
		r.known[a.owner] = limiter
	}
	reserved := limiter.Reserve()
	wait := reserved.Delay()
	if wait > 0 {
		reserved.Cancel()
	}
	return wait
}
