package plan

import (
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Models gives the two variants of a model's forward pass. Both have the same access points in
// the same order.
type Models struct {
	Causal, Masked *graph.Model
	Training       bool // they draw random numbers, so that no two invokes share a pass
	// Hosted: somebody else does the forward pass, one for each invoke and one after the other. The plan
	// fetches what access points hold, and gives back what is to stand there.
	Hosted bool
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
		live[n] = live[n] || node.Kind == graph.KindSave || isGradient(node.Kind) || node.Kind == graph.KindWrite || mutated(node) != nil ||
			node.Kind == graph.KindCall && (isRandom(node.Op) || isLasting(node.Op))
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
				s.queues[i] = s.queues[i][1:] // placing it may place others out of turn
				if err := s.place(p, n); err != nil {
					return locate(err, s.g, n)
				}
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
		if next != nil && s.models.Hosted {
			break // passes come one after the other: values go to later invokes only
		}
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
	side := [...]string{"the input of ", "the output of "}[port]
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
			s.followMark(p, graph.ID(p.cursor))
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
			slot = s.source(Source{Kind: graph.KindParam, Name: n.Op, Shape: n.Shape})
			s.params[n.Op] = slot
		}
		p.env[id] = slot
	case graph.KindInput:
		slot, ok := p.inputs[n.Op]
		if !ok {
			slot = s.source(Source{Kind: graph.KindInput, Name: n.Op, Forward: p.forward, Shape: n.Shape})
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
	in := Instr{Out: s.slot(), Mode: s.mode, Node: graph.NoID, Path: n.Path, Of: p.forward}
	in.Args, in.Kwargs = graph.ReplacedArgs(n.Args, look), graph.ReplacedKwargs(n.Kwargs, look)
	switch n.Kind {
	case graph.KindCall:
		in.Op, in.Name, in.Fresh, in.Mutate = OpCall, n.Op, isFresh(n.Op), isInPlace(n.Op)
	case graph.KindItem:
		in.Op = OpItem
	case graph.KindIndex:
		in.Op = OpIndex
	case graph.KindFetch:
		in.Op, in.Place = OpFetch, Place{Forward: p.forward, Point: int(n.Index)}
	default:
		return fault.New(fault.Internal, "model node %d has kind %d, which computes nothing", id, n.Kind)
	}
	env[id] = in.Out
	in.Refs(func(r Slot) {
		if p.spread[r] {
			p.spread[in.Out] = true
		}
	})
	if &env[0] == &p.env[0] && !p.spread[in.Out] {
		in.Shape, in.DType, in.Main = n.Shape, n.DType, true
	}
	s.emit(in)
	return failed
}

// place places one of the user's nodes.
func (s *Plan) place(p *pass, n int) error {
	if err := s.placeOne(p, n); err != nil {
		return err
	}
	return s.followNode(p, n)
}

func (s *Plan) placeOne(p *pass, n int) error {
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
		tree := graph.ReplacedArgs(node.Args, value)
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
		in := Instr{Mode: node.Mode, Path: node.Path, Args: graph.ReplacedArgs(node.Args, value), Kwargs: graph.ReplacedKwargs(node.Kwargs, value)}
		switch node.Kind {
		case graph.KindCall:
			in.Op, in.Name, in.Fresh = OpCall, node.Op, isFresh(node.Op)
			if isInPlace(node.Op) && len(node.Args) == 0 { // what is changed unnoticed could be another invoke's
				return fault.New(fault.Op, "%s was not given what it changes as its first argument", node.Op)
			}
		case graph.KindIndex:
			in.Op = OpIndex
		default:
			in.Op = OpSetIndex
		}
		if arg := mutated(node); arg != nil {
			in.Mutate = true
			arg.Refs(func(id graph.ID) { s.guard(id) })
			defer arg.Refs(func(id graph.ID) { s.soil(p, node.Invoke, id) })
			defer s.changedGrads(n)
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
	case graph.KindTrack:
	case graph.KindBackward:
		s.placeBackward(n)
	case graph.KindGrad:
		return s.placeGrad(p, n)
	case graph.KindSetGrad:
		s.placeSetGrad(n)
	case graph.KindEnd:
		s.placeEnd(n)
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

func (s *Plan) emit(in Instr) Slot {
	in.Node = s.node
	in.shares(func(r Slot) { s.alias.join(in.Out, r) })
	switch in.Op {
	case OpFetch:
		s.visible = append(s.visible, in.Out)
	case OpGive:
		s.visible = append(s.visible, in.Args[0].Ref)
	}
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
	s.borrowed[src.Slot] = src.Kind != graph.KindInput || strings.HasPrefix(src.Name, CachePrefix)
	return src.Slot
}

func (s *Plan) constant(index int32) Slot {
	if slot, ok := s.consts[index]; ok {
		return slot
	}
	s.consts[index] = s.source(Source{Kind: graph.KindConst, Index: index})
	return s.consts[index]
}
