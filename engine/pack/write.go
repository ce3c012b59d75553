package pack

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// writer writes the instructions of a schedule anew.
type writer struct {
	t       *trace
	out     *plan.Schedule
	length  map[plan.Slot]int // of packed tensors
	reports []Report
}

func newWriter(t *trace) *writer {
	out := *t.s
	out.Instrs = make([]plan.Instr, 0, len(t.s.Instrs)+len(t.s.Instrs)/2)
	out.Borrowed = slices.Clone(t.s.Borrowed)
	out.Saved = slices.Clone(t.s.Saved)
	out.Groups = nil
	return &writer{t: t, out: &out, length: map[plan.Slot]int{}}
}

func (w *writer) write() (*plan.Schedule, []Report) {
	for i := range w.t.steps {
		w.step(&w.t.steps[i])
	}
	for i := range w.out.Saved {
		w.out.Saved[i].Value = w.out.Saved[i].Value.Replaced(func(slot plan.Slot) graph.Arg {
			if x := w.t.now[slot]; x != nil {
				slot = w.whole(x)
			}
			return graph.Ref(slot)
		})
	}
	w.dropUnused()
	w.out.Finish()
	return w.out, w.reports
}

// dropUnused leaves out what the model computes for nobody any more.
func (w *writer) dropUnused() {
	used := make([]bool, w.out.Slots)
	for i := range w.out.Saved {
		w.out.Saved[i].Value.Refs(func(slot plan.Slot) { used[slot] = true })
	}
	kept := len(w.out.Instrs)
	for i := kept - 1; i >= 0; i-- {
		in := &w.out.Instrs[i]
		if in.Node == graph.NoID && in.Out != plan.NoSlot && !used[in.Out] && !in.Mutate {
			continue
		}
		in.Refs(func(slot plan.Slot) { used[slot] = true })
		kept--
		w.out.Instrs[kept] = *in
	}
	w.out.Instrs = append(w.out.Instrs[:0], w.out.Instrs[kept:]...)
}

func (w *writer) slot() plan.Slot {
	w.out.Borrowed = append(w.out.Borrowed, false)
	w.out.Slots++
	return plan.Slot(w.out.Slots - 1)
}

// add writes an instruction that the original lacks, for one that it has.
func (w *writer) add(like *plan.Instr, in plan.Instr) plan.Slot {
	in.Out, in.Mode, in.Node, in.Path, in.Of = w.slot(), like.Mode, like.Node, like.Path, like.Of
	w.out.Instrs = append(w.out.Instrs, in)
	return in.Out
}

func (w *writer) step(s *step) {
	switch s.kind {
	case mapped, attend:
		switch {
		case !s.out.needed():
		case s.packed && s.in.Op == plan.OpItem:
			w.item(s)
		case s.packed && s.kind == attend:
			w.attend(s)
		case s.packed:
			w.packed(s)
		default:
			w.asItWas(s)
		}
	case rows:
		w.rows(s)
	case index:
		w.index(s)
	case alias:
		w.alias(s)
	case put:
		w.put(s)
	default:
		w.asItWas(s)
	}
}

// asItWas writes an instruction on whole tensors.
func (w *writer) asItWas(s *step) {
	in := *s.in
	in.Strict = s.strict
	w.onWhole(s, &in)
	w.out.Instrs = append(w.out.Instrs, in)
	if s.out != nil {
		s.out.dense = in.Out
	}
	for i, x := range s.before {
		s.after[i].dense = x.dense
	}
}

// onWhole lets an instruction name the tensors themselves.
func (w *writer) onWhole(s *step, in *plan.Instr) {
	if len(s.args) == 0 {
		return
	}
	name := func(slot plan.Slot) graph.Arg {
		if x := s.held(slot); x != nil {
			slot = w.whole(x)
		}
		return graph.Ref(slot)
	}
	in.Args = slices.Clone(in.Args)
	for i := range in.Args {
		in.Args[i] = in.Args[i].Replaced(name)
	}
	in.Kwargs = slices.Clone(in.Kwargs)
	for i := range in.Kwargs {
		in.Kwargs[i].Arg = in.Kwargs[i].Arg.Replaced(name)
	}
}

// ---- activations ----

// where is the place of a token.
func (x *activation) where(t token) place {
	if x.single {
		return place{plan.NoSlot, t % token(x.space.toks), x}
	}
	if x.places != nil {
		if p := x.places[x.classes.of[t]]; p.row >= 0 {
			return p
		}
	}
	return place{plan.NoSlot, t, x}
}

// hold says that the rows of a packed tensor are these tokens of an activation.
func (x *activation) hold(slot plan.Slot, tokens []token) {
	x.nowhere()
	for i, t := range tokens {
		x.places[x.classes.of[t]] = place{slot, int32(i), nil}
	}
}

func (x *activation) nowhere() {
	if x.places != nil {
		return
	}
	x.places = make([]place, len(x.classes.first))
	for i := range x.places {
		x.places[i] = place{plan.NoSlot, -1, nil}
	}
}

// share says that tokens of an activation are where those of another one are.
func (x *activation) share(tokens []token, of *activation, from func(token) token) {
	x.nowhere()
	for _, t := range tokens {
		x.places[x.classes.of[t]] = of.where(from(t))
	}
}

func itself(t token) token { return t }

// window has a row for each token.
func (x *activation) window(rows, toks int) plan.Window {
	return plan.Window{Rows: int64(rows), Toks: int64(toks), SeqAxes: []int{x.seq}}
}

// rowsOf is the shape of so many tokens of it, one a row.
func (x *activation) rowsOf(tokens int) graph.Shape {
	out := slices.Delete(slices.Clone(x.shape), x.seq, x.seq+1)
	out[0] = graph.Dim(tokens)
	return out
}

// whole is the slot of the tensor itself.
func (w *writer) whole(x *activation) plan.Slot {
	if x.dense == plan.NoSlot {
		like := plan.Instr{Mode: w.mode(), Node: graph.NoID, Of: x.space.of}
		packed := w.gather(&like, x, x.space.all())
		x.dense = w.add(&like, plan.Instr{Op: plan.OpUnpack, Args: []graph.Arg{graph.Ref(packed)}, Window: x.window(x.space.rows, x.space.toks)})
	}
	return x.dense
}

// mode is that of the last instruction.
func (w *writer) mode() graph.Mode {
	if n := len(w.out.Instrs); n > 0 {
		return w.out.Instrs[n-1].Mode
	}
	return graph.ModeGrad
}

// gather is the slot of a tensor with a row for each of these tokens.
func (w *writer) gather(like *plan.Instr, x *activation, tokens []token) plan.Slot {
	for _, have := range x.taken {
		if slices.Equal(have.tokens, tokens) {
			return have.slot
		}
	}
	slot := w.gatherAnew(like, x, tokens)
	if !x.writes || x.dense == plan.NoSlot {
		x.taken = append(x.taken, taken{tokens, slot})
	}
	return slot
}

func (w *writer) gatherAnew(like *plan.Instr, x *activation, tokens []token) plan.Slot {
	places := make([]place, len(tokens))
	var slots []plan.Slot
	var wholes []*activation
	for i, t := range tokens {
		p := x.where(t)
		places[i] = p
		if p.of == nil && !slices.Contains(slots, p.slot) {
			slots = append(slots, p.slot)
		}
		if p.of != nil && !slices.Contains(wholes, p.of) {
			wholes = append(wholes, p.of)
		}
	}
	if len(slots) == 0 && len(wholes) == 1 {
		return w.pack(like, wholes[0], places)
	}
	for _, of := range wholes {
		var mine []place
		for i := range places {
			if places[i].of == of {
				mine = append(mine, places[i])
				places[i].row = int32(len(mine) - 1)
			}
		}
		slot := w.pack(like, of, mine)
		slots = append(slots, slot)
		for i := range places {
			if places[i].of == of {
				places[i].slot, places[i].of = slot, nil
			}
		}
	}
	args, offset, n := make([]graph.Arg, len(slots)), map[plan.Slot]int{}, 0
	for i, slot := range slots {
		args[i], offset[slot] = graph.Ref(slot), n
		n += w.length[slot]
	}
	index, same := make([]int64, len(tokens)), n == len(tokens)
	for i, p := range places {
		index[i] = int64(offset[p.slot]) + int64(p.row)
		same = same && index[i] == int64(i)
	}
	if same && len(slots) == 1 {
		return slots[0]
	}
	slot := w.add(like, plan.Instr{Op: plan.OpTake, Args: args, Tokens: index})
	w.length[slot] = len(tokens)
	return slot
}

// pack takes tokens out of a tensor that is there.
func (w *writer) pack(like *plan.Instr, of *activation, places []place) plan.Slot {
	index := make([]int64, len(places))
	for i := range places {
		index[i] = int64(places[i].row)
	}
	slot := w.add(like, plan.Instr{Op: plan.OpPack, Args: []graph.Arg{graph.Ref(of.dense)}, Tokens: index, Window: of.window(0, 0),
		Shape: of.rowsOf(len(places))})
	w.length[slot] = len(places)
	return slot
}

// ---- steps ----

// packed writes an operator on packed tensors.
func (w *writer) packed(s *step) {
	list, c := s.out.list(), w.t.use(s)
	if s.rule.same != nil && s.rule.same(c) {
		s.out.share(list, s.args[0], itself)
		return
	}
	c.out = make([]graph.Arg, len(s.in.Args))
	for i := range s.in.Args {
		c.out[i] = s.in.Args[i].Replaced(func(slot plan.Slot) graph.Arg {
			if x := s.held(slot); x != nil {
				slot = w.gather(s.in, x, list)
			}
			return graph.Ref(slot)
		})
	}
	if s.rule.args != nil {
		s.rule.args(c)
	}
	slot := w.add(s.in, plan.Instr{Op: s.in.Op, Name: s.in.Name, Args: c.out, Kwargs: s.in.Kwargs, Fresh: s.in.Fresh,
		Shape: s.out.rowsOf(len(list)), DType: s.in.DType, Main: s.in.Main})
	w.length[slot] = len(list)
	s.out.hold(slot, list)
	if baseOf(s.in.Name) == "nng::linear" {
		w.reports = append(w.reports, Report{s.in.Path, s.out.space.of, len(list), s.out.space.size()})
	}
}

// item takes a tensor out of a container, which is packed or not.
func (w *writer) item(s *step) {
	x := s.args[0]
	if x.dense != plan.NoSlot {
		w.asItWas(s)
		return
	}
	list := x.list()
	from := x.where(list[0]) // a container is one packed value: all its tokens are there
	slot := w.add(s.in, plan.Instr{Op: plan.OpItem, Args: []graph.Arg{graph.Ref(from.slot), s.in.Args[1]},
		Shape: s.out.rowsOf(len(list)), DType: s.in.DType, Main: s.in.Main})
	w.length[slot] = len(list)
	s.out.hold(slot, list)
}

// rows writes an invoke's copy, unless nobody needs the tensor itself.
func (w *writer) rows(s *step) {
	x, y := s.args[0], s.out
	switch {
	case !y.needed():
	case x.dense != plan.NoSlot && (y.whole || x.writes):
		w.asItWas(s)
	case y.whole:
		packed := w.gather(s.in, x, y.part)
		y.dense = w.add(s.in, plan.Instr{Op: plan.OpUnpack, Args: []graph.Arg{graph.Ref(packed)}, Window: y.window(y.space.rows, y.space.toks), Fresh: true})
	default:
		y.share(y.list(), x, func(t token) token { return y.part[t] })
	}
}

// index looks at some of the tokens.
func (w *writer) index(s *step) {
	x := s.args[0]
	if x.dense != plan.NoSlot || x.whole { // so that it is a view of what others see
		w.asItWas(s)
		return
	}
	packed := w.gather(s.in, x, x.space.within(s.span))
	part := w.add(s.in, plan.Instr{Op: plan.OpUnpack, Args: []graph.Arg{graph.Ref(packed)}, Window: x.window(x.space.rows, s.span.hi-s.span.lo), Fresh: x.base != nil})
	in := *s.in
	in.Args = []graph.Arg{graph.Ref(part), shifted(&s.in.Args[1], s.span, s.span.lo)}
	w.out.Instrs = append(w.out.Instrs, in)
}

// alias copies an activation that is to be written to.
func (w *writer) alias(s *step) {
	x, y := s.args[0], s.out
	switch {
	case !y.needed():
	case y.whole || x.writes && x.dense != plan.NoSlot:
		w.asItWas(s)
	default:
		y.share(y.list(), x, itself)
	}
}

// put writes an invoke's part back: into the tensor where that is needed, else its tokens take the place of others.
func (w *writer) put(s *step) {
	x, y := s.arg(&s.in.Args[0]), s.out
	switch {
	case x.fixed:
		w.asItWas(s)
	case !y.needed():
	case y.whole:
		w.asItWas(s)
		y.dense = x.dense
	default:
		w.putTokens(s, x, y)
	}
}

func (w *writer) putTokens(s *step, x, y *activation) {
	mine, index, others := s.divided()
	if len(mine) > 0 || s.in.Want != nil {
		value := s.in.Args[1].Ref
		if v := s.arg(&s.in.Args[1]); v != nil {
			value = w.whole(v)
		}
		args := []graph.Arg{graph.Ref(value)}
		if len(others) > 0 { // whose dtype it must have
			p := x.where(others[0])
			if p.of != nil {
				p.slot = p.of.dense
			}
			args = append(args, graph.Ref(p.slot))
		}
		slot := w.add(s.in, plan.Instr{Op: plan.OpPack, Args: args, Tokens: index, Window: x.window(0, 0), Want: s.in.Want, Fresh: true,
			Shape: x.rowsOf(len(mine))})
		w.length[slot] = len(mine)
		y.hold(slot, mine)
	}
	y.share(others, x, itself)
}
