package host

import (
	"math/rand/v2"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

// step runs a step of a generation to its end, and gives its multiplications and the bytes of what it saves.
func step(t *testing.T, c *Cache, g *graph.Graph) (work float64, output int64) {
	own := *g
	r, err := c.Begin(&own, nil, true)
	require.NoError(t, err)
	defer r.Free()
	_, err = r.Step(0)
	require.NoError(t, err)
	work = r.Spent()
	_, tensors, err := r.Results()
	require.NoError(t, err)
	for _, x := range tensors {
		output += x.Bytes()
	}
	aten.FreeAll(tensors)
	logits, err := c.TakeLogits()
	require.NoError(t, err)
	logits.Free()
	return work, output
}

func TestWhatStepsTakeIsKnownBefore(t *testing.T) {
	for name, config := range map[string]string{"gpt2": enginetest.GPT2, "llama": enginetest.Llama} {
		m := open(t, config)
		m.Protect(true)
		m.LimitWork(1e15)
		p := &program{}
		block := map[string]string{"gpt2": "transformer.h.1", "llama": "model.layers.1"}[name]
		h := p.read(block, "0")
		p.fill(h, 1)
		p.save(p.call("matmul", h, p.call("transpose.int", h, graph.Int(1), graph.Int(2))))
		saving := &graph.Graph{Nodes: p.Nodes, Positions: p.Positions}
		r := rand.New(rand.NewPCG(1, 2))
		for range 10 {
			rows := make([][]int64, 1+r.IntN(4))
			for i := range rows {
				rows[i] = make([]int64, 1+r.IntN(12))
			}
			c, err := m.NewCache(rows, nil, 8)
			require.NoError(t, err)
			growth, err := m.NewGrowth(rows, nil, 8)
			require.NoError(t, err)
			kept := int64(0)
			for _, x := range c.tensors {
				kept += x.Bytes()
			}
			require.Equal(t, kept, growth.Kept)
			for at := range 4 {
				program := &graph.Graph{}
				if r.IntN(2) == 0 {
					program = &graph.Graph{Nodes: append([]graph.Node{}, saving.Nodes...), Invokes: []graph.Invoke{{}}, Positions: saving.Positions}
				}
				cost, err := growth.Step(at, program, nil, true)
				require.NoError(t, err)
				require.True(t, cost.Exact)
				plain, err := growth.Plain(at)
				require.NoError(t, err)
				work, output := step(t, c, program)
				require.InEpsilon(t, work, cost.Work, 1e-9, "%s, step %d of %v", name, at, rows)
				require.Equal(t, output, cost.Output)
				if len(program.Nodes) == 0 {
					require.GreaterOrEqual(t, plain.Work, work)
					require.Less(t, plain.Work, 3*work)
				}
				require.NoError(t, c.Append(make([]int64, len(rows))))
			}
			c.Free()
		}
	}
}
