package arch_test

import (
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
	"github.com/stretchr/testify/require"
)

// Every access point of a real model can be read by invokes of different lengths, and every module
// that takes tensors by itself can be called on one.
func TestEveryPointCanBeRead(t *testing.T) {
	for name, config := range tiny {
		_, g := build(t, config)
		models := plan.Models{Causal: g.Causal, Masked: g.Masked}
		for _, rows := range [][][]int64{{{1, 2, 3}}, {{1, 2, 3}, {4}}} {
			trace := &graph.Graph{Invokes: []graph.Invoke{{Rows: rows}, {Rows: [][]int64{{1, 2}}}}}
			add := func(n graph.Node) graph.ID {
				n.Pos = -1
				trace.Nodes = append(trace.Nodes, n)
				return graph.ID(len(trace.Nodes) - 1)
			}
			for invoke := range trace.Invokes {
				for _, p := range g.Causal.Points {
					p.Tree.Refs(func(id graph.ID) {
						m := &g.Causal.Nodes[id]
						read := add(graph.Node{Kind: graph.KindRead, Path: p.Path, Port: p.Port, Leaf: m.Leaf, Invoke: int32(invoke)})
						add(graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(read)}, Invoke: int32(invoke)})
					})
				}
			}
			s, err := plan.Splice(trace, models)
			require.NoError(t, err, name)
			require.Len(t, s.Saved, len(trace.Nodes)/2)
		}
	}
}

func TestModulesCanBeCalled(t *testing.T) {
	for name, paths := range map[string][]string{
		"gpt2": {"lm_head", "transformer.ln_f", "transformer.h.1", "transformer.h.0.attn", "transformer.h.0.mlp",
			"transformer.h.0.mlp.act", "transformer.wte"},
		"llama": {"lm_head", "model.norm", "model.layers.1", "model.layers.0.self_attn", "model.layers.0.mlp", "model.embed_tokens"},
	} {
		_, g := build(t, tiny[name])
		for _, path := range paths {
			trace := &graph.Graph{Invokes: []graph.Invoke{{Rows: [][]int64{{1, 2, 3}}}}}
			trace.Nodes = []graph.Node{
				{Kind: graph.KindRead, Path: g.Causal.Modules[1].Path + ".h.0", Port: graph.PortOutput, Leaf: "0"},
				{Kind: graph.KindModule, Path: path, Args: []graph.Arg{graph.Ref(0)}},
				{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(1)}},
			}
			if name == "llama" {
				trace.Nodes[0].Path = "model.layers.0"
			}
			_, err := plan.Splice(trace, plan.Models{Causal: g.Causal, Masked: g.Masked})
			require.NoError(t, err, path)
		}
	}
}
