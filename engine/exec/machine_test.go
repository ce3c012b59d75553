package exec_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/exec"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/pack"
	"github.com/nnsight-go/nnsight-go/engine/plan"
	"github.com/nnsight-go/nnsight-go/engine/plan/plantest"
	"github.com/stretchr/testify/require"
)

// matrix is a tensor in miniature: rows that may share storage with another's.
type matrix [][]float64

func zip(a, b matrix, f func(x, y float64) float64) matrix {
	out := make(matrix, max(len(a), len(b)))
	for i := range out {
		x, y := a[i%len(a)], b[i%len(b)]
		out[i] = make([]float64, max(len(x), len(y)))
		for j := range out[i] {
			out[i][j] = f(x[j%len(x)], y[j%len(y)])
		}
	}
	return out
}

// apply is the arithmetic of the miniature: what a schedule's calls and the oracle both use.
func apply(op string, a, b matrix) matrix {
	f := func(x, y float64) float64 { return x * y }
	if strings.HasPrefix(op, "aten::add") {
		f = func(x, y float64) float64 { return x + y }
	}
	out := zip(a, b, f)
	if strings.HasSuffix(op, "_") {
		for i := range a {
			copy(a[i], out[i])
		}
		return a
	}
	return out
}

func clone(a matrix) matrix {
	return zip(a, matrix{{1}}, func(x, y float64) float64 { return x * y })
}

const headWeight = 3

// drive runs a schedule over matrices, checking on the way that nothing is freed twice and that
// nothing is left at the end but what was saved.
func drive(t *testing.T, s *plan.Schedule) []matrix {
	m := exec.New[matrix](s)
	saved := walk(t, m, s)
	finished(t, m, s)
	return saved
}

// finished checks that nothing is left of a run but what its last schedule saved.
func finished(t *testing.T, m *exec.Machine[matrix], s *plan.Schedule) {
	alive := map[graph.ID]bool{}
	for _, r := range m.Results() {
		if !s.Borrowed[r.Value.Ref] {
			alive[r.Value.Ref] = true
		}
	}
	require.Len(t, m.Abort(nil), len(alive), "values left at the end")
}

// walk runs a schedule that the machine has got.
func walk(t *testing.T, m *exec.Machine[matrix], s *plan.Schedule) []matrix {
	defer func() {
		if t.Failed() {
			t.Log(s)
		}
	}()
	for _, src := range s.Sources {
		m.Bind(src.Slot, source(s, src))
	}
	value := func(a graph.Arg) matrix {
		if a.Kind == graph.ArgFloat {
			return matrix{{a.F}}
		}
		v, err := m.Value(a.Ref)
		require.NoError(t, err)
		return v
	}
	window := func(v matrix, w plan.Window) matrix {
		if w.BatchAxis >= 0 {
			v = v[w.Row : w.Row+w.Rows]
		}
		out := make(matrix, len(v))
		for i := range v {
			out[i] = v[i]
			if len(w.SeqAxes) > 0 {
				out[i] = v[i][w.Tok : w.Tok+w.Toks]
			}
		}
		return out
	}
	var dead []matrix
	for in := m.Next(); in != nil; in = m.Next() {
		var out matrix
		switch in.Op {
		case plan.OpCall:
			out = apply(in.Name, value(in.Args[0]), value(in.Args[1]))
		case plan.OpSetIndex:
			row := value(in.Args[0])[0]
			for j := range row {
				row[j] = in.Args[2].F
			}
		case plan.OpRows:
			out = clone(window(value(in.Args[0]), in.Window))
		case plan.OpClone:
			out = clone(value(in.Args[0]))
		case plan.OpSpread:
			for range in.Window.Batch {
				out = append(out, clone(value(in.Args[0]))[0])
			}
		case plan.OpPut:
			into, from := window(value(in.Args[0]), in.Window), value(in.Args[1])
			for i := range into {
				copy(into[i], from[i%len(from)])
			}
		case plan.OpExpect, plan.OpGuard:
		case plan.OpPack:
			of := value(in.Args[0])
			for _, token := range in.Tokens {
				toks := int64(len(of[0]))
				out = append(out, []float64{of[token/toks][token%toks]})
			}
		case plan.OpTake:
			var all matrix
			for i := range in.Args {
				all = append(all, value(in.Args[i])...)
			}
			for _, row := range in.Tokens {
				out = append(out, slices.Clone(all[row]))
			}
		case plan.OpUnpack:
			of := value(in.Args[0])
			for r := range in.Window.Rows {
				row := []float64{}
				for _, token := range of[r*in.Window.Toks : (r+1)*in.Window.Toks] {
					row = append(row, token[0])
				}
				out = append(out, row)
			}
		default:
			t.Fatalf("no rule for %s", in)
		}
		dead = m.Feed(out, dead)
	}
	var saved []matrix
	for _, r := range m.Results() {
		v, err := m.Value(r.Value.Ref)
		require.NoError(t, err)
		saved = append(saved, v)
	}
	return saved
}

func source(s *plan.Schedule, src plan.Source) matrix {
	if src.Kind == graph.KindParam {
		return matrix{{headWeight}}
	}
	f := s.Forwards[src.Forward]
	if src.Name == "position_ids" {
		out := matrix{make([]float64, f.Seq)}
		for j := range out[0] {
			out[0][j] = float64(j)
		}
		return out
	}
	out := make(matrix, len(f.Rows))
	for i, row := range f.Rows {
		out[i] = make([]float64, f.Seq)
		for j, id := range row {
			out[i][j] = float64(id)
		}
	}
	return out
}

// oracle runs each invoke alone, the way the contract words it: the invoke's lines interleaved
// with a plain forward pass.
func oracle(t *testing.T, g *graph.Graph, layers int) []matrix {
	values := make([]matrix, len(g.Nodes))
	var saved []matrix
	for invoke := range g.Invokes {
		var queue []int
		for n := range g.Nodes {
			if int(g.Nodes[n].Invoke) == invoke {
				queue = append(queue, n)
			}
		}
		seen := map[string]matrix{}
		operand := func(a graph.Arg) matrix {
			if a.Kind == graph.ArgFloat {
				return matrix{{a.F}}
			}
			return values[a.Ref]
		}
		hook := func(point string, v matrix) matrix {
			seen[point] = v
			for len(queue) > 0 {
				n := &g.Nodes[queue[0]]
				key := n.Path + [...]string{".input", ".output"}[n.Port&1]
				switch n.Kind {
				case graph.KindRead:
					if _, ok := seen[key]; !ok {
						return seen[point]
					}
					values[queue[0]] = seen[key]
				case graph.KindWrite:
					if _, ok := seen[key]; !ok {
						return seen[point]
					}
					require.Equal(t, point, key, "the generator writes too late")
					seen[key] = values[n.Args[0].Ref]
				case graph.KindCall:
					values[queue[0]] = apply(n.Op, operand(n.Args[0]), operand(n.Args[1]))
				case graph.KindSetIndex:
					row := values[n.Args[0].Ref][0]
					for j := range row {
						row[j] = n.Args[2].F
					}
				case graph.KindModule:
					v := values[n.Args[0].Ref]
					if n.Path == "head" {
						v = apply("aten::mul", v, matrix{{headWeight}})
					} else {
						var i int
						_, err := fmt.Sscanf(n.Path, "l.%d", &i)
						require.NoError(t, err)
						v = apply("aten::add", v, apply("aten::mul", v, matrix{{float64(i + 2)}}))
					}
					values[queue[0]] = v
				case graph.KindItem:
					values[queue[0]] = values[n.Args[0].Ref]
				case graph.KindSave:
					saved = append(saved, values[n.Args[0].Ref])
				}
				queue = queue[1:]
			}
			return seen[point]
		}
		rows := matrix{}
		for _, r := range g.Invokes[invoke].Rows {
			row := make([]float64, len(r))
			for j, id := range r {
				row[j] = float64(id)
			}
			rows = append(rows, row)
		}
		positions := matrix{make([]float64, len(rows[0]))}
		for j := range positions[0] {
			positions[0][j] = float64(j)
		}
		mul := func(v matrix, f float64) matrix { return apply("aten::mul", v, matrix{{f}}) }
		x := hook("emb.output", mul(hook("emb.input", rows), 1))
		p := hook("pos.output", mul(hook("pos.input", positions), 0.5))
		x = apply("aten::add", x, p)
		for i := range layers {
			path := fmt.Sprintf("l.%d", i)
			x = hook(path+".input", x)
			a := hook(path+".act.output", mul(hook(path+".act.input", x), float64(i+2)))
			x = hook(path+".output", apply("aten::add", x, a))
		}
		hook("head.output", mul(hook("head.input", x), headWeight))
		require.Empty(t, queue)
	}
	return saved
}

// randomTrace writes a legal trace of several invokes: reads in any order, writes and changes in
// place where the pass stands, values of earlier invokes, modules called on values.
func randomTrace(r *rand.Rand, layers int) string {
	points := []string{"emb.input", "emb.output", "pos.input", "pos.output"}
	for i := range layers {
		points = append(points, fmt.Sprintf("l.%d.input", i), fmt.Sprintf("l.%d.act.input", i),
			fmt.Sprintf("l.%d.act.output", i), fmt.Sprintf("l.%d.output.0", i))
	}
	points = append(points, "head.input", "head.output")
	name := func(p string) string {
		if strings.HasSuffix(p, ".input") {
			return p + ".args.0"
		}
		return p
	}
	var b strings.Builder
	toks := 1 + r.IntN(4)
	sameLength := r.IntN(2) == 0
	count := 0
	var shared []string // values later invokes may use, all of [1, toks]
	for range 1 + r.IntN(4) {
		if !sameLength {
			toks, shared = 1+r.IntN(4), nil
		}
		fmt.Fprintf(&b, "invoke %d\n", toks)
		at := 0
		var own []string
		for range 1 + r.IntN(8) {
			at = min(at+r.IntN(5), len(points)-1)
			v := fmt.Sprintf("v%d", count)
			count++
			fmt.Fprintf(&b, "%s = %s\n", v, name(points[at]))
			switch r.IntN(7) {
			case 0:
				fmt.Fprintf(&b, "%s[0, :] = %d\n", v, r.IntN(5))
			case 1:
				fmt.Fprintf(&b, "mul_ %s %d\n", v, 2+r.IntN(3))
			case 2:
				if from := append(append([]string{}, own...), shared...); len(from) > 0 {
					fmt.Fprintf(&b, "%s = %s\n", name(points[at]), from[r.IntN(len(from))])
				}
			case 3:
				fmt.Fprintf(&b, "w%d = add %s 1\nadd_ w%d 2\n", count, v, count)
				own = append(own, fmt.Sprintf("w%d", count))
			case 4:
				fmt.Fprintf(&b, "w%d = call %s %s\n", count, []string{"head", "l.0", "l.1"}[r.IntN(3)], v)
				own = append(own, fmt.Sprintf("w%d", count))
			case 5:
				fmt.Fprintf(&b, "w%d = %s\n", count, name(points[r.IntN(at+1)]))
				own = append(own, fmt.Sprintf("w%d", count))
			}
			fmt.Fprintf(&b, "k%d = mul %s 1\n", count, v)
			own = append(own, fmt.Sprintf("k%d", count))
			if r.IntN(2) == 0 {
				fmt.Fprintf(&b, "save %s\n", v)
			}
		}
		fmt.Fprintf(&b, "save %s\n", own[r.IntN(len(own))])
		shared = append(shared, own...)
	}
	return b.String()
}

// TestRandomTraces holds batches of invokes against each invoke run alone.
func TestRandomTraces(t *testing.T) {
	const layers = 3
	m := plantest.Model(layers)
	ran, passes := 0, 0
	for seed := range uint64(20000) {
		text := randomTrace(rand.New(rand.NewPCG(seed, 1)), layers)
		g := plantest.Parse(t, text)
		s, err := plan.Splice(g, plan.Models{Causal: m, Masked: m})
		require.NoError(t, err, "seed %d:\n%s", seed, text)
		want := oracle(t, plantest.Parse(t, text), layers)
		require.Equal(t, want, drive(t, s), "seed %d:\n%s\n%s", seed, text, s)
		ran++
		if len(s.Forwards) > 1 {
			passes++
		}
	}
	require.Positive(t, passes, "no trace needed a second pass: the generator is too tame")
	t.Logf("%d traces, %d of them in several passes", ran, passes)
}

// TestPackedTraces holds random traces whose tokens are packed against each invoke run alone. Their prompts are alike, so
// that there are tokens to share.
func TestPackedTraces(t *testing.T) {
	const layers = 3
	m := plantest.Model(layers)
	packed := 0
	for seed := range uint64(20000) {
		r := rand.New(rand.NewPCG(seed, 3))
		text := randomTrace(r, layers)
		parse := func() *graph.Graph {
			g := plantest.Parse(t, text)
			ids := rand.New(rand.NewPCG(seed, 4))
			for i := range g.Invokes {
				for _, row := range g.Invokes[i].Rows {
					for j := range row {
						row[j] = 1 + ids.Int64N(2)
					}
				}
			}
			return g
		}
		s, err := plan.Splice(parse(), plan.Models{Causal: m, Masked: m})
		require.NoError(t, err, "seed %d:\n%s", seed, text)
		before := s.String()
		p, _ := pack.Tokens(s)
		if p != s {
			packed++
			require.Equal(t, before, s.String(), "the schedule that was given is another one now")
		}
		want := oracle(t, parse(), layers)
		require.Equal(t, want, drive(t, p), "seed %d:\n%s\n%s", seed, text, before)
	}
	require.Greater(t, packed, 5000, "hardly any trace has tokens to share: the generator is too tame")
	t.Logf("%d traces were packed", packed)
}

// TestPausedTraces asks for values of random traces before they have been written to their end. It
// holds them against the trace as far as it has been written, and those of the end against the whole,
// with each invoke run alone.
func TestPausedTraces(t *testing.T) {
	const layers = 3
	m := plantest.Model(layers)
	models := plan.Models{Causal: m, Masked: m}
	pauses, restarts, passes := 0, 0, 0
	for seed := range uint64(4000) {
		r := rand.New(rand.NewPCG(seed, 2))
		text := randomTrace(r, layers)
		whole := plantest.Parse(t, text)
		p, machine := plan.New(models), (*exec.Machine[matrix])(nil)
		// extend runs the first n nodes and gives the values saved since the last time.
		extend := func(n int, end bool) []matrix {
			g := &graph.Graph{Nodes: whole.Nodes[:n], Invokes: whole.Invokes[:whole.Nodes[n-1].Invoke+1]}
			if end {
				g.Invokes = whole.Invokes
			}
			s, err := p.Extend(g, end)
			if err == plan.ErrRestart {
				restarts++
				p, machine = plan.New(models), nil
				s, err = p.Extend(g, end)
			}
			require.NoError(t, err, "seed %d, %d nodes:\n%s", seed, n, text)
			if machine == nil {
				machine = exec.New[matrix](s)
			} else {
				machine.Extend(s, nil)
			}
			saved := walk(t, machine, s)
			if end {
				finished(t, machine, s)
			}
			passes = max(passes, len(s.Forwards))
			return saved
		}
		var again []graph.Node // saves of all values that were asked for
		for n, node := range whole.Nodes {
			if node.Kind == graph.KindSave {
				again = append(again, node)
			}
			if node.Kind != graph.KindSave || r.IntN(3) == 0 {
				continue
			}
			pauses++
			want := oracle(t, &graph.Graph{Nodes: whole.Nodes[:n+1], Invokes: whole.Invokes}, layers)
			got := extend(n+1, false)
			require.Equal(t, want[len(want)-1], got[len(got)-1], "seed %d, %d nodes:\n%s", seed, n+1, text)
		}
		want := oracle(t, plantest.Parse(t, text), layers)
		whole.Nodes = append(whole.Nodes, again...)
		got := extend(len(whole.Nodes), true)
		require.Equal(t, want, got[len(got)-len(again):], "seed %d:\n%s", seed, text)
	}
	require.Positive(t, restarts, "no trace had to be planned anew: the generator is too tame")
	require.Greater(t, passes, 1)
	t.Logf("%d pauses, %d plans begun anew, up to %d passes", pauses, restarts, passes)
}

func TestMachineEnds(t *testing.T) {
	m := plantest.Model(2)
	s, err := plan.Splice(plantest.Parse(t, "invoke 2\nh = l.1.output.0\nsave h"), plan.Models{Causal: m, Masked: m})
	require.NoError(t, err)
	machine := exec.New[int](s)
	for i, src := range s.Sources {
		machine.Bind(src.Slot, 100+i)
	}
	for range 3 {
		require.NotNil(t, machine.Next())
		machine.Feed(1, nil)
	}
	require.False(t, machine.Done())
	require.Nil(t, machine.Results())
	held := machine.Abort(nil)
	require.NotEmpty(t, held)
	require.Empty(t, machine.Abort(nil), "nothing comes back twice")
	require.Nil(t, machine.Next())
	_, err = machine.Value(0)
	require.Error(t, err)
}

// A run whose results are known has nothing else to give back.
func TestSkip(t *testing.T) {
	s := &plan.Schedule{
		Slots:    4,
		Borrowed: []bool{false, true, false, false},
		Instrs:   []plan.Instr{{Out: 2, Frees: []plan.Slot{0}}, {Out: 3}},
		Saved:    []plan.Saved{{Node: 7, Value: graph.Ref(3)}, {Node: 8, Value: graph.Ref(1)}},
	}
	for performed := range 3 {
		m := exec.New[string](s)
		m.Bind(0, "input")
		m.Bind(1, "weight")
		var dead []string
		for i := range performed {
			dead = m.Feed(fmt.Sprint("made ", i), dead)
		}
		dead = m.Skip(map[plan.Slot]string{3: "known"}, dead)
		want := map[int][]string{0: {"input"}, 1: {"input", "made 0"}, 2: {"input", "made 0", "made 1"}}[performed]
		require.Equal(t, want, dead)
		require.True(t, m.Done())
		require.Nil(t, m.Next())
		require.Len(t, m.Results(), 2)
		for slot, value := range map[plan.Slot]string{3: "known", 1: "weight"} {
			got, err := m.Value(slot)
			require.NoError(t, err)
			require.Equal(t, value, got)
		}
		require.Equal(t, []string{"known"}, m.Abort(nil))
	}
}
