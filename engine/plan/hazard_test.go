package plan

import (
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

// What nodes wait for does not outgrow the program, however often one invoke assigns a value that another one changes.
func TestHazardsAreFew(t *testing.T) {
	const times = 300
	node := func(kind graph.Kind, invoke int32, op string) graph.Node {
		return graph.Node{Kind: kind, Invoke: invoke, Op: op, Args: []graph.Arg{graph.Ref(0)}, Pos: -1}
	}
	g := &graph.Graph{Invokes: make([]graph.Invoke, 3), Nodes: []graph.Node{{Kind: graph.KindCall, Op: "aten::ones", Pos: -1}}}
	for range times {
		g.Nodes = append(g.Nodes, node(graph.KindWrite, 0, ""))
	}
	for i := range 2 * times {
		g.Nodes = append(g.Nodes, node(graph.KindCall, 1+int32(i/times), "aten::neg_"))
	}
	waits := hazards(g, &graph.Model{})
	sum := 0
	for n := range waits {
		sum += len(waits[n])
	}
	require.Less(t, sum, 2*len(g.Nodes))
	before := map[graph.ID]bool{} // that the first of the last invoke waits for, by way of others as well
	var visit func(id graph.ID)
	visit = func(id graph.ID) {
		for _, w := range waits[id] {
			if !before[w] {
				before[w] = true
				visit(w)
			}
		}
	}
	last := graph.ID(1 + 2*times)
	for id := last - times; id < last; id++ { // an invoke's own nodes come in their order
		visit(id)
	}
	visit(last)
	for id := graph.ID(1); id <= times; id++ {
		require.True(t, before[id], id)
	}
}
