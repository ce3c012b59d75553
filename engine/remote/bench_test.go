package remote

import (
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
	"github.com/stretchr/testify/require"
)

// BenchmarkEstimate is a small trace with and without an estimate before it: one that was seen before, and one that is new
// each time.
func BenchmarkEstimate(b *testing.B) {
	config := `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 384,
		"n_positions": 64, "vocab_size": 1000}`
	m, err := host.Open(enginetest.Directory(b, config, 1), host.Options{Prepack: -1, Load: true})
	require.NoError(b, err)
	defer func() { require.NoError(b, m.Close()) }()
	request := trace(Step{Program: []string{"g"}, End: true, Want: []string{"results"}})
	for name, limits := range map[string]Limits{"without": {}, "with": {Work: 1e16, Memory: 1 << 33, Output: 1 << 28}} {
		for _, kind := range []string{"known", "new"} {
			b.Run(kind+" "+name, func(b *testing.B) {
				p := &Performer{Model: m, Limits: limits}
				for i := range b.N {
					g := doubled()
					g.Nodes = append(g.Nodes[:2:2], graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(1)}, Pos: -1})
					g.Invokes[0].Rows = [][]int64{{1, 2, 3, 4, 5, 6, 7, 8}}
					if kind == "new" {
						g.Nodes[1].Args[1] = graph.Float(float64(i))
						g.Nodes[1].Op = "aten::add.Scalar"
					}
					g.Nodes[0].Path = "transformer.h.11"
					r, err := Parse(wire(b, request, map[string][]byte{"g": graph.Encode(g)}, nil), limits)
					require.NoError(b, err)
					_, err = p.Perform(b.Context(), "", r)
					require.NoError(b, err)
				}
			})
		}
	}
}

// BenchmarkGenerations is 16 generations of 16 tokens whose lines change and save a value at each step, one after the other
// and in the same steps.
func BenchmarkGenerations(b *testing.B) {
	config := `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768,
		"n_positions": 64, "vocab_size": 1000}`
	m, err := host.Open(enginetest.Directory(b, config, 1), host.Options{Prepack: -1, Load: true})
	require.NoError(b, err)
	defer func() { require.NoError(b, m.Close()) }()
	p := &Performer{Model: m}
	for _, speaks := range []bool{false, true} {
		var all []*Request
		for i := range 16 {
			s := gen.Settings{MaxNewTokens: 16, Temperature: 1, LengthPenalty: 1, EarlyStopping: "false"}
			r := Request{Version: 1, Model: "m", Kind: Generate, Prompt: &Prompt{Rows: [][]int64{{1, 2, 3, int64(i)}}}, Settings: &s}
			g := &graph.Graph{Invokes: []graph.Invoke{{}}}
			if speaks {
				g.Nodes = append(doubled().Nodes[:1:1],
					graph.Node{Kind: graph.KindCall, Op: "aten::mul_.Scalar", Args: []graph.Arg{graph.Ref(0), graph.Float(1.01)}, Pos: -1},
					graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(0)}, Pos: -1})
			}
			for range 16 {
				r.Steps = append(r.Steps, Step{Program: []string{"g"}, End: true, Want: []string{WantResults, WantDrawn}})
			}
			one, err := Parse(wire(b, r, map[string][]byte{"g": graph.Encode(g)}, nil), Limits{})
			require.NoError(b, err)
			require.NotNil(b, one.Company())
			all = append(all, one)
		}
		name := map[bool]string{false: "plain", true: "with lines"}[speaks]
		b.Run(name+" alone", func(b *testing.B) {
			for range b.N {
				for _, r := range all {
					_, err := p.Perform(b.Context(), "", r)
					require.NoError(b, err)
				}
			}
		})
		b.Run(name+" together", func(b *testing.B) {
			for range b.N {
				_, err := p.PerformTogether(b.Context(), all)
				require.NoError(b, err)
			}
		})
	}
}
