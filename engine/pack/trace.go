package pack

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// activation is a tensor [rows, ..., tokens, ...] of a schedule, as it is at one time: a change in place makes
// another one of the same slot.
type activation struct {
	slot    plan.Slot
	space   *space
	shape   graph.Shape
	seq     int  // its axis of tokens
	single  bool // it has one row, which is that of all
	several bool // a container of such tensors, whose shape is that of the whole
	classes *classes
	fixed   bool        // made as the schedule says, since what shares its storage is changed
	writes  bool        // it is written to as the schedule goes on
	foreign bool        // it stands where the model has something of other sizes, or of another forward pass
	line    *line       // one for a value and what invokes make of it
	base    *activation // what it is a copy of a part of,
	part    []token     // and which tokens of that
	changed []int32     // by token: the number of its last change in place; nil: there was none

	wanted []bool // by class: tokens that somebody looks at
	whole  bool   // somebody looks at the tensor itself

	dense  plan.Slot // where the tensor itself is, or NoSlot
	places []place   // by class: where its token is once it is packed
	taken  []taken
}

// taken is what was gathered of an activation.
type taken struct {
	tokens []token
	slot   plan.Slot
}

// line tells values apart that changes of tokens do not make out of each other.
type line struct{ _ byte }

// place is a row of a packed tensor, or a token of an activation that is there as a whole.
type place struct {
	slot plan.Slot // or NoSlot
	row  int32
	of   *activation
}

// kind is how a step is rewritten.
type kind uint8

const (
	asIs   kind = iota // on whole tensors
	mapped             // an operator of the table
	attend             // attention
	rows               // an invoke's copy of its part
	put                // an invoke's part is written back
	index              // some tokens are looked at
	alias              // a copy that the plan makes to write to
)

// step is an instruction of the schedule and what it means.
type step struct {
	in     *plan.Instr
	kind   kind
	args   []*activation // that it names, in order, one a slot
	out    *activation
	rule   rule
	span   span
	packed bool          // mapped, attend: done on packed tensors
	strict bool          // what follows relies on the sizes that it expects
	new    []token       // put: of the base's tokens, those that are others afterwards
	at     []token       // put: the same as tokens of the value
	before []*activation // what it changes in place,
	after  []*activation // and what that is afterwards
}

// arg is the activation that an argument names, or nil.
func (s *step) arg(a *graph.Arg) *activation {
	if a.Kind != graph.ArgRef {
		return nil
	}
	return s.held(a.Ref)
}

// held is the activation that a slot holds where the step stands, or nil.
func (s *step) held(slot plan.Slot) *activation {
	for _, x := range s.args {
		if x.slot == slot {
			return x
		}
	}
	return nil
}

// trace is a schedule with what is known of its values.
type trace struct {
	s       *plan.Schedule
	steps   []step
	now     []*activation // by slot: what it holds at the step that is looked at
	sizes   []graph.Shape // by slot: sizes of parameters
	sure    []bool        // by slot: it is as the model says
	spaces  []*space
	changes []change // by group
	touched map[plan.Slot]*views
	clock   int32 // changes in place so far
}

// change is what happens in place to values that may share storage.
type change struct {
	put     map[plan.Slot]bool // activations that invokes write their parts back to
	direct  bool               // a line changes them
	members int                // how many there are
}

// views are a copy and what may share its storage: which tokens of it lines have changed.
type views struct {
	root    *activation
	changed []bool               // by position
	seen    map[plan.Slot][]bool // by slot: the positions it may show
}

// follow goes through a schedule.
func follow(s *plan.Schedule) *trace {
	t := &trace{s: s, steps: make([]step, len(s.Instrs)), now: make([]*activation, s.Slots), sizes: make([]graph.Shape, s.Slots),
		sure: make([]bool, s.Slots), changes: make([]change, s.Slots), touched: map[plan.Slot]*views{}}
	for i := range s.Forwards {
		f := &s.Forwards[i]
		sp := &space{rows: int(f.Batch()), toks: int(f.Seq), of: i}
		sp.real = realTokens(f, sp.toks)
		t.spaces = append(t.spaces, sp)
	}
	t.findChanges()
	t.begin()
	for i := range s.Instrs {
		t.steps[i].in = &s.Instrs[i]
		t.follow(&t.steps[i])
	}
	for i := range s.Saved {
		s.Saved[i].Value.Refs(func(slot plan.Slot) {
			if x := t.now[slot]; x != nil {
				x.whole = true
			}
		})
	}
	return t
}

func (t *trace) change(slot plan.Slot) *change { return &t.changes[t.s.Groups[slot]] }

func (t *trace) findChanges() {
	for _, src := range t.s.Sources {
		t.change(src.Slot).members++
	}
	for i := range t.s.Instrs {
		in := &t.s.Instrs[i]
		if in.Out != plan.NoSlot {
			t.change(in.Out).members++
		}
		switch {
		case in.Op == plan.OpPut:
			c := t.change(in.Args[0].Ref)
			if c.put == nil {
				c.put = map[plan.Slot]bool{}
			}
			c.put[in.Args[0].Ref] = true
		case in.Mutate:
			in.Target(func(slot plan.Slot) { t.change(slot).direct = true })
		case in.Op == plan.OpGuard: // it asks whether they share storage
			in.Refs(func(slot plan.Slot) { t.change(slot).direct = true })
		}
	}
}

// fixed reports whether a value must be made as the schedule says: it shares storage with others, and it or they are
// changed in place.
func (t *trace) fixed(slot plan.Slot) bool {
	c := t.change(slot)
	return c.direct || len(c.put) > 0 && (c.members > 1 || !c.put[slot])
}

// activation is a new one; nil where the shape is not that of one.
func (t *trace) activation(slot plan.Slot, sp *space, shape graph.Shape, of *classes) *activation {
	seq, hasRows, ok := axes(shape)
	if !ok {
		return nil
	}
	x := &activation{slot: slot, space: sp, shape: shape, seq: seq, single: !hasRows, classes: of, fixed: t.fixed(slot),
		line: &line{}, dense: plan.NoSlot}
	x.writes = len(t.change(slot).put) > 0 || t.change(slot).direct
	if x.single {
		x.classes, x.fixed = nil, true
	}
	return x
}

// begin notes what there is before the first instruction.
func (t *trace) begin() {
	first := make([]*classes, len(t.spaces))
	for _, src := range t.s.Sources {
		switch src.Kind {
		case graph.KindParam:
			t.sizes[src.Slot], t.sure[src.Slot] = src.Shape, true
		case graph.KindInput:
			t.sure[src.Slot] = true
			if src.Name != "input_ids" && src.Name != "position_ids" {
				continue
			}
			sp := t.spaces[src.Forward]
			if first[src.Forward] == nil {
				first[src.Forward] = begin(&t.s.Forwards[src.Forward], sp)
			}
			if x := t.activation(src.Slot, sp, src.Shape, first[src.Forward]); x != nil {
				x.fixed, x.dense = true, src.Slot // it is there
				t.now[src.Slot] = x
			}
		}
	}
}

// follow finds what one instruction does.
func (t *trace) follow(s *step) {
	in := s.in
	in.Refs(func(slot plan.Slot) {
		if x := t.now[slot]; x != nil && !slices.Contains(s.args, x) {
			s.args = append(s.args, x)
		}
	})
	switch in.Op {
	case plan.OpCall, plan.OpItem:
		t.call(s)
	case plan.OpIndex:
		if x := s.arg(&in.Args[0]); x != nil && len(s.args) == 1 && !x.several && !x.single {
			if span, ok := x.span(&in.Args[1]); ok && span.hi-span.lo < x.space.toks && !t.change(x.slot).direct {
				s.kind, s.span = index, span
			}
		}
	case plan.OpRows:
		t.rows(s)
	case plan.OpClone:
		if x := s.arg(&in.Args[0]); x != nil && !x.single && !x.foreign {
			if s.out = t.activation(in.Out, x.space, x.shape, x.classes); s.out != nil {
				s.kind, s.out.line, s.out.changed = alias, x.line, x.changed
				t.now[in.Out] = s.out
			}
		}
	case plan.OpPut:
		t.put(s)
	case plan.OpExpect:
		t.expect(s)
	}
	t.see(s)
	if in.Mutate && in.Op != plan.OpPut {
		t.changed(s)
	}
}

// call is an operator of the model or of the user.
func (t *trace) call(s *step) {
	in := s.in
	sure := true
	in.Refs(func(slot plan.Slot) { sure = sure && t.sure[slot] })
	switch {
	case in.Mutate:
		return
	case in.Node != graph.NoID && in.Path == "" && !in.Fresh && len(s.args) > 0: // a view that a line makes stays one
		return
	case len(s.args) == 0:
		t.sure[in.Out] = sure
		if sp := t.spaces[in.Of]; sure && in.Shape != nil {
			t.set(s, t.activation(in.Out, sp, in.Shape, distinct(sp.size())))
		}
		return
	}
	sp := s.args[0].space
	for _, x := range s.args {
		if x.foreign || x.space != sp && !(x.single && x.space.of == sp.of && sp == t.spaces[sp.of]) {
			return
		}
	}
	shape, of := t.meaning(s)
	if shape != nil && (in.Shape == nil || slices.Equal(shape, in.Shape)) {
		if x := t.activation(in.Out, sp, shape, of); x != nil {
			x.several = s.rule.several
			t.set(s, x)
			return
		}
	}
	s.kind = asIs
	if sure && in.Shape != nil && sp == t.spaces[sp.of] { // an operator that the table lacks, of the model
		if x := t.activation(in.Out, sp, in.Shape, distinct(sp.size())); x != nil {
			x.fixed = true
			t.set(s, x)
			return
		}
	}
	t.sure[in.Out] = sure && in.Shape != nil
}

func (t *trace) set(s *step, x *activation) {
	s.out = x
	if x != nil {
		t.now[x.slot], t.sure[x.slot] = x, true
	}
}

// meaning says what an operator of the table gives: its sizes, and which of its tokens are equal.
func (t *trace) meaning(s *step) (shape graph.Shape, of *classes) {
	in := s.in
	if in.Op == plan.OpItem {
		x := s.args[0]
		if !x.several || x.single || in.Shape == nil {
			return nil, nil
		}
		s.kind = mapped
		return in.Shape, x.classes
	}
	for _, x := range s.args {
		if x.several {
			return nil, nil
		}
	}
	name := baseOf(in.Name)
	if name == attention {
		return t.attention(s)
	}
	r, known := rules[name]
	if !known {
		return nil, nil
	}
	for i := range in.Kwargs {
		if in.Kwargs[i].Arg.Kind == graph.ArgRef {
			return nil, nil
		}
	}
	if shape = r.shape(t.use(s)); shape == nil {
		return nil, nil
	}
	for _, x := range s.args {
		of = join(of, x.classes)
	}
	s.kind, s.rule = mapped, r
	if shape[0] != graph.DimBatch { // one row for all: there is nothing to share
		s.kind = asIs
	}
	return shape, of
}

// use is an operator's use, with its activations in the order of its arguments.
func (t *trace) use(s *step) *call {
	return &call{in: s.in, tokens: s.args, sizes: func(a *graph.Arg) (graph.Shape, bool) {
		if a.Kind != graph.ArgRef || t.now[a.Ref] != nil {
			return nil, false
		}
		return t.sizes[a.Ref], true
	}}
}

// attention is that of queries over keys and values, which sees what the forward pass lets it see.
func (t *trace) attention(s *step) (shape graph.Shape, of *classes) {
	in := s.in
	if len(in.Args) != 6 {
		return nil, nil
	}
	q, k, v := s.arg(&in.Args[0]), s.arg(&in.Args[1]), s.arg(&in.Args[2])
	if q == nil || k == nil || v == nil {
		return nil, nil
	}
	sp := q.space
	for _, x := range []*activation{q, k, v} {
		if x.single || len(x.shape) != 4 || x.seq != 2 || x.space != sp {
			return nil, nil
		}
	}
	if sp != t.spaces[sp.of] || in.Args[4].F != 0 {
		return nil, nil
	}
	masked := t.s.Forwards[sp.of].Masked
	causal := in.Args[5].I != 0 && in.Args[3].Kind == graph.ArgNone
	if !(causal && !masked) && !(masked && in.Args[5].I == 0 && t.isMask(&in.Args[3], sp)) {
		return nil, nil
	}
	s.kind = attend
	shape = slices.Clone(q.shape)
	shape[3] = v.shape[3]
	return shape, sp.attend(q.classes, k.classes, v.classes)
}

// isMask reports whether an argument is the mask that a forward pass began with.
func (t *trace) isMask(a *graph.Arg, sp *space) bool {
	return a.Kind == graph.ArgRef && !t.change(a.Ref).direct && len(t.change(a.Ref).put) == 0 &&
		slices.ContainsFunc(t.s.Sources, func(src plan.Source) bool {
			return src.Slot == a.Ref && src.Kind == graph.KindInput && src.Name == "attention_mask" && src.Forward == sp.of
		})
}

// rows is a copy of the part of an activation that an invoke sees.
func (t *trace) rows(s *step) {
	x := s.arg(&s.in.Args[0])
	if x == nil || x.single || x.several || x.foreign {
		return
	}
	if a := s.in.Window.BatchAxis; a > 0 {
		return
	}
	sp, tokens := x.space.window(&s.in.Window)
	y := t.activation(s.in.Out, sp, x.shape, x.classes.part(tokens))
	if y == nil {
		return
	}
	y.base, y.part = x, tokens
	s.kind = rows
	t.set(s, y)
	t.touched[t.s.Groups[y.slot]] = &views{root: y, changed: make([]bool, sp.toks), seen: map[plan.Slot][]bool{y.slot: nil}}
}

// see notes which tokens of an invoke's copy a value may show.
func (t *trace) see(s *step) {
	in := s.in
	if in.Out == plan.NoSlot || in.Op == plan.OpRows {
		return
	}
	v := t.touched[t.s.Groups[in.Out]]
	if v == nil {
		return
	}
	var shown []bool
	known, found := true, false
	in.Refs(func(slot plan.Slot) {
		if t.s.Groups[slot] != t.s.Groups[in.Out] {
			return
		}
		positions, ok := v.seen[slot]
		known = known && ok && !found
		found = true
		shown = positions
	})
	if !known || !found {
		return
	}
	if in.Op == plan.OpIndex && in.Args[0].Ref == v.root.slot {
		if named, ok := v.root.positions(&in.Args[1]); ok {
			shown = named
		}
	}
	v.seen[in.Out] = shown
}

// span is the part of its tokens that an index looks at.
func (x *activation) span(key *graph.Arg) (span, bool) {
	return spanOf(key, len(x.shape), x.seq, x.space.toks)
}

// positions marks the positions that an index looks at.
func (x *activation) positions(key *graph.Arg) ([]bool, bool) {
	span, ok := x.span(key)
	if !ok {
		return nil, false
	}
	out := make([]bool, x.space.toks)
	for p := span.lo; p < span.hi; p++ {
		out[p] = true
	}
	return out, true
}

// changed notes what a line changes in place: the tokens of an invoke's copy, and of activations that may share
// storage with what it names.
func (t *trace) changed(s *step) {
	in := s.in
	in.Target(func(slot plan.Slot) {
		g := t.s.Groups[slot]
		if v := t.touched[g]; v != nil {
			positions, known := v.seen[slot]
			if in.Op == plan.OpSetIndex && slot == v.root.slot {
				if named, ok := v.root.positions(&in.Args[1]); ok {
					positions, known = named, true
				}
			}
			for p := range v.changed {
				v.changed[p] = v.changed[p] || !known || positions == nil || positions[p]
			}
		}
		t.renew(s, g, nil, nil)
	})
}

// renew makes new activations of all that may share storage with what a step changes, of which these tokens of a
// space are others afterwards; nil: all may be.
func (t *trace) renew(s *step, group plan.Slot, sp *space, tokens []token) {
	for slot, x := range t.now {
		if x == nil || t.s.Groups[slot] != group || slices.ContainsFunc(s.after, func(y *activation) bool { return y.slot == x.slot }) {
			continue
		}
		y := x.renewed()
		switch {
		case y.single:
		case tokens != nil && y.space == sp:
			y.classes = x.classes.split(tokens)
			t.stamp(y, tokens)
		default:
			y.classes = distinct(y.space.size())
			t.stamp(y, y.space.all())
		}
		s.before, s.after = append(s.before, x), append(s.after, y)
		t.now[slot] = y
	}
}

// stamp notes that tokens have changed.
func (t *trace) stamp(x *activation, tokens []token) {
	t.clock++
	stamps := make([]int32, x.space.size())
	copy(stamps, x.changed)
	for _, u := range tokens {
		stamps[u] = t.clock
	}
	x.changed = stamps
}

// lastChange is the number of a token's last change.
func (x *activation) lastChange(t token) int32 {
	if x.changed == nil {
		return 0
	}
	return x.changed[t]
}

// renewed is the same activation after a change in place.
func (x *activation) renewed() *activation {
	y := *x
	y.wanted, y.whole, y.dense, y.places, y.taken = nil, false, plan.NoSlot, nil, nil
	return &y
}

// put writes an invoke's part back. Tokens that no line has changed are what they were.
func (t *trace) put(s *step) {
	in := s.in
	x := s.arg(&in.Args[0])
	if x == nil || x.single || x.foreign || in.Window.BatchAxis > 0 {
		t.renew(s, t.s.Groups[in.Args[0].Ref], nil, nil)
		return
	}
	sp, tokens := x.space.window(&in.Window)
	var changed []bool     // by position: lines have changed the invoke's copy; nil: it is no such copy
	var copied *activation // what the copy was made of
	v := t.touched[t.s.Groups[in.Args[1].Ref]]
	if v != nil && v.root.slot == in.Args[1].Ref && v.root.base != nil && v.root.base.line == x.line &&
		slices.Equal(v.root.part, tokens) {
		changed, copied = v.changed, v.root.base
	}
	s.new = []token{}
	for i, token := range tokens {
		if changed == nil || changed[i%sp.toks] || x.lastChange(token) != copied.lastChange(token) {
			s.new, s.at = append(s.new, token), append(s.at, int32(i))
		}
	}
	s.kind = put
	if x.fixed {
		t.renew(s, t.s.Groups[x.slot], x.space, s.new)
		return
	}
	s.out = x.renewed()
	s.out.classes = x.classes.split(s.new)
	t.stamp(s.out, s.new)
	t.now[x.slot] = s.out
}

// expect is a value of a line that takes the place of an activation: the model relies on its sizes.
func (t *trace) expect(s *step) {
	in := s.in
	slot := in.Args[0].Ref
	if x := t.now[slot]; x != nil {
		if !slices.Equal(x.shape, in.Shape) || x.space != t.spaces[in.Of] {
			y := x.renewed()
			y.foreign = true
			s.before, s.after = append(s.before, x), append(s.after, y)
			t.now[slot] = y
		}
		return
	}
	if in.Args[0].Kind != graph.ArgRef || in.Shape == nil {
		return
	}
	sp := t.spaces[in.Of]
	if x := t.activation(slot, sp, in.Shape, distinct(sp.size())); x != nil {
		x.fixed, x.dense = true, slot
		t.now[slot], t.sure[slot] = x, true
		s.strict = true
	}
}
