package host

import (
	"fmt"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

// lastLogits is a trace that saves the last token's logits of each prompt, an invoke each.
func lastLogits(prompts ...[]int64) *graph.Graph {
	all := graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{graph.Null(), graph.Null(), graph.Null()}}
	g := &graph.Graph{}
	for i, p := range prompts {
		at := graph.ID(len(g.Nodes))
		g.Invokes = append(g.Invokes, graph.Invoke{Rows: [][]int64{p}})
		g.Nodes = append(g.Nodes,
			graph.Node{Kind: graph.KindRead, Path: "lm_head", Port: graph.PortOutput, Invoke: int32(i), Pos: -1},
			graph.Node{Kind: graph.KindIndex, Args: []graph.Arg{graph.Ref(at), graph.Tuple(all, graph.Int(-1))}, Invoke: int32(i), Pos: -1},
			graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(at + 1)}, Invoke: int32(i), Pos: -1})
	}
	return g
}

func TestATraceInALoopIsPlannedOnce(t *testing.T) {
	dir := enginetest.Directory(t, roomy, 1)
	m, fresh := opened(t, dir, Options{Prepack: -1}), opened(t, dir, Options{Prepack: -1})
	run := func(m *Native, known bool, prompts ...[]int64) {
		t.Helper()
		data := graph.Encode(lastLogits(prompts...))
		before := m.plans.recent.Len()
		r, err := m.BeginBytes(data, nil, true)
		require.NoError(t, err)
		if known {
			require.Equal(t, before, m.plans.recent.Len())
		} else {
			require.Equal(t, before+1, m.plans.recent.Len())
		}
		got := finished(t, r)
		whole, err := fresh.Start(lastLogits(prompts...), nil)
		require.NoError(t, err)
		for i, want := range finished(t, whole) {
			near(t, want, got[i], 1e-5)
		}
	}
	run(m, false, []int64{1, 2, 3})
	run(m, true, []int64{1, 2, 3})
	run(m, true, []int64{7, 7, 9}) // one row: other tokens change nothing
	run(m, false, []int64{1, 2})
	run(m, false, []int64{1, 2, 3}, []int64{1, 2, 4})
	run(m, true, []int64{5, 6, 7}, []int64{5, 6, 8}) // rows begin alike for as long
	run(m, false, []int64{5, 6, 7}, []int64{5, 9, 7})
	run(m, false, []int64{5, 6, 7}, []int64{5, 6, 7})
	m.Apart(true)
	run(m, false, []int64{1, 2, 3})
	m.Apart(false)
	_, err := m.BeginBytes(graph.Encode(lastLogits([]int64{1, 2, 300})), nil, true)
	require.ErrorContains(t, err, "vocabulary")
	_, err = m.BeginBytes([]byte("nonsense"), nil, true)
	require.Error(t, err)
	require.NoError(t, m.Close())
	before := aten.Live()
	_, err = m.BeginBytes(graph.Encode(lastLogits([]int64{1, 2, 3})), nil, true)
	require.ErrorContains(t, err, "closed")
	require.Equal(t, before, aten.Live())
}

func TestOldPlansMakeRoom(t *testing.T) {
	m := opened(t, enginetest.Directory(t, roomy, 1), Options{})
	begin := func(prompts ...[]int64) {
		r, err := m.BeginBytes(graph.Encode(lastLogits(prompts...)), nil, true)
		require.NoError(t, err)
		r.Free()
	}
	first := []int64{1}
	begin(first)
	one := m.plans.instrs
	require.Positive(t, one)
	for n := 2; n < 20; n++ {
		var prompts [][]int64
		for i := range n * 150 {
			prompts = append(prompts, []int64{int64(i % 300), int64(n)})
		}
		begin(prompts...)
		begin(first) // in use
		require.LessOrEqual(t, m.plans.instrs, keptInstrs, fmt.Sprint(n))
	}
	require.Less(t, m.plans.recent.Len(), 19)
	before := m.plans.recent.Len()
	begin(first)
	require.Equal(t, before, m.plans.recent.Len(), "what is in use stays")
}

// Lines that nobody observes come into no schedule, and what they take counts all the same.
func TestPlansOfManyLines(t *testing.T) {
	m := opened(t, enginetest.Directory(t, roomy, 1), Options{})
	kept := 0 // lines
	for n := range 40 {
		g := lastLogits([]int64{1})
		for range 20000 {
			g.Nodes = append(g.Nodes, graph.Node{Kind: graph.KindCall, Op: "aten::add", Args: []graph.Arg{graph.Ref(0), graph.Int(1)}, Pos: -1})
		}
		g.Nodes[len(g.Nodes)-1].Args = []graph.Arg{graph.Ref(0), graph.Int(int64(n))}
		r, err := m.BeginBytes(graph.Encode(g), nil, true)
		require.NoError(t, err)
		r.Free()
	}
	for at := m.plans.recent.Front(); at != nil; at = at.Next() {
		kept += len(at.Value.(*planned).graph.Nodes)
	}
	require.Less(t, kept, 200000)
}
