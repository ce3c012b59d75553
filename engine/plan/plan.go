package plan

import (
	"errors"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Plan is a trace on its way through a model. Its program may grow while it runs: each [Plan.Extend]
// gives the schedule of what the program asks for since the last one.
//
// Where a value is wanted before the program has been written to its end, only the invokes that it
// depends on take part, and all that they have said so far is done. Their forward passes then stand
// where the program has got to. The other invokes wait, to share a pass of their own later.
type Plan struct {
	models    Models
	g         *graph.Graph
	end       bool         // the program is complete
	apart     map[int]bool // invokes that share no pass
	waits     [][]graph.ID // by user node: nodes of other invokes that must come first
	out       *Schedule    // what is being made
	forwards  []Forward
	forwardOf []int // by invoke: its forward pass, or -1 as long as it has none
	extents   []extent
	passes    []*pass
	queues    [][]int     // by invoke: its nodes that are to be placed
	val       []graph.Arg // by user node: its value, a tree of slots
	done      []bool      // by user node: placed, or never needed
	origins   [][]origin  // by user node: the activations its value may be a view of
	bound     []bound     // what invokes assigned to access points: activations, too
	reach     []int       // by invoke: the furthest access point it has named
	reacher   []int       // by invoke: the node that named it
	alias     aliases     // of slots: may share storage
	alive     []bool      // of slots: hold a value since an earlier schedule
	borrowed  []bool      // of slots: parameters and constants
	sources   []Source
	params    map[string]Slot
	consts    map[int32]Slot
	mode      graph.Mode
	node      graph.ID // the user's node being placed, for the instructions it causes
	lastUses  map[*graph.Model][]graph.ID
	gradients gradients
	visible   []Slot // what modules of a hosted model gave, or go on with
}

// lost stands in a pass's env for a value that was computed and then given up, since neither the
// program nor the rest of the model had a use for it.
const lost Slot = -2

// ErrRestart says that the program has come to need what an earlier schedule gave up, or what its
// division into forward passes rules out: plan it anew, from its beginning.
var ErrRestart = errors.New("the trace must be planned anew")

// New begins a plan.
func New(models Models) *Plan {
	return &Plan{models: models, apart: map[int]bool{}, params: map[string]Slot{}, consts: map[int32]Slot{}, lastUses: map[*graph.Model][]graph.ID{}}
}

// Splice joins a verified trace with the model it speaks of, all at once.
func Splice(g *graph.Graph, models Models) (*Schedule, error) { return New(models).Extend(g, true) }

// Extend joins what has been added to a verified trace with the model. Each invoke's nodes keep
// their order; the forward pass of an invoke advances to an access point when the first node needs
// it, and no further than the last one does. Several invokes in one pass each see a copy of their own
// rows; what an invoke changed is written back before the pass moves on.
//
// The schedule computes the values of the Save nodes that are new. With end the program is complete,
// and nothing is kept beyond them; else every value it has defined is, since it may yet be used.
//
// After an error the plan is of no use. On [ErrRestart] a new one can take its place.
func (s *Plan) Extend(g *graph.Graph, end bool) (*Schedule, error) {
	from := len(s.done)
	s.g, s.end = g, end
	s.waits = hazards(g, s.models.Causal)
	s.grow()
	if from == 0 && len(g.Invokes) > 0 {
		s.mode = g.Invokes[0].Mode()
	}
	if err := s.readGradients(); err != nil {
		return nil, err
	}
	active, err := s.takingPart(graph.ID(from))
	if err != nil {
		return nil, err
	}
	slots := 0
	if s.out != nil {
		slots = s.out.Slots
	}
	room := min(len(s.models.Causal.Nodes)/2+2*(len(g.Nodes)-from), 1<<14) // about what a trace to the last layer takes
	s.out = &Schedule{Slots: slots, Instrs: make([]Instr, 0, room)}
	s.alias = slices.Grow(s.alias, room)
	if err := s.begin(active); err != nil {
		return nil, err
	}
	s.out.Forwards = s.forwards
	s.enqueue(active)
	if err := s.runAll(graph.ID(from)); err != nil {
		return nil, err
	}
	s.settle()
	return s.out, nil
}

// grow makes room for what has been added to the program.
func (s *Plan) grow() {
	nodes, invokes := len(s.g.Nodes), len(s.g.Invokes)
	s.val = append(s.val, make([]graph.Arg, nodes-len(s.val))...)
	s.origins = append(s.origins, make([][]origin, nodes-len(s.origins))...)
	s.done = append(s.done, make([]bool, nodes-len(s.done))...)
	for len(s.forwardOf) < invokes {
		s.forwardOf = append(s.forwardOf, -1)
		s.extents = append(s.extents, extent{forward: -1})
		s.reach, s.reacher = append(s.reach, -1), append(s.reacher, -1)
		s.queues = append(s.queues, nil)
	}
}

// takingPart says which invokes this schedule is about: all at the end, else those that the Save
// nodes from a node on depend on.
func (s *Plan) takingPart(from graph.ID) ([]bool, error) {
	active := make([]bool, len(s.g.Invokes))
	if s.end || s.models.Hosted { // whose passes come in the order of the invokes
		for i := range active {
			active[i] = true
		}
	}
	own := make([][]int, len(s.g.Invokes))
	for n := range s.g.Nodes {
		own[s.g.Nodes[n].Invoke] = append(own[s.g.Nodes[n].Invoke], n)
	}
	var visit func(invoke int32)
	visit = func(invoke int32) {
		if active[invoke] {
			return
		}
		active[invoke] = true
		for i := int(invoke) - 1; i >= 0 && s.g.Invokes[i].Edit; i-- {
			visit(int32(i))
		}
		for _, n := range own[invoke] {
			s.g.Nodes[n].Refs(func(id graph.ID) { visit(s.g.Nodes[id].Invoke) })
			for _, id := range s.waits[n] {
				visit(s.g.Nodes[id].Invoke)
			}
		}
		if s.g.Invokes[invoke].WholeBatch() {
			for i := range s.g.Invokes {
				visit(int32(i))
			}
		}
	}
	for n := int(from); n < len(s.g.Nodes); n++ {
		if s.g.Nodes[n].Kind == graph.KindSave {
			visit(s.g.Nodes[n].Invoke)
			s.changedBy(n, visit)
		}
	}
	// An invoke that sees the whole batch shares its pass with all others from the start.
	begun, fresh, whole := false, false, false
	for i := range active {
		begun = begun || s.forwardOf[i] >= 0
		fresh = fresh || active[i] && s.forwardOf[i] < 0
		whole = whole || active[i] && s.g.Invokes[i].WholeBatch()
	}
	if begun && fresh && whole {
		return nil, ErrRestart
	}
	return active, nil
}

// changedBy calls f for the invokes that may have changed in place what a Save node keeps. It does not
// name them, and unlike other nodes it waits for nobody.
func (s *Plan) changedBy(save int, f func(invoke int32)) {
	var alias aliases
	for n := range save {
		arg := mutated(&s.g.Nodes[n])
		if arg == nil || s.g.Nodes[n].Invoke == s.g.Nodes[save].Invoke {
			continue
		}
		if alias == nil {
			alias = sharing(s.g, s.models.Causal)
		}
		arg.Refs(func(id graph.ID) {
			s.g.Nodes[save].Refs(func(kept graph.ID) {
				if alias.find(id) == alias.find(kept) {
					f(s.g.Nodes[n].Invoke)
				}
			})
		})
	}
}

// begin places the invokes that have no forward pass yet in new ones.
func (s *Plan) begin(active []bool) error {
	var members []int
	for i := range active {
		if active[i] && s.forwardOf[i] < 0 && !s.g.Invokes[i].Edit {
			members = append(members, i)
		}
	}
	if len(s.g.Invokes) == 0 {
		return errNoInput()
	}
	// The invoke that is still being written may go on to say anything, so nobody else may move its pass.
	if !s.wholeBatch(members) {
		for _, i := range members {
			s.apart[i] = s.apart[i] || s.models.Training || s.models.Hosted || s.followsIn(i)
		}
		for k := 0; k < len(members); k++ {
			if i := members[k]; s.apart[i] || s.open(i) {
				if err := s.share(members[:k]); err != nil {
					return err
				}
				if err := s.share(members[k : k+1]); err != nil {
					return err
				}
				members, k = members[k+1:], -1
			}
		}
	}
	return s.share(members)
}

// Apart gives an invoke that has not begun a forward pass of its own, since it changes the sizes of
// what it replaces. It reports false where that cannot be: an invoke sees the whole batch.
func (s *Plan) Apart(g *graph.Graph, invoke int) bool {
	if s.apart[invoke] || slices.ContainsFunc(g.Invokes, graph.Invoke.WholeBatch) {
		return false
	}
	s.apart[invoke] = true
	return true
}

// open reports whether an invoke may still grow: the last one, until the program ends.
func (s *Plan) open(invoke int) bool { return !s.end && invoke == len(s.g.Invokes)-1 }

func (s *Plan) wholeBatch(invokes []int) bool {
	return slices.ContainsFunc(invokes, func(i int) bool { return s.g.Invokes[i].WholeBatch() })
}

// share places invokes in as few new forward passes as they need.
func (s *Plan) share(members []int) error {
	if len(members) == 0 {
		return nil
	}
	base := len(s.forwards)
	if err := orderInvokes(s.g, s.models.Causal, s.waits, s.forwardOf, members, base); err != nil {
		return err
	}
	forwards, err := layout(s.g.Invokes, members, s.forwardOf, base, s.extents)
	if err != nil {
		return err
	}
	s.forwards = append(s.forwards, forwards...)
	for i := range s.g.Invokes { // edits go where what they edit goes
		if k := s.g.Edited(i); k != i && slices.Contains(members, k) {
			s.forwardOf[i], s.extents[i] = s.forwardOf[k], s.extents[k]
		}
	}
	for i := base; i < len(s.forwards); i++ {
		model := s.models.of(&s.forwards[i])
		p := &pass{forward: i, model: model, env: make([]Slot, len(model.Nodes)), lastCall: -1, movedBy: graph.NoID,
			inputs: map[string]Slot{}, copies: map[copyKey]*rowCopy{}, spread: map[Slot]bool{}, foreign: map[Slot]bool{}}
		for k := range p.env {
			p.env[k] = NoSlot
		}
		s.passes = append(s.passes, p)
	}
	return nil
}

// enqueue lists the nodes that are to be placed now. At the end those that nobody can observe are
// not; before it anything may yet be observed.
func (s *Plan) enqueue(active []bool) {
	var live []bool
	if s.end {
		live = liveNodes(s.g)
	}
	for i := range s.queues {
		s.queues[i] = s.queues[i][:0]
	}
	for n := range s.g.Nodes {
		invoke := s.g.Nodes[n].Invoke
		switch {
		case s.done[n] || !active[invoke]:
		case s.end && !live[n]:
			s.done[n] = true
		default:
			s.queues[invoke] = append(s.queues[invoke], n)
		}
	}
}

// runAll places all that is queued. Passes advance by turns, since an invoke that began early may go on
// with values of one that began late, and hand its own to a third.
func (s *Plan) runAll(from graph.ID) error {
	drives := s.drivers(from)
	for {
		if err := s.placeReady(); err != nil {
			return err
		}
		p, end, err := s.next(drives)
		if err != nil {
			return err
		}
		if p != nil {
			if err := s.advance(p, end); err != nil {
				return err
			}
			continue
		}
		stuck := -1
		for i, q := range s.queues {
			if len(q) > 0 && stuck < 0 && drives[i] {
				stuck = q[0]
			}
		}
		if stuck < 0 {
			return nil
		}
		if !s.driveAll(drives) {
			return fault.New(fault.Internal, "node %d of invoke %d waits for a value that never comes",
				stuck, s.g.Nodes[stuck].Invoke)
		}
	}
}

// drivers says which invokes move their pass. All do, but where an invoke that is still being written
// sees the whole batch: it shares its pass, and the others may not move it past where it stands unless
// their values are wanted.
func (s *Plan) drivers(from graph.ID) []bool {
	// An edit follows where what it edits has got to.
	drives := make([]bool, len(s.queues))
	last := len(s.queues) - 1
	if !s.open(last) || !s.g.Invokes[last].WholeBatch() {
		s.driveAll(drives)
		return drives
	}
	drives[last] = true
	for n := int(from); n < len(s.g.Nodes); n++ {
		if s.g.Nodes[n].Kind == graph.KindSave {
			drives[s.g.Nodes[n].Invoke] = true
		}
	}
	return drives
}

// driveAll lets every invoke move its pass, and reports whether that is news.
func (s *Plan) driveAll(drives []bool) (news bool) {
	for i := range drives {
		if !s.g.Invokes[i].Edit {
			news = news || !drives[i]
			drives[i] = true
		}
	}
	return news
}

// settle drops the instructions nobody can observe, says where each value dies, and notes which
// values are kept for what the program may go on to say.
func (s *Plan) settle() {
	out := s.out
	slices.SortFunc(out.Saved, func(a, b Saved) int { return int(a.Node - b.Node) }) // program order
	out.Borrowed = s.borrowed
	keep := make([]bool, out.Slots)
	use := func(slot Slot) {
		if slot >= 0 {
			keep[slot] = true
		}
	}
	for i := range out.Saved {
		out.Saved[i].Value.Refs(use)
	}
	if !s.end {
		for n := range s.val {
			s.val[n].Refs(use)
		}
		for i := range s.passes {
			s.needed(s.passes[i], use)
		}
	}
	dropDead(out, keep, s.alias, s.visible)
	if s.end && len(s.alive) == 0 {
		out.Groups = make([]Slot, out.Slots)
		for slot := range out.Groups {
			out.Groups[slot] = s.alias.find(Slot(slot))
		}
	}
	s.alive = append(s.alive, make([]bool, out.Slots-len(s.alive))...)
	markLastUses(out, keep, s.alive)
	out.Sources = bindings(s.sources, out, keep, s.alive)
	for i := range out.Instrs {
		if slot := out.Instrs[i].Out; slot != NoSlot {
			s.alive[slot] = true
		}
	}
	for slot := range s.alive {
		s.alive[slot] = s.alive[slot] && (keep[slot] || out.Borrowed[slot])
	}
	for i := range s.passes {
		p := s.passes[i]
		for k, slot := range p.env {
			if slot >= 0 && s.gone(slot) {
				p.env[k] = lost
			}
		}
	}
}

// needed calls use for the values that the rest of a pass, or the program where it stands, may need.
func (s *Plan) needed(p *pass, use func(Slot)) {
	last := s.lastUse(p.model)
	for k, slot := range p.env {
		if int(last[k]) >= p.cursor {
			use(slot)
		}
	}
	for i := range p.model.Points {
		if point := &p.model.Points[i]; pointReady(point) > p.lastCall { // nothing has run since
			point.Tree.Refs(func(id graph.ID) { use(p.env[id]) })
		}
	}
	for _, slot := range p.inputs {
		use(slot)
	}
	for _, c := range p.order {
		if !c.stale {
			use(c.slot)
		}
	}
}

// lastUse says for each node of a model which is the last that uses it, or NoID.
func (s *Plan) lastUse(m *graph.Model) []graph.ID {
	last, ok := s.lastUses[m]
	if !ok {
		last = make([]graph.ID, len(m.Nodes))
		for k := range last {
			last[k] = graph.NoID
		}
		for k := range m.Nodes {
			m.Nodes[k].Refs(func(id graph.ID) { last[id] = graph.ID(k) })
		}
		s.lastUses[m] = last
	}
	return last
}

// gone reports whether a slot of an earlier schedule holds nothing any more.
func (s *Plan) gone(slot Slot) bool {
	return int(slot) < len(s.alive) && !s.alive[slot] && !s.borrowed[slot]
}
