package host

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/nn"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Cache is a batch of rows on its way through several steps of a model: each step is a [Run] over the
// tokens that are new, which looks back at the keys and values of those before.
//
// Phases: [Model.NewCache] takes the prompts; [Cache.Begin] starts a step, whose run goes as any other;
// when it is done, [Cache.TakeLogits] gives what the model says, and [Cache.Append] takes the tokens of
// the next step. It belongs to one goroutine at a time, and has one run at a time.
//
// Rows of different lengths are padded on the left, so that all go on at the same place.
type Cache struct {
	model   *Native
	rows    [][]int64 // the tokens of the step, unpadded
	masks   [][]int64
	real    [][]bool // of all tokens so far, padding included: whether they count
	past    int64    // tokens of earlier steps
	seq     int64    // tokens of this one, of the longest row
	room    int64    // tokens in all
	masked  bool     // not all tokens count
	tensors map[string]aten.Tensor
	logits  aten.Tensor

	mu    sync.Mutex // over what follows, and logits: a run may end on another thread than its generation
	run   *Run       // under way; it borrows tensors, so these live until it ends
	freed bool
}

// NewCache makes room for the prompts and more tokens a row, 1 or more; the last of them is drawn and never
// fed back. It asks for no work of the model.
func (m *Native) NewCache(rows, masks [][]int64, more int) (*Cache, error) {
	c, err := m.laidOut(rows, masks, more)
	if err != nil {
		return nil, err
	}
	if err := m.enter(); err != nil {
		return nil, err
	}
	if err := c.allocate(); err != nil {
		c.Free()
		return nil, err
	}
	return c, nil
}

// laidOut is a cache that has no memory yet.
func (m *Native) laidOut(rows, masks [][]int64, more int) (*Cache, error) {
	g := &graph.Graph{Invokes: []graph.Invoke{{Rows: rows, Masks: masks}}}
	if err := graph.Verify(g, m.graphs.Causal, 0); err != nil {
		return nil, err
	}
	if err := m.checkInputs(g, 0); err != nil {
		return nil, err
	}
	c := &Cache{model: m, rows: rows, masks: masks, tensors: map[string]aten.Tensor{}}
	for r, row := range rows {
		c.masked = c.masked || len(row) != len(rows[0])
		c.seq = max(c.seq, int64(len(row)))
		if masks != nil {
			for _, bit := range masks[r] {
				c.masked = c.masked || bit == 0
			}
		}
	}
	if c.seq == 0 {
		return nil, fault.New(fault.Input, "there is no prompt").WithHint("Give at least one token.")
	}
	c.room = c.seq + int64(more) - 1
	if most := int64(m.arch.Context()) - c.seq + 1; int64(more) > most { // the sum may overflow
		return nil, fault.New(fault.Input, "%d tokens of prompt and %d new ones are asked for; the model's context holds %d, and the last new one takes none of it",
			c.seq, more, m.arch.Context()).WithHint("Shorten the prompt, or ask for at most %d new tokens.", max(most, 0))
	}
	if int64(len(rows))*c.room > graph.MaxTokens {
		return nil, fault.New(fault.Input, "%d rows of %d tokens are %d tokens; %d are allowed",
			len(rows), c.room, int64(len(rows))*c.room, graph.MaxTokens)
	}
	for r, row := range rows {
		real := make([]bool, c.seq-int64(len(row)), c.room)
		for k := range row {
			real = append(real, masks == nil || masks[r][k] != 0)
		}
		c.real = append(c.real, real)
	}
	return c, nil
}

// allocate makes the tensors that keys and values go into.
func (c *Cache) allocate() error {
	defer plainMode()()
	return c.each(func(name, dtype string, shape []int64) error {
		t, err := aten.Zeros(dtype, c.model.device, shape...)
		if err == nil {
			c.tensors[name] = t
		}
		return err
	})
}

// each calls f for the tensors that keys and values go into.
func (c *Cache) each(f func(name, dtype string, shape []int64) error) error {
	m, err := c.model.graphs.Of(nn.Variant{Cached: true, Masked: c.masked})
	if err != nil {
		return err
	}
	for i := range m.Nodes {
		n := &m.Nodes[i]
		if n.Kind != graph.KindInput || !strings.HasPrefix(n.Op, plan.CachePrefix) {
			continue
		}
		if err := f(n.Op, cmp.Or(n.DType, c.model.dtype), []int64{int64(len(c.rows)), int64(n.Shape[1]), c.room, int64(n.Shape[3])}); err != nil {
			return err
		}
	}
	return nil
}

// Batch is the number of rows.
func (c *Cache) Batch() int { return len(c.rows) }

// Begin starts a run of the step: a trace without invokes of its own, whose lines see the step's
// tokens. With end nothing will be added to it. It takes over the graph, and consts also where it fails.
func (c *Cache) Begin(g *graph.Graph, consts []aten.Tensor, end bool) (*Run, error) {
	return c.begin(func(own *graph.Graph) error { return c.fill(own, g) }, consts, end)
}

// BeginParts starts a run of the step whose rows belong to several: each has an invoke without rows of its own, which sees
// as many rows as parts says, behind those of the one before. Their programs are complete, and know nothing of each other.
func (c *Cache) BeginParts(g *graph.Graph, parts []int, consts []aten.Tensor) (*Run, error) {
	return c.begin(func(own *graph.Graph) error { return c.divide(own, g, parts) }, consts, true)
}

func (c *Cache) begin(grow func(own *graph.Graph) error, consts []aten.Tensor, end bool) (*Run, error) {
	free := func() {
		aten.FreeAll(consts)
	}
	r := &Run{model: c.model, graph: &graph.Graph{}, cache: c}
	r.protect()
	if err := c.enter(r); err != nil {
		free()
		return nil, err
	}
	err := c.variant(r)
	if err == nil {
		err = c.model.enter()
	}
	if err != nil {
		free()
		c.leave(r)
		return nil, err
	}
	r.plan = plan.New(r.models)
	if err := r.Extend(grow, consts, end); err != nil {
		return nil, err
	}
	return r, nil
}

// variant takes the graph of the model that the step runs.
func (c *Cache) variant(r *Run) error {
	model, err := c.model.graphs.Of(nn.Variant{Cached: true, Masked: c.masked, Decode: c.past > 0, Training: c.model.Training()})
	r.models = plan.Models{Causal: model, Masked: model, Training: c.model.Training()}
	return err
}

// fill makes a step's program that of the rows.
func (c *Cache) fill(own, g *graph.Graph) error {
	*own = *g
	own.Invokes = slices.Clone(g.Invokes) // the caller's stay as they are
	main := -1
	for i := range own.Invokes {
		if in := &own.Invokes[i]; !in.Edit {
			if main >= 0 || in.Rows != nil {
				return fault.New(fault.Graph, "a step of generation has one invoke, without rows")
			}
			main = i
			in.Rows, in.Masks = c.rows, c.masks
		}
	}
	if main >= 0 && main != len(own.Invokes)-1 {
		return fault.New(fault.Graph, "the invoke of a step of generation comes after the edits")
	}
	if main < 0 {
		own.Invokes = append(own.Invokes, graph.Invoke{Rows: c.rows, Masks: c.masks})
	}
	return nil
}

// divide makes a step's program that of several, and has the logits of all of them at its end.
func (c *Cache) divide(own, g *graph.Graph, parts []int) error {
	*own = *g
	own.Invokes = slices.Clone(g.Invokes)
	row, next := 0, 0
	for i := range own.Invokes {
		in := &own.Invokes[i]
		if in.Edit {
			continue
		}
		if next == len(parts) || row+parts[next] > len(c.rows) {
			return fault.New(fault.Internal, "a step has more invokes than it has rows")
		}
		end := row + parts[next]
		in.Rows, in.Masks = c.rows[row:end], nil
		if c.masks != nil {
			in.Masks = c.masks[row:end]
		}
		row, next = end, next+1
	}
	if row != len(c.rows) {
		return fault.New(fault.Internal, "%d rows of a step are nobody's", len(c.rows)-row)
	}
	own.Invokes = append(own.Invokes, graph.Invoke{NoGrad: own.Invokes[0].NoGrad, Inference: own.Invokes[0].Inference})
	return c.padding(own)
}

// padding is the error of a line that names what padding gives another shape, or what is there because of padding alone: it
// would see that of others' rows.
func (c *Cache) padding(g *graph.Graph) error {
	if !c.masked {
		return nil
	}
	var models [2]*graph.Model
	for i := range models {
		var err error
		if models[i], err = c.model.graphs.Of(nn.Variant{Cached: true, Masked: i > 0, Decode: c.past > 0, Training: c.model.Training()}); err != nil {
			return err
		}
	}
	for i := range g.Nodes {
		n := &g.Nodes[i]
		switch n.Kind {
		case graph.KindRead, graph.KindWrite, graph.KindModule:
		default:
			continue
		}
		if !maps.EqualFunc(leafShapes(models[0], n), leafShapes(models[1], n), slices.Equal[graph.Shape]) {
			e := fault.New(fault.Internal, "what is at %q depends on the padding of others", n.Path)
			e.Node = i
			return e
		}
	}
	return nil
}

// leafShapes are the shapes of the tensors that a node names, or gives a module.
func leafShapes(m *graph.Model, n *graph.Node) map[string]graph.Shape {
	out := map[string]graph.Shape{}
	port, all := n.Port, n.Kind == graph.KindModule
	if all {
		port = graph.PortInput
	}
	if point, ok := m.Point(n.Path, port); ok {
		m.Points[point].Tree.Refs(func(id graph.ID) {
			if leaf := m.Nodes[id].Leaf; all || leaf == n.Leaf {
				out[leaf] = m.Nodes[id].Shape
			}
		})
	}
	return out
}

// TakeLogits gives the logits [batch, 1, vocab] of the step that is done, after all edits. They are the
// caller's from then on.
func (c *Cache) TakeLogits() (aten.Tensor, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.logits.IsZero() {
		return c.logits, fault.New(fault.Handle, "the step has not come to its end yet").WithHint("Step its run until it is done.")
	}
	t := c.logits
	c.logits = aten.Tensor{}
	return t, nil
}

// Append gives each row its next token, and so begins the next step.
func (c *Cache) Append(tokens []int64) error {
	if c.past+c.seq >= c.room {
		return fault.New(fault.Input, "there is no room for more than %d tokens", c.room)
	}
	c.past += c.seq
	c.seq, c.masks = 1, nil
	c.rows = make([][]int64, len(tokens))
	for r, token := range tokens {
		if token < 0 || token >= int64(c.model.arch.Vocab()) { // what a row goes on with that has ended, which nobody sees
			token = 0
		}
		c.rows[r] = []int64{token}
		c.real[r] = append(c.real[r], true)
	}
	return nil
}

// ended tells whether Free was called.
func (c *Cache) ended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.freed
}

// enter notes the run of a step: one at a time, and one a step.
func (c *Cache) enter(r *Run) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.freed:
		return fault.New(fault.Handle, "this generation has ended")
	case c.run != nil:
		return fault.New(fault.Handle, "this step has a run already").WithHint("Free it, or step it to its end.")
	case !c.logits.IsZero():
		return fault.New(fault.Handle, "this step is done").WithHint("Draw its tokens.")
	}
	c.run = r
	return nil
}

// leave notes that a run has ended, and gives back what was kept for it.
func (c *Cache) leave(r *Run) {
	c.mu.Lock()
	last := c.run == r && c.freed
	if c.run == r {
		c.run = nil
	}
	c.mu.Unlock()
	if last {
		c.release()
	}
}

// detach forgets what autograd has noted of the keys and values of a step that it followed.
func (c *Cache) detach() {
	defer plainMode()()
	for _, t := range c.tensors {
		aten.DetachInPlace(t)
	}
}

// keep takes the logits of the step over; those of a generation that has been freed are not kept.
func (c *Cache) keep(logits aten.Tensor) {
	c.mu.Lock()
	if !c.freed {
		c.logits, logits = logits, c.logits
	}
	c.mu.Unlock()
	logits.Free()
}

// Free gives the cache's memory back, once a run under way has ended. It may be called twice.
func (c *Cache) Free() {
	c.mu.Lock()
	ready := !c.freed && c.run == nil
	c.freed = true
	c.mu.Unlock()
	if ready {
		c.release()
	}
}

// release frees what a cache holds that nobody uses any more.
func (c *Cache) release() {
	for _, t := range c.tensors {
		t.Free()
	}
	if !c.logits.IsZero() {
		c.logits.Free()
	}
	c.tensors, c.logits = nil, aten.Tensor{}
	c.model.done()
}

// input makes one of the inputs of the step's forward pass.
func (c *Cache) input(name string) (value, error) {
	number := func(n int64) (value, error) {
		v := aten.IntValue(n)
		return value{other: &v}, nil
	}
	batch, total := int64(len(c.rows)), c.past+c.seq
	var t aten.Tensor
	var err error
	switch name {
	case "past":
		return number(c.past)
	case "seq":
		return number(c.seq)
	case "total":
		return number(total)
	case "input_ids":
		t, err = aten.FillInt64s(func(ids []int64) { // padding is id 0: nobody sees it
			for r, row := range c.rows {
				copy(ids[int64(r+1)*c.seq-int64(len(row)):], row)
			}
		}, batch, c.seq)
	case "position_ids":
		if !c.masked {
			t, err = aten.FillInt64s(func(ids []int64) {
				for i := range ids {
					ids[i] = c.past + int64(i)
				}
			}, 1, c.seq)
			break
		}
		t, err = aten.FillInt64s(func(ids []int64) {
			for r := range c.rows {
				next := int64(0)
				for i, real := range c.real[r][:total] {
					if int64(i) >= c.past {
						ids[int64(r)*c.seq+int64(i)-c.past] = max(next, 1) - 1
						if real {
							ids[int64(r)*c.seq+int64(i)-c.past] = next
						}
					}
					if real {
						next++
					}
				}
			}
		}, batch, c.seq)
	case "attention_mask":
		// a query sees the real tokens up to itself, and itself, so that padding stays finite
		t, err = aten.FillBools(func(mask []bool) {
			for r := range c.rows {
				for q := range c.seq {
					at := (int64(r)*c.seq + q) * total
					copy(mask[at:at+c.past+q], c.real[r])
					mask[at+c.past+q] = true
				}
			}
		}, batch, 1, c.seq, total)
	default:
		if t, ok := c.tensors[name]; ok {
			return value{tensor: t}, nil
		}
		return value{}, fault.New(fault.Internal, "the model asks for an input %q", name)
	}
	if err != nil {
		return value{}, err
	}
	t, err = c.model.place(t, t.DType())
	return value{tensor: t}, err
}
