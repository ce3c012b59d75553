// Package exec walks a schedule.
//
// A [Machine] is a deterministic function of what it is fed: [Machine.Next] names the next
// instruction, the caller performs it and gives its result to [Machine.Feed], which says what has
// died. The machine holds values but never looks at them, starts no goroutine, takes no lock and
// does no I/O, so a run can be paused between any two instructions, cancelled, and replayed in a
// test without libtorch.
//
// Ownership: a value given to Bind or Feed belongs to the machine until it comes back from Feed,
// Take or Abort; whoever gets it back releases it. Borrowed sources (parameters, constants) are
// bound like the rest and never come back.
package exec

import (
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Machine is one run of a schedule, or of several that follow each other, over values of type V.
type Machine[V any] struct {
	schedule *plan.Schedule
	slots    []V
	held     []bool
	pc       int
	ended    bool
}

// New makes a machine at the start of a schedule. Every source must be bound before Next.
func New[V any](s *plan.Schedule) *Machine[V] {
	m := &Machine[V]{}
	m.Extend(s, nil)
	return m
}

// Extend lets a machine that is done go on with the next schedule of the same plan, whose sources
// must be bound before Next. Values that have died since are appended to dead, for the caller to release.
func (m *Machine[V]) Extend(s *plan.Schedule, dead []V) []V {
	m.schedule, m.pc = s, 0
	m.slots = append(m.slots, make([]V, s.Slots-len(m.slots))...)
	m.held = append(m.held, make([]bool, s.Slots-len(m.held))...)
	for _, slot := range s.Freed {
		dead = m.drop(slot, dead)
	}
	return dead
}

// Bind gives a source its value.
func (m *Machine[V]) Bind(slot plan.Slot, v V) {
	m.slots[slot] = v
	m.held[slot] = true
}

// Next is the instruction to perform, or nil when the run is done.
func (m *Machine[V]) Next() *plan.Instr {
	if m.ended || m.pc >= len(m.schedule.Instrs) {
		return nil
	}
	return &m.schedule.Instrs[m.pc]
}

// Done reports whether every instruction has been performed.
func (m *Machine[V]) Done() bool { return !m.ended && m.pc >= len(m.schedule.Instrs) }

// Value is what a slot holds now: an argument of the instruction that Next named.
func (m *Machine[V]) Value(slot plan.Slot) (V, error) {
	if slot < 0 || int(slot) >= len(m.slots) || !m.held[slot] {
		var none V
		return none, fault.New(fault.Internal, "instruction %d reads slot %d, which is empty", m.pc, slot)
	}
	return m.slots[slot], nil
}

// Feed takes the result of the instruction that Next named (ignored where it has none) and
// appends the values that are now dead to dead, for the caller to release.
func (m *Machine[V]) Feed(result V, dead []V) []V {
	in := &m.schedule.Instrs[m.pc]
	if in.Out != plan.NoSlot {
		m.slots[in.Out] = result
		m.held[in.Out] = true
	}
	for _, slot := range in.Frees {
		dead = m.drop(slot, dead)
	}
	m.pc++
	return dead
}

func (m *Machine[V]) drop(slot plan.Slot, dead []V) []V {
	if m.held[slot] {
		var none V
		dead = append(dead, m.slots[slot])
		m.slots[slot], m.held[slot] = none, false
	}
	return dead
}

// Skip takes the run to its end, where the values of the slots that are saved are known otherwise; they are the
// machine's from now on. Saved slots that are borrowed need none. What it held else is appended to dead, for the caller
// to release.
func (m *Machine[V]) Skip(results map[plan.Slot]V, dead []V) []V {
	for slot := range m.slots {
		if !m.schedule.Borrowed[slot] {
			dead = m.drop(plan.Slot(slot), dead)
		}
	}
	for slot, v := range results {
		m.Bind(slot, v)
	}
	m.pc = len(m.schedule.Instrs)
	return dead
}

// Result is one saved value: a tree whose references are slots to be looked up with Value.
type Result struct {
	Node  graph.ID
	Value graph.Arg
}

// Results gives the saved values of a finished schedule, in program order. They stay the machine's
// until Abort.
func (m *Machine[V]) Results() []Result {
	if !m.Done() {
		return nil
	}
	out := make([]Result, len(m.schedule.Saved))
	for i, s := range m.schedule.Saved {
		out[i] = Result(s)
	}
	return out
}

// Abort ends the run, finished or not, and appends everything the machine still owns to dead.
func (m *Machine[V]) Abort(dead []V) []V {
	for slot := range m.slots {
		if m.held[slot] && !m.schedule.Borrowed[slot] {
			dead = m.drop(plan.Slot(slot), dead)
		}
	}
	m.ended = true
	return dead
}
