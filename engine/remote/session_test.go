package remote

import (
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

func session(steps ...Step) Request {
	return Request{Version: 1, Model: "m", Kind: Session, Steps: steps}
}

// step is one that runs a graph of its own, on results of earlier steps.
func step(name string, places ...Place) Step {
	s := Step{Program: []string{name}, Constants: []Constant{}, End: true, Want: []string{WantResults}}
	for _, at := range places {
		s.Constants = append(s.Constants, Constant{Result: &at})
	}
	return s
}

func TestASessionUsesWhatItsEarlierTracesGave(t *testing.T) {
	m := open(t)
	three, err := aten.FromFloat32s([]float32{3})
	require.NoError(t, err)
	defer three.Free()
	p := &Performer{Model: m}
	first := Step{Program: []string{"g"}, Constants: []Constant{{Tensor: "c"}}, End: true, Want: []string{WantResults}, Unsent: []int{1}}
	// the second multiplies what the block gives by what was twice that; the third by what came of it
	request := session(first, step("g", Place{0, 1}), step("g", Place{1, 2}))
	parts := map[string][]byte{"g": graph.Encode(doubled())}
	live := int64(0)
	for range 3 {
		out, err := perform(t, p, wire(t, request, parts, map[string]aten.Tensor{"c": three}))
		require.NoError(t, err)
		r, values := response(t, out)
		require.Equal(t, []int{0, 1, 2}, []int{r.Steps[0].Step, r.Steps[1].Step, r.Steps[2].Step})
		require.Len(t, values[0], 2, "what is unsent stays away")
		for i, x := range values[0][0] {
			require.InDelta(t, 3*x, values[0][1][i], 1e-6)
			require.InDelta(t, 2*x*x, values[1][2][i], 1e-5)
			require.InDelta(t, 2*x*x*x, values[2][2][i], 1e-4)
		}
		if live == 0 {
			live = aten.Live()
		}
		require.Equal(t, live, aten.Live())
	}
}

func TestASessionThatMakesNoSense(t *testing.T) {
	p := &Performer{Model: open(t)}
	parts := map[string][]byte{"g": graph.Encode(doubled())}
	plain := func() Step { return step("g") }
	open := plain()
	open.End = false
	unsent := plain()
	unsent.Unsent = []int{3}
	negative := plain()
	negative.Unsent = []int{-1}
	alone := trace(step("g", Place{0, 0}))
	live := aten.Live()
	for name, r := range map[string]Request{
		"a later step":        session(step("g", Place{1, 0}), plain()),
		"itself":              session(plain(), step("g", Place{1, 0})),
		"no step":             session(plain(), step("g", Place{-1, 0})),
		"far away":            session(plain(), step("g", Place{1 << 40, 0})),
		"no result":           session(plain(), step("g", Place{0, 3})),
		"a negative result":   session(plain(), step("g", Place{0, -1})),
		"an open trace":       session(open, plain()),
		"unsent of nothing":   session(unsent),
		"unsent of less":      session(negative),
		"a trace that refers": alone,
		"nothing":             session(),
		"very many":           session(make([]Step, MaxTraces+1)...),
	} {
		_, err := perform(t, p, wire(t, r, parts, nil))
		require.Error(t, err, name)
		require.Equal(t, fault.Remote, fault.As(err).Code, name)
		require.Equal(t, live, aten.Live(), name)
	}
}

// A weight that a trace keeps is no way to write to it from a later one.
func TestAWeightCannotBeChangedThroughAResult(t *testing.T) {
	m := open(t)
	m.Protect(true) // as a server does
	p := &Performer{Model: m}
	weight := "transformer.ln_f.weight"
	before := numbers(t, p, weight)
	save := func(id graph.ID) graph.Node {
		return graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(id)}, Pos: -1}
	}
	rows := []graph.Invoke{{Rows: [][]int64{{1}}}}
	keeps := &graph.Graph{Invokes: rows, Nodes: []graph.Node{{Kind: graph.KindConst, Pos: -1}, save(0)}}
	writes := &graph.Graph{Invokes: rows, Nodes: []graph.Node{{Kind: graph.KindConst, Pos: -1},
		{Kind: graph.KindCall, Op: "aten::mul_.Tensor", Args: []graph.Arg{graph.Ref(0), graph.Ref(0)}, Pos: -1}, save(1)}}
	first := step("keeps")
	first.Constants = []Constant{{Parameter: weight}}
	parts := map[string][]byte{"keeps": graph.Encode(keeps), "writes": graph.Encode(writes)}
	_, err := perform(t, p, wire(t, session(first, step("writes", Place{0, 0})), parts, nil))
	require.Error(t, err)
	require.Equal(t, 1, fault.As(err).Step)
	require.Equal(t, before, numbers(t, p, weight))
}

func numbers(t *testing.T, p *Performer, weight string) []float32 {
	w, err := p.Model.Constant(weight)
	require.NoError(t, err)
	defer w.Free()
	found, err := w.Float32s()
	require.NoError(t, err)
	return found
}

func TestASessionIsHeldToLimitsAsAWhole(t *testing.T) {
	m := open(t)
	m.Protect(true)
	three, err := aten.FromFloat32s([]float32{3})
	require.NoError(t, err)
	defer three.Free()
	one := Step{Program: []string{"g"}, Constants: []Constant{{Tensor: "c"}}, End: true, Want: []string{WantResults}}
	data := func(steps ...Step) []byte {
		parts := map[string][]byte{"g": graph.Encode(doubled())}
		return wire(t, session(steps...), parts, map[string]aten.Tensor{"c": three})
	}
	work := 1.0 // the least with which one trace runs, within a tenth
	for ; ; work *= 1.1 {
		if _, err = perform(t, &Performer{Model: m, Limits: Limits{Work: work}}, data(one)); err == nil {
			break
		}
	}
	p := &Performer{Model: m, Limits: Limits{Work: 2.5 * work}}
	_, err = perform(t, p, data(one, one))
	require.NoError(t, err)
	live := aten.Live()
	_, err = perform(t, p, data(one, step("g", Place{0, 0}), one, one))
	require.ErrorContains(t, err, "multiplications")
	require.Equal(t, live, aten.Live())
}
