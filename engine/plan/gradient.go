package plan

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Gradients: which values autograd follows, and the backward passes of a program.
//
// Nothing of a model requires gradients by itself. What a program asks the gradient of is followed from
// where it was made, so that the model's own operators from there on are recorded by autograd and those
// before it are not. An invoke with such a value has a forward pass of its own: what it reads is then the
// activation itself, of which the rest of the model is computed.
//
// A backward pass whose gradients are only read is one instruction, at the first line that reads one. Where
// they are changed, or where the program has not been written to the pass's end, each read is a pass down
// to what it reads, in which what was changed so far is what it is now; and the whole pass comes at its end.

// gradients is what a program says of them so far.
type gradients struct {
	follow map[graph.ID]wish      // values that autograd follows
	bases  map[base]graph.ID      // activations among them, and the node that asks
	passes map[graph.ID]*backward // by the node that begins them
	edits  map[graph.ID][]graph.ID
	// by slot: autograd follows what it holds
	followed map[Slot]bool
}

// wish is why autograd follows a value.
type wish struct {
	by  graph.ID // the node that asks
	how int64    // graph.TrackRead and kin
}

// base is an activation as an invoke sees it, whichever access point names it.
type base struct {
	invoke int32
	node   graph.ID // of the model
}

// backward is a backward pass.
type backward struct {
	reads   []graph.ID // Grad nodes, in program order
	changes []graph.ID // nodes that change a gradient of it
	end     graph.ID   // its End node, or NoID as long as there is none
	begun   bool       // something of it has been placed
	pieces  bool       // it is done in pieces, since gradients change on the way
	found   map[graph.ID]graph.Arg
}

// readGradients brings what is known of gradients up to the program.
func (s *Plan) readGradients() error {
	gr := &s.gradients
	any := len(gr.passes) > 0 || len(gr.follow) > 0
	for n := range s.g.Nodes {
		any = any || s.g.Nodes[n].Kind >= graph.KindTrack
	}
	if !any {
		return nil
	}
	old := gr.passes
	gr.follow, gr.bases, gr.passes, gr.edits = map[graph.ID]wish{}, map[base]graph.ID{}, map[graph.ID]*backward{}, map[graph.ID][]graph.ID{}
	if gr.followed == nil {
		gr.followed = map[Slot]bool{}
	}
	follow := func(id graph.ID, by int, how int64) {
		w, ok := gr.follow[id]
		if !ok {
			w.by = graph.ID(by)
		}
		w.how = max(w.how, how)
		gr.follow[id] = w
	}
	var alias aliases
	open := 0
	for n := range s.g.Nodes {
		node, id := &s.g.Nodes[n], graph.ID(n)
		switch node.Kind {
		case graph.KindTrack:
			follow(node.Args[0].Ref, n, node.Args[1].I)
		case graph.KindBackward:
			b := &backward{end: graph.NoID, found: map[graph.ID]graph.Arg{}}
			if before := old[id]; before != nil {
				b.begun, b.pieces, b.found = before.begun, before.pieces, before.found
			}
			gr.passes[id] = b
			if node.Args[5].I != 0 {
				open++
			} else {
				b.end = id
			}
		case graph.KindEnd:
			gr.passes[node.Args[0].Ref].end = id
			open--
		case graph.KindGrad:
			follow(node.Args[0].Ref, n, graph.TrackRead)
			b := gr.passes[node.Args[1].Ref]
			b.reads = append(b.reads, id)
			if b.end != graph.NoID {
				return locate(fault.New(fault.OutOfOrder, "this gradient is asked for when its backward pass has ended").
					WithHint("Write the line into the block of the pass."), s.g, n)
			}
		case graph.KindSetGrad:
			follow(node.Args[0].Ref, n, graph.TrackRead)
			b := gr.passes[node.Args[1].Ref]
			b.changes = append(b.changes, id)
		default:
			arg := mutated(node)
			if arg == nil || open == 0 {
				continue
			}
			if alias == nil {
				alias = sharing(s.g, s.models.Causal)
			}
			arg.Refs(func(changed graph.ID) {
				for _, b := range gr.passes {
					if b.end != graph.NoID {
						continue
					}
					for _, read := range b.reads {
						if alias.find(read) == alias.find(changed) {
							b.changes = append(b.changes, id)
							gr.edits[id] = append(gr.edits[id], read)
						}
					}
				}
			})
		}
	}
	for id, w := range gr.follow {
		node := &s.g.Nodes[id]
		if node.Kind == graph.KindRead {
			if mark := markOf(s.models.Causal, node); mark != graph.NoID {
				gr.bases[base{node.Invoke, baseOf(s.models.Causal, mark)}] = w.by
			}
		}
		if s.done[id] && !s.followsValue(id) && !s.models.Hosted {
			return ErrRestart
		}
	}
	return nil
}

// baseOf is the model node whose value a mark stands for.
func baseOf(m *graph.Model, id graph.ID) graph.ID {
	for m.Nodes[id].Kind == graph.KindMark {
		id = m.Nodes[id].Args[0].Ref
	}
	return id
}

// followsValue reports whether autograd follows the value of a node that has been placed.
func (s *Plan) followsValue(id graph.ID) bool {
	ok := true
	s.val[id].Refs(func(slot Slot) { ok = ok && s.gradients.followed[slot] })
	return ok
}

// followsIn reports whether autograd follows values of an invoke, so that it needs a forward pass of its own.
func (s *Plan) followsIn(invoke int) bool {
	for id := range s.gradients.follow {
		if node := &s.g.Nodes[id]; int(node.Invoke) == invoke {
			return true
		}
	}
	return false
}

// follow lets autograd follow what a slot holds.
func (s *Plan) follow(slot Slot, w wish) {
	if s.gradients.followed[slot] && w.how == graph.TrackRead {
		return
	}
	s.gradients.followed[slot] = true
	defer func(before graph.ID) { s.node = before }(s.node)
	s.node = w.by
	s.emit(Instr{Op: OpTrack, Args: []graph.Arg{graph.Ref(slot), graph.Int(w.how), graph.Bool(s.borrowed[slot])}, Out: NoSlot, Mode: s.mode})
}

// followMark follows an activation that a pass has just come to, where one of its invokes asks for that.
func (s *Plan) followMark(p *pass, mark graph.ID) {
	if len(s.gradients.bases) == 0 {
		return
	}
	id := baseOf(p.model, mark)
	for invoke := range s.forwardOf {
		in := int32(invoke)
		by, ok := s.gradients.bases[base{in, id}]
		if !ok || s.extents[invoke].forward != p.forward {
			continue
		}
		if s.extents[invoke].covers(&s.forwards[p.forward]) && s.alone(in) && !s.borrowed[p.env[mark]] {
			fresh := !s.gradients.followed[p.env[mark]]
			s.follow(p.env[mark], wish{by: by})
			if s.models.Hosted && fresh {
				s.give(p, mark, p.env[mark])
			}
		}
	}
}

// followNode follows the value of a node of the user's that has just been placed.
func (s *Plan) followNode(p *pass, n int) error {
	id, node := graph.ID(n), &s.g.Nodes[n]
	w, asked := s.gradients.follow[id]
	if node.Kind == graph.KindRead && !asked && len(s.gradients.bases) > 0 {
		// the same activation by another name: views of it are to be followed, too
		if mark := markOf(p.model, node); mark != graph.NoID {
			w.by, asked = s.gradients.bases[base{node.Invoke, baseOf(p.model, mark)}]
		}
	}
	if !asked {
		return nil
	}
	value := s.val[n]
	if value.Kind != graph.ArgRef {
		return fault.New(fault.Op, "only a tensor has a gradient")
	}
	slot := value.Ref
	if node.Kind == graph.KindRead && !s.gradients.followed[slot] {
		for _, c := range p.order {
			if c.slot == slot { // its own copy, of which the model is to be computed
				c.dirty, p.dirty = true, true
			}
		}
	}
	s.follow(slot, w)
	return nil
}

// begin, for a backward pass: what it starts from and with.
func (s *Plan) backward(id graph.ID, targets []graph.Arg, last bool) Instr {
	node := &s.g.Nodes[id]
	value := func(id graph.ID) graph.Arg { return s.val[id] }
	list := func(a graph.Arg) graph.Arg {
		a = a.Replaced(value)
		switch a.Kind {
		case graph.ArgNone:
			return graph.List()
		case graph.ArgRef:
			return graph.List(a)
		}
		return a
	}
	retain, create, fill := node.Args[2].I != 0, node.Args[3].I != 0, node.Args[4].I != 0
	return Instr{Op: OpBackward, Args: []graph.Arg{list(node.Args[0]), list(node.Args[1]), graph.List(targets...)}, Out: NoSlot,
		Mode: node.Mode, Pass: Pass{Node: id, Retain: retain || !last, Create: create, Fill: fill && last, Last: last}}
}

// placeBackward places a pass that no line stands in.
func (s *Plan) placeBackward(n int) {
	b := s.gradients.passes[graph.ID(n)]
	if b.end == graph.ID(n) {
		b.begun = true
		s.emit(s.backward(graph.ID(n), nil, true))
	}
}

// placeGrad places the read of a gradient, and with it those of others that the same work gives.
func (s *Plan) placeGrad(p *pass, n int) error {
	id := graph.ID(n)
	of := s.g.Nodes[n].Args[1].Ref
	b := s.gradients.passes[of]
	if !b.begun {
		b.pieces = b.end == graph.NoID || len(b.changes) > 0
	}
	b.begun = true
	if _, ok := b.found[id]; !ok {
		next := graph.ID(len(s.g.Nodes)) // the line that changes a gradient next
		for _, change := range b.changes {
			if change > id {
				next = min(next, change)
			}
		}
		var reads []graph.ID
		var targets []graph.Arg
		for _, read := range b.reads {
			if _, ok := b.found[read]; ok || read < id || read > next {
				continue
			}
			if target := s.g.Nodes[read].Args[0].Ref; s.placedEarly(p, target) {
				reads = append(reads, read)
				targets = append(targets, s.val[target])
			}
		}
		last := !b.pieces && len(reads) == len(b.reads)-len(b.found)
		if !b.pieces && !last {
			b.pieces = true
		}
		in := s.backward(of, targets, last)
		in.Out = s.slot()
		in.Others = reads
		s.emit(in)
		for i, read := range reads {
			b.found[read] = graph.Ref(s.emit(Instr{Op: OpItem, Args: []graph.Arg{graph.Ref(in.Out), graph.Int(int64(i))},
				Out: s.slot(), Mode: in.Mode}))
		}
	}
	s.val[n] = b.found[id]
	return nil
}

// placedEarly places an activation that is read behind the line that needs it now, if it is there, and
// reports whether the value of the node is there.
func (s *Plan) placedEarly(p *pass, id graph.ID) bool {
	if s.done[id] {
		return true
	}
	node := &s.g.Nodes[id]
	if node.Kind != graph.KindRead || s.extents[node.Invoke].forward != p.forward {
		return false
	}
	if need, err := s.needs(p, int(id)); err != nil || need > p.cursor {
		return false
	}
	if err := s.place(p, int(id)); err != nil {
		return false
	}
	s.done[id] = true
	for i, queue := range s.queues {
		s.queues[i] = slices.DeleteFunc(queue, func(n int) bool { return n == int(id) })
	}
	return true
}

// placeSetGrad places a line that replaces a gradient.
func (s *Plan) placeSetGrad(n int) {
	node := &s.g.Nodes[n]
	s.changeGrad(node.Args[1].Ref, node.Args[0].Ref, s.val[node.Args[2].Ref])
}

// changedGrads notes the gradients that a line has changed in place.
func (s *Plan) changedGrads(n int) {
	for _, read := range s.gradients.edits[graph.ID(n)] {
		s.changeGrad(s.g.Nodes[read].Args[1].Ref, s.g.Nodes[read].Args[0].Ref, s.val[read])
	}
}

func (s *Plan) changeGrad(pass, target graph.ID, value graph.Arg) {
	b := s.gradients.passes[pass]
	b.begun, b.pieces = true, true
	s.emit(Instr{Op: OpSetGrad, Args: []graph.Arg{s.val[target], value}, Out: NoSlot, Mode: s.mode, Pass: Pass{Node: pass}})
}

// placeEnd places the end of a pass: all of it, where that has not been done by what was read.
func (s *Plan) placeEnd(n int) {
	of := s.g.Nodes[n].Args[0].Ref
	if b := s.gradients.passes[of]; b.pieces || !b.begun {
		b.begun = true
		s.emit(s.backward(of, nil, true))
	}
}
