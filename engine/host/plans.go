package host

import (
	"container/list"
	"encoding/binary"
	"sync"
	"sync/atomic"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// A trace in a loop says the same each time, of other prompts: its schedule is kept, by the bytes of its nodes and
// by what else decides about it: how long rows are, and which tokens are equal. The token ids themselves do not.

const (
	keptInstrs = 1 << 16 // instructions of all schedules that a model keeps, and what else they count as: see planned.size
	keyTokens  = 1 << 14 // tokens of a trace that may be kept
)

// plans are the schedules of a model that were used last. Any thread may use them.
type plans struct {
	mu     sync.Mutex
	byKey  map[string]*list.Element
	recent list.List // of *planned, the last used first
	instrs int
}

// planned is a trace with its schedule, which nobody changes any more.
type planned struct {
	key      string
	graph    *graph.Graph
	models   plan.Models
	explicit bool
	schedule *plan.Schedule
	rows     [][][2]int // of each forward pass: the invoke and the number of each row
	priced   atomic.Pointer[priced]
	capture  capture
}

// priced is what a schedule takes with constants of these sizes.
type priced struct {
	constants string
	cost      *Cost
}

func (p *plans) find(key string) *planned {
	p.mu.Lock()
	defer p.mu.Unlock()
	at, ok := p.byKey[key]
	if !ok {
		return nil
	}
	p.recent.MoveToFront(at)
	return at.Value.(*planned)
}

func (p *plans) keep(one *planned) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.byKey[one.key]; ok || one.size() > keptInstrs/4 {
		return
	}
	if p.byKey == nil {
		p.byKey = map[string]*list.Element{}
	}
	p.byKey[one.key] = p.recent.PushFront(one)
	p.instrs += one.size()
	for p.instrs > keptInstrs {
		last := p.recent.Remove(p.recent.Back()).(*planned)
		delete(p.byKey, last.key)
		p.instrs -= last.size()
	}
}

// size is what it counts for among those that are kept. A graph may have far more lines than come into a schedule.
func (p *planned) size() int { return len(p.schedule.Instrs) + len(p.key)/32 }

// keyOf is what a schedule depends on; empty where it is not worth keeping.
func keyOf(invokes []graph.Invoke, rest []byte, consts int, flags byte) string {
	key := append(make([]byte, 0, len(rest)+64), flags)
	number := func(n int) { key = binary.AppendUvarint(key, uint64(n)) }
	number(consts)
	number(len(invokes))
	var rows [][]int64
	tokens, masked := 0, false
	for i := range invokes {
		v := &invokes[i]
		edit := 0
		if v.Edit {
			edit = 1
		}
		number(edit<<2 | int(v.Mode()))
		number(len(v.Rows))
		for _, row := range v.Rows {
			number(len(row))
			tokens += len(row)
			rows = append(rows, row)
		}
		number(len(v.Masks))
		for _, mask := range v.Masks {
			for _, m := range mask {
				number(int(m))
			}
		}
		masked = masked || len(v.Masks) > 0
	}
	if tokens > keyTokens {
		return ""
	}
	type place struct {
		position int
		id       int64
	}
	first := map[place]int{}
	for r, row := range rows {
		for p, id := range row {
			at := place{p, id}
			if masked { // positions are counted by the masks: any two tokens may be at the same one
				at.position = 0
			}
			if _, ok := first[at]; !ok {
				first[at] = r*keyTokens + p
			}
			if masked || len(rows) > 1 {
				number(first[at])
			}
		}
	}
	return string(append(key, rest...))
}

// BeginBytes is [Native.Begin] of a graph in wire form, which is neither read nor planned again where one that differs by
// token ids alone has run before.
func (m *Native) BeginBytes(data []byte, consts []aten.Tensor, end bool, judges ...Judge) (*Run, error) {
	key, invokes := "", []graph.Invoke(nil)
	if end && !m.hosted {
		key, invokes = m.planKey(data, len(consts))
	}
	if known := m.plans.find(key); known != nil {
		return m.beginPlanned(known, invokes, consts, judges)
	}
	g, err := graph.Decode(data)
	if err != nil {
		aten.FreeAll(consts)
		return nil, err
	}
	r, err := m.Begin(g, consts, end, judges...)
	if err == nil && key != "" {
		if rows := rowsOf(g, r.schedule); rows != nil {
			own := *r.schedule
			one := &planned{key: key, graph: &graph.Graph{Nodes: g.Nodes, Positions: g.Positions}, models: r.models,
				explicit: r.explicit, schedule: &own, rows: rows}
			one.priced.Store(r.priced)
			m.plans.keep(one)
		}
	}
	return r, err
}

// planKey is what the schedule of a whole trace depends on, and the trace's invokes; empty where it is not worth keeping,
// or where the trace cannot be read.
func (m *Native) planKey(data []byte, consts int) (string, []graph.Invoke) {
	invokes, rest, err := graph.DecodeInvokes(data)
	if err != nil {
		return "", nil
	}
	var flags byte
	if m.Training() {
		flags |= 1
	}
	if m.apart.Load() {
		flags |= 2
	}
	return keyOf(invokes, rest, consts, flags), invokes
}

// beginPlanned makes a run of a trace whose schedule is known.
func (m *Native) beginPlanned(known *planned, invokes []graph.Invoke, consts []aten.Tensor, judges []Judge) (*Run, error) {
	r := &Run{model: m, judge: judgeOf(judges), known: known, models: known.models, explicit: known.explicit, consts: consts, end: true,
		graph: &graph.Graph{Nodes: known.graph.Nodes, Positions: known.graph.Positions, Invokes: invokes}}
	r.protect()
	if err := m.enter(); err != nil {
		aten.FreeAll(consts)
		return nil, err
	}
	ok := false
	defer func() {
		if !ok { // an error, or a panic
			r.Free()
		}
	}()
	if err := m.checkInputs(r.graph, 0); err != nil {
		return nil, err
	}
	schedule := *known.schedule
	schedule.Forwards = make([]plan.Forward, len(known.rows))
	for i, rows := range known.rows {
		f := &known.schedule.Forwards[i]
		schedule.Forwards[i] = plan.Forward{Rows: make([][]int64, len(rows)), Masks: make([][]int64, len(rows)), Seq: f.Seq, Masked: f.Masked}
		for k, at := range rows {
			v := &invokes[at[0]]
			schedule.Forwards[i].Rows[k] = v.Rows[at[1]]
			if len(v.Masks) > 0 {
				schedule.Forwards[i].Masks[k] = v.Masks[at[1]]
			}
		}
	}
	if err := r.ready(&schedule); err != nil {
		return nil, err
	}
	ok = true
	return r, nil
}

// rowsOf finds where the rows of forward passes come from.
func rowsOf(g *graph.Graph, s *plan.Schedule) [][][2]int {
	from := map[*int64][2]int{}
	for i := range g.Invokes {
		for k, row := range g.Invokes[i].Rows {
			from[&row[0]] = [2]int{i, k}
		}
	}
	out := make([][][2]int, len(s.Forwards))
	for i := range s.Forwards {
		for _, row := range s.Forwards[i].Rows {
			at, ok := from[&row[0]]
			if !ok {
				return nil
			}
			out[i] = append(out[i], at)
		}
	}
	return out
}
