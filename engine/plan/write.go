package plan

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Writes: what an invoke puts into the place of an activation, and changes that come too late.

// bound is the value that an invoke assigned to an access point last.
type bound struct {
	invoke int32
	mark   graph.ID
	origin
}

// origin is an activation that a user's value may be a view of.
type origin struct {
	pass  *pass
	slot  Slot // what the user was handed
	ready int  // model nodes from here on run after it
}

// write rebinds an access point for the rows of an invoke.
func (s *Plan) write(p *pass, n int) error {
	node := &s.g.Nodes[n]
	mark, err := s.leaf(p, node)
	if err != nil {
		return err
	}
	value := graph.ReplacedArgs(node.Args, func(id graph.ID) graph.Arg { return s.val[id] })[0]
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
		if s.models.Hosted {
			s.give(p, mark, value.Ref)
		} else if p.env[mark] != value.Ref {
			want := p.model.Nodes[mark].Shape.Concrete(f.Batch(), f.Seq)
			s.emit(Instr{Op: OpExpect, Args: []graph.Arg{value}, Want: want, Out: NoSlot, Mode: s.mode, Path: node.Path,
				Shape: p.model.Nodes[mark].Shape, Of: p.forward})
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

// give hands a value over that is to stand at an access point of a hosted model.
func (s *Plan) give(p *pass, mark graph.ID, slot Slot) {
	m := &p.model.Nodes[mark]
	args := []graph.Arg{graph.Ref(slot)}
	if fetch := p.env[p.model.Nodes[m.Args[0].Ref].Args[0].Ref]; fetch >= 0 { // so that the pass stops there; else it does
		args = append(args, graph.Ref(fetch))
	}
	s.emit(Instr{Op: OpGive, Args: args, Out: NoSlot, Mode: s.mode,
		Place: Place{Forward: p.forward, Point: int(m.Index), Leaf: int(m.Step)}})
}

// giveInstead hands a copy over that has taken the place of what was given to where the pass of a hosted model stands.
func (s *Plan) giveInstead(p *pass, slot Slot) {
	for k := range p.env {
		m := &p.model.Nodes[k]
		if p.env[k] == slot && m.Kind == graph.KindMark && p.lastCall < pointReady(&p.model.Points[m.Index]) {
			s.give(p, graph.ID(k), slot)
		}
	}
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
