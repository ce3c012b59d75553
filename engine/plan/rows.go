package plan

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Rows: several invokes share a forward pass, and each sees a copy of its own part of an activation.
// What it changes there is written back before the pass moves on.

type copyKey struct {
	invoke int32
	slot   Slot
}

// rowCopy is an invoke's own copy of its part of an activation.
type rowCopy struct {
	invoke int32
	base   Slot // the activation
	slot   Slot // the copy
	shape  graph.Shape
	dirty  bool
	by     graph.ID // the user's node that changed it last
	stale  bool     // another invoke changed the same rows since
}

// view is the value of a model node as an invoke sees it: the tensor itself where the invoke is the
// whole batch and nobody else looks at it, else a copy of its part, one a value.
func (s *Plan) view(p *pass, invoke int32, id graph.ID) (Slot, error) {
	slot, err := s.resolve(p, id)
	if err != nil {
		return NoSlot, err
	}
	if s.othersChanged(p, invoke) {
		s.flush(p)
		slot = p.env[id]
	}
	if c := s.copyOf(p, invoke, slot); c != nil {
		return c.slot, nil
	}
	s.flush(p) // so that edits of others on the same rows show
	slot = p.env[id]
	f := &s.forwards[p.forward]
	e := s.extents[invoke]
	if e.covers(f) && s.alone(invoke) {
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

// alone reports whether no other invoke and no edit looks at the rows of an invoke's forward pass: it may be
// handed the activations themselves.
func (s *Plan) alone(invoke int32) bool {
	for i := range s.forwardOf {
		if i != int(invoke) && s.forwardOf[i] == s.forwardOf[invoke] {
			return false
		}
	}
	return true
}

// othersChanged reports whether other invokes have changed rows that this one sees, and not written them back.
func (s *Plan) othersChanged(p *pass, invoke int32) bool {
	return p.dirty && slices.ContainsFunc(p.order, func(c *rowCopy) bool {
		return c.dirty && !c.stale && c.invoke != invoke && s.overlap(c.invoke, invoke)
	})
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
		// Invokes of a hosted model share a pass with their edits alone, so that they see all of it.
		if !s.models.Hosted && c.shape.Find(graph.DimBatch) < 0 && !p.spread[c.base] {
			s.rebase(p, c.base, s.spreadRows(p, c.base))
		}
		for _, base := range s.sameFor(p, c.invoke, c.base) {
			if s.gone(base) {
				continue
			}
			foreign := p.foreign[base]
			if foreign { // the user may hold it, or it may be an expanded view: edit a copy
				own := s.emit(Instr{Op: OpClone, Args: []graph.Arg{graph.Ref(base)}, Out: s.slot(), Mode: s.mode, Fresh: true})
				p.spread[own] = p.spread[base]
				s.rebase(p, base, own)
				base = own
			}
			w := s.extents[c.invoke].window(f, c.shape)
			if p.ownRows(base, c.shape) {
				w.BatchAxis = 0
			}
			s.putFor(c, Instr{Op: OpPut, Args: []graph.Arg{graph.Ref(base), graph.Ref(c.slot)}, Window: w, Out: NoSlot, Mode: s.mode, Mutate: true})
			if foreign && s.models.Hosted {
				s.giveInstead(p, base)
			}
			// an overlapping invoke that copied the old rows takes new ones when it looks again
			for key, other := range p.copies {
				if other != c && key.slot == base && s.overlap(c.invoke, key.invoke) && key.invoke != c.invoke {
					p.forget(key)
				}
			}
		}
	}
}

// putFor writes a copy back for the line that changed it, wherever the pass is by then: if the rows do not fit any more it
// is that line's doing, and nobody else's.
func (s *Plan) putFor(c *rowCopy, in Instr) {
	now := s.node
	s.node = c.by
	s.emit(in)
	s.node = now
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

// soil notes that everything a value changed by an invoke may share storage with has changed. Other
// invokes' rows do not feel it: to them the change comes before or after their whole pass.
func (s *Plan) soil(p *pass, invoke int32, id graph.ID) {
	s.val[id].Refs(func(changed Slot) {
		group := s.alias.find(changed)
		for _, c := range p.order {
			if c.invoke == invoke && s.alias.find(c.slot) == group {
				c.dirty, c.by, p.dirty = true, s.node, true
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
