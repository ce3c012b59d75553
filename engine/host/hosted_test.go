package host

import (
	"fmt"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

// chain is a hosted model of n modules, each called after the one before it.
func chain(t testing.TB, n int) *Native {
	points := []HostedPoint{}
	for i := range n {
		path := fmt.Sprintf("layers.%d", i)
		points = append(points, HostedPoint{Path: path, Port: "input", Leaves: []string{"args.0"}},
			HostedPoint{Path: path, Port: "output", Leaves: []string{""}})
	}
	m, err := OpenHosted(points)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

// edited saves what stands at module 1 before it is filled with 7, and what module 3 gives.
func edited() *program {
	p := &program{}
	p.on([]int64{0})
	h := p.read("layers.1", "")
	p.save(p.call("add", h, graph.Int(1), graph.Int(1)))
	p.fill(h, 7)
	p.write("layers.1", "", h)
	p.save(p.read("layers.3", ""))
	return p
}

// hosts runs a trace as a forward pass would: each module gives its number, and others' changes are noted.
func hosts(t testing.TB, m *Native, p *program) (saved [][]float32, given map[int][]float32) {
	r, err := m.Start(&p.Graph, nil)
	require.NoError(t, err)
	given = map[int][]float32{}
	for {
		done, err := r.Step(0)
		require.NoError(t, err)
		for leaf, x := range r.Given() {
			require.Zero(t, leaf)
			given[len(given)], err = x.Float32s()
			require.NoError(t, err)
			x.Free()
		}
		if done {
			break
		}
		at, ok := r.Wanted()
		require.True(t, ok)
		require.NoError(t, r.Feed([]aten.Tensor{full(t, float32(at.Point), 2)}))
	}
	_, tensors, err := r.Results()
	require.NoError(t, err)
	for _, x := range tensors {
		values, err := x.Float32s()
		require.NoError(t, err)
		saved = append(saved, values)
		x.Free()
	}
	return saved, given
}

func TestAHostedRunStopsWhereItNeedsAnAccessPoint(t *testing.T) {
	saved, given := hosts(t, chain(t, 5), edited())
	require.Equal(t, [][]float32{{4, 4}, {7, 7}}, saved) // outputs of modules 1 and 3 are points 3 and 7
	require.Equal(t, map[int][]float32{0: {7, 7}}, given)
}

func TestATraceChangesInPlaceWhatAnEditHasGiven(t *testing.T) {
	p := &program{}
	p.Invokes = append(p.Invokes, graph.Invoke{Edit: true})
	p.write("layers.1", "", p.call("add", p.read("layers.1", ""), graph.Int(1), graph.Int(1)))
	p.on([]int64{0})
	h := p.read("layers.1", "")
	p.save(p.call("add", h, graph.Int(1), graph.Int(1)))
	p.fill(h, 7)
	p.save(p.read("layers.3", ""))
	saved, given := hosts(t, chain(t, 5), p)
	require.Equal(t, [][]float32{{5, 5}, {7, 7}}, saved)
	require.Equal(t, map[int][]float32{0: {7, 7}}, given)
}

func TestAHostedRunTakesWhatItWantsAlone(t *testing.T) {
	p := edited()
	r, err := chain(t, 5).Start(&p.Graph, nil)
	require.NoError(t, err)
	defer r.Free()
	require.Equal(t, fault.Handle, fault.As(r.Feed([]aten.Tensor{full(t, 1, 2)})).Code)
	_, err = r.Step(0)
	require.NoError(t, err)
	require.NoError(t, r.Feed([]aten.Tensor{full(t, 1, 2)}))
	require.Equal(t, fault.Handle, fault.As(r.Feed([]aten.Tensor{full(t, 1, 2)})).Code)
}

func TestAccessPointsThatAreNone(t *testing.T) {
	for _, points := range [][]HostedPoint{
		{{Path: "a", Port: "beside"}},
		{{Path: "a", Port: "input"}, {Path: "a", Port: "input"}},
	} {
		_, err := OpenHosted(points)
		require.Equal(t, fault.Input, fault.As(err).Code)
	}
	_, err := ReadHosted([]byte("{"))
	require.Equal(t, fault.Input, fault.As(err).Code)
}

func BenchmarkHostedBegin(b *testing.B) {
	m, p := chain(b, 37), edited()
	for b.Loop() {
		r, err := m.Start(&p.Graph, nil)
		if err != nil {
			b.Fatal(err)
		}
		r.Free()
	}
}
