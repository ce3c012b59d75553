package plan

import (
	"slices"
	"strconv"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Models gives the two variants of a model's forward pass. Both have the same access points in
// the same order.
type Models struct {
	Causal, Masked *graph.Model
}

func (m Models) of(f *Forward) *graph.Model {
	if f.Masked {
		return m.Masked
	}
	return m.Causal
}

// liveNodes says which of the user's nodes anyone can observe.
func liveNodes(g *graph.Graph) []bool {
	live := make([]bool, len(g.Nodes))
	for n := len(g.Nodes) - 1; n >= 0; n-- {
		node := &g.Nodes[n]
		live[n] = live[n] || node.Kind == graph.KindSave || node.Kind == graph.KindWrite || mutated(node) != nil ||
			node.Kind == graph.KindCall && isRandom(node.Op)
		if live[n] {
			node.Refs(func(id graph.ID) { live[id] = true })
		}
	}
	return live
}

// pass is the state of one forward pass while it is spliced.
type pass struct {
	forward  int
	model    *graph.Model
	env      []Slot // by model node: where its value is
	cursor   int    // model nodes before it have been placed
	lastCall int    // the last one placed that computes
	movedBy  graph.ID
	inputs   map[string]Slot
	copies   map[copyKey]*rowCopy
	order    []*rowCopy // copies in the order they were made
	links    []link
	dirty    bool
	spread   map[Slot]bool // values computed from one that all rows shared and that now has a row each
	foreign  map[Slot]bool // values of the user's that were assigned to an access point as they are
}

type copyKey struct {
	invoke int32
	slot   Slot
}

// bound is the value that an invoke assigned to an access point last.
type bound struct {
	invoke int32
	mark   graph.ID
	origin
}

// rowCopy is an invoke's own copy of its part of an activation.
type rowCopy struct {
	invoke int32
	base   Slot // the activation
	slot   Slot // the copy
	shape  graph.Shape
	dirty  bool
	stale  bool // another invoke changed the same rows since
}

// origin is an activation that a user's value may be a view of.
type origin struct {
	pass  *pass
	slot  Slot // what the user was handed
	ready int  // model nodes from here on run after it
}

// placeReady places what can be placed where the forward passes stand.
func (s *Plan) placeReady() error {
	for progress := true; progress; {
		progress = false
		for i := range s.queues {
			for len(s.queues[i]) > 0 {
				n, p := s.queues[i][0], s.passes[s.extents[i].forward]
				need, err := s.needs(p, n)
				if err != nil {
					return locate(err, s.g, n)
				}
				if need > p.cursor || !s.ready(n) {
					break
				}
				if err := s.place(p, n); err != nil {
					return locate(err, s.g, n)
				}
				s.queues[i] = s.queues[i][1:]
				s.done[n] = true
				progress = true
			}
		}
	}
	return nil
}

// next chooses the pass to advance, as far as the first of the invokes that drive it needs; nil where
// there is none. A pass that nobody waits in goes first: in the others an invoke may yet have to write
// where the pass stands, once it has the value it waits for.
func (s *Plan) next(drives []bool) (next *pass, end int, err error) {
	for _, p := range s.passes {
		driven, blocked, waiting := false, false, -1
		for i := range s.queues {
			if len(s.queues[i]) == 0 || s.extents[i].forward != p.forward {
				continue
			}
			n := s.queues[i][0]
			need, err := s.needs(p, n)
			if err != nil {
				return nil, 0, locate(err, s.g, n)
			}
			if need <= p.cursor {
				blocked = true
				continue
			}
			driven = driven || drives[i]
			if waiting < 0 || need < waiting {
				waiting = need
			}
		}
		if driven && !blocked {
			return p, waiting, nil
		}
		if driven && next == nil {
			next, end = p, waiting
		}
	}
	return next, end, nil
}

// ready reports whether all values a node uses have been placed.
func (s *Plan) ready(n int) bool {
	ok := true
	s.g.Nodes[n].Refs(func(id graph.ID) { ok = ok && s.done[id] })
	for _, id := range s.waits[n] {
		ok = ok && s.done[id]
	}
	return ok
}

// needs is how far the pass must have come before node n can be placed: a model node's number.
func (s *Plan) needs(p *pass, n int) (int, error) {
	node := &s.g.Nodes[n]
	if node.Kind != graph.KindRead && node.Kind != graph.KindWrite {
		return 0, nil
	}
	point, err := accessPoint(p.model, node)
	if err != nil {
		return 0, err
	}
	if node.Kind == graph.KindWrite && point < s.reach[node.Invoke] {
		return 0, s.tooLate(node, s.reacher[node.Invoke])
	}
	if point > s.reach[node.Invoke] {
		s.reach[node.Invoke], s.reacher[node.Invoke] = point, n
	}
	return pointReady(&p.model.Points[point]), nil
}

func (s *Plan) tooLate(node *graph.Node, by int) error {
	err := fault.New(fault.OutOfOrder, "%s has already run when this line writes to it", describe(node.Path, node.Port))
	if by >= 0 {
		other := &s.g.Nodes[by]
		err.Other = s.g.PosOf(other)
		err.Message += ": an earlier line went on to " + describe(other.Path, other.Port)
	}
	return err.WithHint("Move the write up, before the line that uses the later module, or use a second trace.")
}

func describe(path string, port graph.Port) string {
	side := [...]string{"the input of ", "the output of ", "the gradient of "}[port]
	if path == "" {
		return side + "the model"
	}
	return side + path
}

// pointReady is the first model node that runs after an access point's value exists.
func pointReady(p *graph.Point) int {
	ready := int(p.At)
	p.Tree.Refs(func(id graph.ID) { ready = max(ready, int(id)+1) })
	return ready
}

// advance places the model's nodes up to (not including) end.
func (s *Plan) advance(p *pass, end int) error {
	for ; p.cursor < end; p.cursor++ {
		n := &p.model.Nodes[p.cursor]
		switch n.Kind {
		case graph.KindParam, graph.KindInput: // placed when first used
		case graph.KindMark:
			if _, err := s.resolve(p, graph.ID(p.cursor)); err != nil {
				return err
			}
		default:
			s.flush(p)
			if err := s.compute(p, graph.ID(p.cursor), p.env); err != nil {
				return err
			}
			p.lastCall, p.movedBy = p.cursor, s.furthest(p)
		}
	}
	return nil
}

// furthest is the user's node that named the furthest access point of a pass.
func (s *Plan) furthest(p *pass) graph.ID {
	best, by := -1, graph.NoID
	for i := range s.reach {
		if s.extents[i].forward == p.forward && s.reach[i] > best {
			best, by = s.reach[i], graph.ID(s.reacher[i])
		}
	}
	return by
}

// resolve gives the slot of a model node's value, placing what it takes to have it.
func (s *Plan) resolve(p *pass, id graph.ID) (Slot, error) {
	switch p.env[id] {
	case NoSlot:
	case lost:
		return NoSlot, ErrRestart
	default:
		return p.env[id], nil
	}
	n := &p.model.Nodes[id]
	switch n.Kind {
	case graph.KindParam:
		slot, ok := s.params[n.Op]
		if !ok {
			slot = s.source(Source{Kind: graph.KindParam, Name: n.Op})
			s.params[n.Op] = slot
		}
		p.env[id] = slot
	case graph.KindInput:
		slot, ok := p.inputs[n.Op]
		if !ok {
			slot = s.source(Source{Kind: graph.KindInput, Name: n.Op, Forward: p.forward})
			p.inputs[n.Op] = slot
		}
		p.env[id] = slot
	case graph.KindMark:
		slot, err := s.resolve(p, n.Args[0].Ref)
		if err != nil {
			return NoSlot, err
		}
		p.env[id] = slot
	default:
		if err := s.compute(p, id, p.env); err != nil {
			return NoSlot, err
		}
	}
	return p.env[id], nil
}

// compute places a model node that computes, with its arguments looked up in env first.
func (s *Plan) compute(p *pass, id graph.ID, env []Slot) error {
	n := &p.model.Nodes[id]
	var failed error
	look := func(ref graph.ID) graph.Arg {
		if env[ref] >= 0 {
			return graph.Ref(env[ref])
		}
		slot, err := s.resolve(p, ref)
		if err != nil {
			failed = err
		}
		return graph.Ref(slot)
	}
	in := Instr{Out: s.slot(), Mode: s.mode, Node: graph.NoID, Path: n.Path}
	in.Args, in.Kwargs = substitute(n.Args, look), substituteKw(n.Kwargs, look)
	switch n.Kind {
	case graph.KindCall:
		in.Op, in.Name, in.Fresh = OpCall, n.Op, isFresh(n.Op)
	case graph.KindItem:
		in.Op = OpItem
	case graph.KindIndex:
		in.Op = OpIndex
	default:
		return fault.New(fault.Internal, "model node %d has kind %d, which computes nothing", id, n.Kind)
	}
	env[id] = in.Out
	in.refs(func(r Slot) {
		if p.spread[r] {
			p.spread[in.Out] = true
		}
	})
	s.emit(in)
	return failed
}

// place places one of the user's nodes.
func (s *Plan) place(p *pass, n int) error {
	node := &s.g.Nodes[n]
	s.node = graph.ID(n)
	defer func() { s.node = graph.NoID }()
	value := func(id graph.ID) graph.Arg { return s.val[id] }
	switch node.Kind {
	case graph.KindRead:
		return s.read(p, n)
	case graph.KindWrite:
		return s.write(p, n)
	case graph.KindConst:
		s.val[n] = graph.Ref(s.constant(node.Index))
	case graph.KindSave:
		tree := substitute(node.Args, value)
		s.out.Saved = append(s.out.Saved, Saved{Node: graph.ID(n), Value: tree[0]})
	case graph.KindItem:
		of, key := s.val[node.Args[0].Ref], node.Args[1]
		if of.Kind != graph.ArgRef {
			item, err := pick(&of, &key)
			if err != nil {
				return err
			}
			s.val[n] = *item
			s.inherit(n)
			return nil
		}
		s.val[n] = graph.Ref(s.emit(Instr{Op: OpItem, Args: []graph.Arg{of, key}, Out: s.slot(), Mode: node.Mode}))
		s.inherit(n)
	case graph.KindCall, graph.KindIndex, graph.KindSetIndex:
		in := Instr{Mode: node.Mode, Path: node.Path, Args: substitute(node.Args, value), Kwargs: substituteKw(node.Kwargs, value)}
		switch node.Kind {
		case graph.KindCall:
			in.Op, in.Name, in.Fresh = OpCall, node.Op, isFresh(node.Op)
		case graph.KindIndex:
			in.Op = OpIndex
		default:
			in.Op = OpSetIndex
		}
		if arg := mutated(node); arg != nil {
			in.Mutate = true
			arg.Refs(func(id graph.ID) { s.guard(id) })
			defer arg.Refs(func(id graph.ID) { s.soil(p, node.Invoke, id) })
		}
		in.Out = NoSlot
		if node.Kind != graph.KindSetIndex {
			in.Out = s.slot()
			s.val[n] = graph.Ref(in.Out)
		}
		s.emit(in)
		s.inherit(n)
	case graph.KindModule:
		return s.module(p, n)
	default:
		return fault.New(fault.Internal, "node %d has kind %d, which cannot be placed", n, node.Kind)
	}
	return nil
}

// read hands the invoke the activation at an access point.
func (s *Plan) read(p *pass, n int) error {
	node := &s.g.Nodes[n]
	mark, err := s.leaf(p, node)
	if err != nil {
		return err
	}
	seen, err := s.view(p, node.Invoke, mark)
	if err != nil {
		return err
	}
	s.val[n] = graph.Ref(seen)
	point, _ := accessPoint(p.model, node)
	s.origins[n] = []origin{{pass: p, slot: seen, ready: pointReady(&p.model.Points[point])}}
	return nil
}

// leaf finds the mark that a Read or Write names.
func (s *Plan) leaf(p *pass, node *graph.Node) (graph.ID, error) {
	if node.Step != 0 {
		return graph.NoID, fault.New(fault.OutOfOrder, "%s runs once in a forward pass; call %d was asked for",
			describe(node.Path, node.Port), node.Step)
	}
	if _, err := accessPoint(p.model, node); err != nil {
		return graph.NoID, err
	}
	mark := markOf(p.model, node)
	if mark == graph.NoID {
		return mark, fault.New(fault.ModulePath, "%s has no tensor %q", describe(node.Path, node.Port), node.Leaf)
	}
	return mark, nil
}

// view is the value of a model node as an invoke sees it: the tensor itself where the invoke is
// the whole batch, else a copy of its part, one a value.
func (s *Plan) view(p *pass, invoke int32, id graph.ID) (Slot, error) {
	slot, err := s.resolve(p, id)
	if err != nil {
		return NoSlot, err
	}
	if c := s.copyOf(p, invoke, slot); c != nil {
		return c.slot, nil
	}
	s.flush(p) // so that edits of others on the same rows show
	slot = p.env[id]
	f := &s.forwards[p.forward]
	e := s.extents[invoke]
	if e.covers(f) {
		return slot, nil
	}
	shape := p.model.Nodes[id].Shape
	c := &rowCopy{invoke: invoke, base: slot, shape: shape}
	w := e.window(f, shape)
	if p.ownRows(slot, shape) { // its rows are equal but for edits of other invokes
		w.BatchAxis, w.Rows = 0, 1
	}
	c.slot = s.emit(Instr{Op: OpRows, Args: []graph.Arg{graph.Ref(slot)}, Window: w, Out: s.slot(), Mode: s.mode, Fresh: true})
	p.copies[copyKey{invoke, slot}] = c
	p.order = append(p.order, c)
	return c.slot, nil
}

// link is two activations that were one tensor until an invoke replaced its rows of one of them:
// for invokes that have other rows they still are.
type link struct {
	a, b   Slot
	except int32
}

// sameFor gives the activations that are one tensor for an invoke, slot among them.
func (s *Plan) sameFor(p *pass, invoke int32, slot Slot) []Slot {
	out := []Slot{slot}
	for i := 0; i < len(out); i++ {
		for _, l := range p.links {
			if s.overlap(l.except, invoke) {
				continue
			}
			if l.a == out[i] && !slices.Contains(out, l.b) {
				out = append(out, l.b)
			}
			if l.b == out[i] && !slices.Contains(out, l.a) {
				out = append(out, l.a)
			}
		}
	}
	return out
}

// copyOf is the copy an invoke already has of an activation, or nil.
func (s *Plan) copyOf(p *pass, invoke int32, slot Slot) *rowCopy {
	for _, same := range s.sameFor(p, invoke, slot) {
		if c := p.copies[copyKey{invoke, same}]; c != nil {
			return c
		}
	}
	return nil
}

// flush writes changed copies back into the batch.
func (s *Plan) flush(p *pass) {
	if !p.dirty {
		return
	}
	p.dirty = false
	f := &s.forwards[p.forward]
	for _, c := range p.order {
		if !c.dirty || c.stale {
			continue
		}
		c.dirty = false
		if s.gone(c.base) { // nothing will look at these rows again
			continue
		}
		if c.shape.Find(graph.DimBatch) < 0 && !p.spread[c.base] {
			s.rebase(p, c.base, s.spreadRows(p, c.base))
		}
		for _, base := range s.sameFor(p, c.invoke, c.base) {
			if s.gone(base) {
				continue
			}
			if p.foreign[base] { // the user may hold it, or it may be an expanded view: edit a copy
				own := s.emit(Instr{Op: OpClone, Args: []graph.Arg{graph.Ref(base)}, Out: s.slot(), Mode: s.mode, Fresh: true})
				p.spread[own] = p.spread[base]
				s.rebase(p, base, own)
				base = own
			}
			w := s.extents[c.invoke].window(f, c.shape)
			if p.ownRows(base, c.shape) {
				w.BatchAxis = 0
			}
			s.emit(Instr{Op: OpPut, Args: []graph.Arg{graph.Ref(base), graph.Ref(c.slot)}, Window: w, Out: NoSlot, Mode: s.mode, Mutate: true})
			// an overlapping invoke that copied the old rows takes new ones when it looks again
			for key, other := range p.copies {
				if other != c && key.slot == base && s.overlap(c.invoke, key.invoke) && key.invoke != c.invoke {
					p.forget(key)
				}
			}
		}
	}
}

// ownRows reports whether a value that all rows would share has a row for each by now.
func (p *pass) ownRows(slot Slot, shape graph.Shape) bool {
	return p.spread[slot] && shape.Find(graph.DimBatch) < 0
}

func (s *Plan) overlap(a, b int32) bool {
	x, y := s.extents[a], s.extents[b]
	return x.row < y.row+y.rows && y.row < x.row+x.rows
}

// spreadRows copies a value that all rows share so that each row has its own.
func (s *Plan) spreadRows(p *pass, slot Slot) Slot {
	w := Window{Batch: s.forwards[p.forward].Batch()}
	out := s.emit(Instr{Op: OpSpread, Args: []graph.Arg{graph.Ref(slot)}, Window: w, Out: s.slot(), Mode: s.mode, Fresh: true})
	p.spread[out] = true
	return out
}

// rebase makes everything that named an activation's slot name another one.
func (s *Plan) rebase(p *pass, from, to Slot) {
	for k := range p.env {
		if p.env[k] == from {
			p.env[k] = to
		}
	}
	for i := range p.links {
		if p.links[i].a == from {
			p.links[i].a = to
		}
		if p.links[i].b == from {
			p.links[i].b = to
		}
	}
	for _, c := range p.order {
		if c.base == from {
			delete(p.copies, copyKey{c.invoke, from})
			c.base = to
			p.copies[copyKey{c.invoke, to}] = c
		}
	}
}

// write rebinds an access point for the rows of an invoke.
func (s *Plan) write(p *pass, n int) error {
	node := &s.g.Nodes[n]
	mark, err := s.leaf(p, node)
	if err != nil {
		return err
	}
	value := substitute(node.Args, func(id graph.ID) graph.Arg { return s.val[id] })[0]
	if value.Kind != graph.ArgRef {
		return fault.New(fault.Op, "%s holds a tensor and cannot become a plain value",
			describe(node.Path, node.Port)).WithHint("Assign a tensor, for example torch.full_like(old, value).")
	}
	point, _ := accessPoint(p.model, node)
	if p.lastCall >= pointReady(&p.model.Points[point]) {
		return s.tooLate(node, int(p.movedBy))
	}
	old, err := s.resolve(p, mark)
	if err != nil {
		return err
	}
	s.bound = slices.DeleteFunc(s.bound, func(b bound) bool { return b.invoke == node.Invoke && b.mark == mark })
	s.bound = append(s.bound, bound{node.Invoke, mark, origin{pass: p, slot: value.Ref, ready: pointReady(&p.model.Points[point])}})
	f := &s.forwards[p.forward]
	e := s.extents[node.Invoke]
	if e.covers(f) {
		if p.env[mark] != value.Ref {
			want := p.model.Nodes[mark].Shape.Concrete(f.Batch(), f.Seq)
			s.emit(Instr{Op: OpExpect, Args: []graph.Arg{value}, Want: want, Out: NoSlot, Mode: s.mode, Path: node.Path})
		}
		p.env[mark] = value.Ref
		p.foreign[value.Ref] = true
		return nil
	}
	if c := s.copyOf(p, node.Invoke, old); c != nil && c.slot == value.Ref {
		return nil // assigning back what was read
	}
	s.flush(p)
	old = p.env[mark]
	shape := p.model.Nodes[mark].Shape
	var fresh Slot
	if shape.Find(graph.DimBatch) < 0 && !p.spread[old] {
		fresh = s.spreadRows(p, old)
	} else {
		fresh = s.emit(Instr{Op: OpClone, Args: []graph.Arg{graph.Ref(old)}, Out: s.slot(), Mode: s.mode, Fresh: true})
		p.spread[fresh] = p.spread[old]
	}
	p.links = append(p.links, link{old, fresh, node.Invoke})
	w := e.window(f, shape)
	if p.ownRows(fresh, shape) {
		w.BatchAxis = 0
	}
	s.emit(Instr{Op: OpPut, Args: []graph.Arg{graph.Ref(fresh), value}, Window: w, Out: NoSlot, Mode: s.mode, Mutate: true,
		Want: shape.Concrete(e.rows, e.toks)})
	c := &rowCopy{invoke: node.Invoke, base: fresh, slot: value.Ref, shape: shape}
	p.copies[copyKey{node.Invoke, fresh}] = c
	p.order = append(p.order, c)
	p.env[mark] = fresh
	return nil
}

// inherit says that a node's value may be a view of whatever it may share storage with is a view of.
func (s *Plan) inherit(n int) {
	shares(&s.g.Nodes[n], func(id graph.ID) {
	next:
		for _, o := range s.origins[id] {
			for _, have := range s.origins[n] {
				if have == o {
					continue next
				}
			}
			s.origins[n] = append(s.origins[n], o)
		}
	})
}

// guard makes sure that a value about to be changed is not a view of an activation whose time has
// passed: the change would come too late to be felt.
func (s *Plan) guard(id graph.ID) {
	args := []graph.Arg{}
	var by []graph.ID
	late := func(o origin) {
		if o.pass.lastCall >= o.ready {
			args = append(args, graph.Ref(o.slot))
			by = append(by, o.pass.movedBy)
		}
	}
	for _, o := range s.origins[id] {
		late(o)
	}
	if len(s.origins[id]) == 0 { // no activation by itself, but it may have been assigned to one
		s.val[id].Refs(func(slot Slot) {
			for _, b := range s.bound {
				if s.alias.find(b.slot) == s.alias.find(slot) {
					late(b.origin)
				}
			}
		})
	}
	if len(args) == 0 {
		return
	}
	s.val[id].Refs(func(slot Slot) {
		s.emit(Instr{Op: OpGuard, Args: append([]graph.Arg{graph.Ref(slot)}, args...), Others: by, Out: NoSlot, Mode: s.mode})
	})
}

// soil notes that everything a value changed by an invoke may share storage with has changed. Other
// invokes' rows do not feel it: to them the change comes before or after their whole pass.
func (s *Plan) soil(p *pass, invoke int32, id graph.ID) {
	s.val[id].Refs(func(changed Slot) {
		group := s.alias.find(changed)
		for _, c := range p.order {
			if c.invoke == invoke && s.alias.find(c.slot) == group {
				c.dirty, p.dirty = true, true
			}
		}
		for key := range p.copies { // changed for the whole batch: copies of its rows are stale
			if s.alias.find(key.slot) == group {
				p.forget(key)
			}
		}
	})
}

// forget drops a copy whose rows have changed under it.
func (p *pass) forget(key copyKey) {
	p.copies[key].stale = true
	delete(p.copies, key)
}

// module calls a module of the model on the user's values: the part of the forward pass between
// its input and its output is placed once more, on them.
func (s *Plan) module(p *pass, n int) error {
	node := &s.g.Nodes[n]
	in, okIn := p.model.Point(node.Path, graph.PortInput)
	out, okOut := p.model.Point(node.Path, graph.PortOutput)
	if !okIn || !okOut {
		_, err := accessPoint(p.model, &graph.Node{Path: node.Path, Port: graph.PortOutput})
		if err == nil {
			err = fault.New(fault.ModulePath, "module %q cannot be called by itself", node.Path)
		}
		return err
	}
	env := make([]Slot, len(p.model.Nodes))
	for k := range env {
		env[k] = NoSlot
	}
	value := func(id graph.ID) graph.Arg { return s.val[id] }
	given := map[string]Slot{}
	put := func(leaf string, a graph.Arg) {
		leaves(leaf, &a, func(leaf string, a *graph.Arg) {
			if a.Kind == graph.ArgRef {
				given[leaf] = a.Ref
			}
		})
	}
	for i, a := range substitute(node.Args, value) {
		put("args."+strconv.Itoa(i), a)
	}
	for _, kw := range substituteKw(node.Kwargs, value) {
		put("kwargs."+kw.Name, kw.Arg)
	}
	if err := s.bindInputs(p, node, in, given, env); err != nil {
		return err
	}
	start, end := pointReady(&p.model.Points[in]), pointReady(&p.model.Points[out])
	for k := start; k < end; k++ {
		m := &p.model.Nodes[k]
		switch m.Kind {
		case graph.KindParam:
			slot, err := s.resolve(p, graph.ID(k))
			if err != nil {
				return err
			}
			env[k] = slot
		case graph.KindInput:
		case graph.KindMark:
			slot, err := s.inner(p, node.Invoke, m.Args[0].Ref, env, start)
			if err != nil {
				return err
			}
			env[k] = slot
		default:
			var failed error
			m.Refs(func(id graph.ID) {
				slot, err := s.inner(p, node.Invoke, id, env, start)
				if err != nil {
					failed = err
				}
				env[id] = slot
			})
			if failed != nil {
				return failed
			}
			if err := s.compute(p, graph.ID(k), env); err != nil {
				return err
			}
		}
	}
	tree := p.model.Points[out].Tree
	s.val[n] = substitute([]graph.Arg{tree}, func(id graph.ID) graph.Arg { return graph.Ref(env[id]) })[0]
	s.inherit(n)
	return nil
}

// bindInputs gives the marks of a module's inputs the user's values, by position or by name.
func (s *Plan) bindInputs(p *pass, node *graph.Node, in int, given map[string]Slot, env []Slot) error {
	tree := &p.model.Points[in].Tree
	used := 0
	bound := false
	tree.Refs(func(id graph.ID) {
		leaf := p.model.Nodes[id].Leaf
		slot, ok := given[leaf]
		if !ok && !bound { // the first input, given by position or by its name
			for _, alias := range []string{"args.0", "kwargs.hidden_states", "kwargs.input"} {
				if slot, ok = given[alias]; ok {
					break
				}
			}
		}
		if ok {
			env[id] = slot
			used++
			bound = true
		}
	})
	if used < len(given) || !bound {
		var want []string
		tree.Refs(func(id graph.ID) { want = append(want, p.model.Nodes[id].Leaf) })
		return fault.New(fault.Op, "module %q does not take these arguments", node.Path).
			WithHint("It takes the tensors %s.", strings.Join(want, ", "))
	}
	return nil
}

// inner is the value of a model node inside a module that is called by itself. Values from outside
// the module (masks, position embeddings) are those of the pass, cut to the invoke's part.
func (s *Plan) inner(p *pass, invoke int32, id graph.ID, env []Slot, start int) (Slot, error) {
	if env[id] != NoSlot {
		return env[id], nil
	}
	n := &p.model.Nodes[id]
	if int(id) < start && n.Kind == graph.KindMark {
		if slot, err := s.inner(p, invoke, n.Args[0].Ref, env, start); err == nil && env[n.Args[0].Ref] != NoSlot {
			return slot, nil
		}
	}
	if n.Kind == graph.KindParam || n.Shape == nil {
		return s.resolve(p, id)
	}
	return s.view(p, invoke, id)
}

func (s *Plan) emit(in Instr) Slot {
	in.Node = s.node
	in.shares(func(r Slot) { s.alias.join(in.Out, r) })
	s.out.Instrs = append(s.out.Instrs, in)
	return in.Out
}

func (s *Plan) slot() Slot {
	s.alias = append(s.alias, Slot(s.out.Slots))
	s.borrowed = append(s.borrowed, false)
	s.out.Slots++
	return Slot(s.out.Slots - 1)
}

func (s *Plan) source(src Source) Slot {
	src.Slot = s.slot()
	s.sources = append(s.sources, src)
	s.borrowed[src.Slot] = src.Kind != graph.KindInput
	return src.Slot
}

func (s *Plan) constant(index int32) Slot {
	if slot, ok := s.consts[index]; ok {
		return slot
	}
	s.consts[index] = s.source(Source{Kind: graph.KindConst, Index: index})
	return s.consts[index]
}

// substitute copies arguments with their references replaced.
func substitute(args []graph.Arg, f func(graph.ID) graph.Arg) []graph.Arg {
	out := make([]graph.Arg, len(args))
	for i := range args {
		out[i] = args[i]
		switch args[i].Kind {
		case graph.ArgRef:
			out[i] = f(args[i].Ref)
		case graph.ArgList, graph.ArgTuple, graph.ArgDict, graph.ArgSlice:
			out[i].L = substitute(args[i].L, f)
		}
	}
	return out
}

func substituteKw(kwargs []graph.Kwarg, f func(graph.ID) graph.Arg) []graph.Kwarg {
	if len(kwargs) == 0 {
		return nil
	}
	out := make([]graph.Kwarg, len(kwargs))
	for i := range kwargs {
		out[i] = graph.Kwarg{Name: kwargs[i].Name, Arg: substitute([]graph.Arg{kwargs[i].Arg}, f)[0]}
	}
	return out
}

// leaves calls f for each leaf of a tree, named by its keys joined by dots.
func leaves(name string, a *graph.Arg, f func(string, *graph.Arg)) {
	switch a.Kind {
	case graph.ArgList, graph.ArgTuple:
		for i := range a.L {
			leaves(join(name, strconv.Itoa(i)), &a.L[i], f)
		}
	case graph.ArgDict:
		for i := range a.L {
			leaves(join(name, a.Keys[i]), &a.L[i], f)
		}
	default:
		f(name, a)
	}
}

func join(name, key string) string {
	if name == "" {
		return key
	}
	return name + "." + key
}

// pick takes an element out of a tree.
func pick(of, key *graph.Arg) (*graph.Arg, error) {
	switch {
	case key.Kind == graph.ArgInt:
		i := key.I
		if i < 0 {
			i += int64(len(of.L))
		}
		if i >= 0 && i < int64(len(of.L)) {
			return &of.L[i], nil
		}
	case key.Kind == graph.ArgString && of.Kind == graph.ArgDict:
		for i, k := range of.Keys {
			if k == key.S {
				return &of.L[i], nil
			}
		}
	}
	return nil, fault.New(fault.Op, "there is no element %s in %s", argText(key), argText(of))
}
