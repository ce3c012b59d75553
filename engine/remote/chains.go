package remote

import (
	"slices"
	"sync"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/gen"
)

// Chains keep generations between requests that continue one another: each request has all steps from
// the first on, and those that a kept generation has done already need not be done again. A generation
// that is gone is simply begun anew.
type Chains struct {
	mu    sync.Mutex
	most  int
	idle  time.Duration
	kept  map[chainKey]*chain
	close bool
}

type chainKey struct{ owner, chain string }

// chain is a generation that nobody works on.
type chain struct {
	generation *gen.Generation
	random     aten.Tensor // the state of the generator that it drew from
	steps      int
	scored     bool // the tokens of the last step wait for scores of the client's
	forget     *time.Timer
}

func (c *chain) free() {
	c.generation.Free()
	c.random.Free()
}

// NewChains keep so many generations, each for so long. Close them.
func NewChains(most int, idle time.Duration) *Chains {
	return &Chains{most: most, idle: idle, kept: map[chainKey]*chain{}}
}

// take gives the generation that a request continues, the state of its generator and the number of the
// step that comes next, or nil. scored: that step has run, and its tokens are to be drawn from the request's scores.
func (c *Chains) take(owner string, r *Request) (g *gen.Generation, random aten.Tensor, at int, scored bool) {
	none := aten.Tensor{}
	if c == nil || r.Chain == "" {
		return nil, none, 0, false
	}
	key := chainKey{owner, r.Chain}
	c.mu.Lock()
	defer c.mu.Unlock()
	known := c.kept[key]
	if known == nil {
		return nil, none, 0, false
	}
	delete(c.kept, key)
	known.forget.Stop()
	at = known.steps
	if known.scored {
		at--
	}
	fits := at < len(r.Steps) && (known.random.IsZero() || r.Random != "") // who sends no state has not the generator to draw from
	for i := 0; fits && i < at; i++ {
		fits = len(r.Steps[i].Want) == 0 // what is wanted of it must be computed
	}
	if fits && known.scored {
		s := &r.Steps[at]
		fits = s.Scores != "" && !slices.Contains(s.Want, WantResults)
	}
	if !fits {
		known.free()
		return nil, none, 0, false
	}
	return known.generation, known.random, at, known.scored
}

// put keeps a generation that has done all steps of a request. It takes both over. scored: the tokens of the last one
// wait for scores of the client's.
func (c *Chains) put(owner string, r *Request, g *gen.Generation, random aten.Tensor, scored bool) {
	one := &chain{generation: g, random: random, steps: len(r.Steps), scored: scored}
	if c == nil || r.Chain == "" {
		one.free()
		return
	}
	key := chainKey{owner, r.Chain}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.close || len(c.kept) >= c.most {
		one.free()
		return
	}
	if before := c.kept[key]; before != nil { // the same request twice at once
		before.forget.Stop()
		before.free()
	}
	one.forget = time.AfterFunc(c.idle, func() { c.drop(key, one) })
	c.kept[key] = one
}

// drop frees a generation that nobody has asked for, if it is still the one.
func (c *Chains) drop(key chainKey, one *chain) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kept[key] == one {
		delete(c.kept, key)
		one.free()
	}
}

// Close frees all generations; none is kept from now on.
func (c *Chains) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.close = true
	for key, one := range c.kept {
		one.forget.Stop()
		one.free()
		delete(c.kept, key)
	}
}
