package host

import (
	mathbits "math/bits"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Growth estimates what a generation is going to take: its steps one by one, and the keys and values that it keeps.
// Nothing of it is made.
type Growth struct {
	cache *Cache // without memory
	first int64  // tokens of the prompt, padding included
	Kept  int64  // bytes of keys and values
}

// NewGrowth is that of a generation from these prompts: see [Native.NewCache].
func (m *Native) NewGrowth(rows, masks [][]int64, more int) (*Growth, error) {
	c, err := m.laidOut(rows, masks, more)
	if err != nil {
		return nil, err
	}
	g := &Growth{cache: c, first: c.seq}
	err = c.each(func(_, dtype string, shape []int64) error {
		g.Kept += int64(count(shape)) * itemBytes(dtype)
		return nil
	})
	return g, err
}

// Step is what a step with that program takes; the first one is 0. It takes consts over.
func (g *Growth) Step(at int, program *graph.Graph, consts []aten.Tensor, end bool) (*Cost, error) {
	defer aten.FreeAll(consts)
	m, c := g.cache.model, *g.cacheAt(at)
	if err := m.Load(); err != nil {
		return nil, err
	}
	own := &graph.Graph{Nodes: slices.Clone(program.Nodes), Invokes: slices.Clone(program.Invokes), Positions: program.Positions}
	r := &Run{model: m, graph: &graph.Graph{}, cache: &c, consts: consts, end: end}
	if err := c.variant(r); err != nil {
		return nil, err
	}
	if err := c.fill(r.graph, own); err != nil {
		return nil, err
	}
	if end {
		r.askForLogits()
	}
	if _, err := r.choose(); err != nil {
		return nil, err
	}
	if err := graph.VerifyMore(r.graph, r.models.Causal, len(consts), 0, 0); err != nil {
		return nil, err
	}
	schedule, err := plan.New(r.models).Extend(r.graph, end)
	if err != nil {
		return nil, err
	}
	cost, err := r.estimate(schedule)
	if err == nil && end { // the logits stay here
		last := len(cost.Saved) - 1
		cost.Output -= cost.Saved[last].Bytes
		cost.Saved = cost.Saved[:last]
	}
	return cost, err
}

// cacheAt is the cache as it is going to be at a step.
func (g *Growth) cacheAt(step int) *Cache {
	c := &Cache{model: g.cache.model, rows: g.cache.rows, masks: g.cache.masks, real: g.cache.real, seq: g.first,
		room: g.cache.room, masked: g.cache.masked}
	if step > 0 {
		c.past, c.seq, c.masks = min(g.first+int64(step)-1, c.room-1), 1, nil
		c.rows = slices.Repeat([][]int64{{0}}, len(c.rows))
	}
	return c
}

// plainSize is what the cost of a step without a program depends on, of one row.
type plainSize struct {
	masked, prompt bool
	tokens         int // that it looks at: a power of two
}

// Plain is what a step without a program takes, as if each row looked at as many tokens as the next power of two
// is: so it is found out but once for all that are about as long.
func (g *Growth) Plain(step int) (*Cost, error) {
	c := g.cacheAt(step)
	m, total := g.cache.model, c.past+c.seq
	size := plainSize{c.masked, step == 0, 1 << mathbits.Len64(uint64(total-1))}
	known, ok := m.plain.Load(size)
	if !ok {
		tokens := min(size.tokens, m.Context())
		row, mask := make([]int64, tokens), slices.Repeat([]int64{1}, tokens)
		if c.masked {
			mask[0] = 0
		}
		one, err := m.laidOut([][]int64{row}, [][]int64{mask}, 1)
		if err != nil {
			return nil, err
		}
		like := &Growth{cache: one, first: int64(tokens)}
		if step > 0 {
			like.first, step = int64(max(tokens-1, 1)), 1
			one.room = int64(tokens)
		}
		cost, err := like.Step(min(step, 1), &graph.Graph{}, nil, true)
		if err != nil {
			return nil, err
		}
		known, _ = m.plain.LoadOrStore(size, cost)
	}
	cost, rows := *known.(*Cost), len(c.rows)
	cost.Work, cost.Peak = cost.Work*float64(rows), cost.Peak*int64(rows)
	return &cost, nil
}
