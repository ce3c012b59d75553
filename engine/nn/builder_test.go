package nn

import (
	"encoding/json"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

// An access point's value goes on as its mark, so that what is written there is felt.
func TestMarkedValuesGoOn(t *testing.T) {
	m, _, err := Build(Variant{}, func(b *Builder) {
		root := b.Model("M")
		emb := NewEmbedding(root, "emb", 5, 4, nil)
		drop := NewDropout(root, "drop", "0.1")
		ids := b.InputIDs()
		root.Enter(Kwarg("input_ids", &ids))
		x := drop.Forward(emb.Forward(ids))
		y := x.Neg()
		root.LeaveTuple(&y, nil)
	})
	require.NoError(t, err)

	at := func(path string, port graph.Port) graph.Arg {
		i, ok := m.Point(path, port)
		require.True(t, ok, path)
		return m.Points[i].Tree
	}
	out := at("drop", graph.PortOutput)
	neg := m.Nodes[len(m.Nodes)-2]
	require.Equal(t, "aten::neg", neg.Op)
	require.Equal(t, out.Ref, neg.Args[0].Ref, "the call after the module uses its marked output")
	require.Equal(t, at("drop", graph.PortInput).L[0].L[0].Ref, m.Nodes[out.Ref].Args[0].Ref,
		"dropout adds no operation: its output is its input")

	tuple := at("", graph.PortOutput)
	require.Equal(t, graph.ArgTuple, tuple.Kind)
	require.Equal(t, graph.ArgRef, tuple.L[0].Kind)
	require.Equal(t, graph.ArgNone, tuple.L[1].Kind)
	mark := m.Nodes[tuple.L[0].Ref]
	require.Equal(t, "0", mark.Leaf)
	require.Equal(t, graph.Shape{graph.DimBatch, graph.DimSeq, 4}, mark.Shape)

	in := at("", graph.PortInput)
	require.Equal(t, []string{"args", "kwargs"}, in.Keys)
	require.Empty(t, in.L[0].L)
	require.Equal(t, []string{"input_ids"}, in.L[1].Keys)
	require.Equal(t, "kwargs.input_ids", m.Nodes[in.L[1].L[0].Ref].Leaf)
	require.Equal(t, "int64", m.Nodes[in.L[1].L[0].Ref].DType)
}

func TestVariantInputs(t *testing.T) {
	for _, masked := range []bool{false, true} {
		_, _, err := Build(Variant{Masked: masked}, func(b *Builder) {
			rows := graph.Dim(1)
			if masked {
				rows = graph.DimBatch
			}
			require.Equal(t, graph.Shape{rows, graph.DimSeq}, b.PositionIDs().Shape())
			require.Equal(t, b.PositionIDs(), b.PositionIDs(), "one node an input")
			require.Equal(t, !masked, b.AttentionMask().IsNone())
			if masked {
				require.Equal(t, "bool", b.AttentionMask().DType())
				require.Equal(t, graph.Shape{graph.DimBatch, 1, graph.DimSeq, graph.DimSeq}, b.AttentionMask().Shape())
			}
		})
		require.NoError(t, err)
	}
}

func TestParams(t *testing.T) {
	_, params, err := Build(Variant{}, func(b *Builder) {
		root := b.Model("M")
		emb := NewEmbedding(root, "emb", 5, 4, nil)
		NewTiedLinear(root, "head", 4, 5, emb.Weight)
		NewLinear(root, "out", 4, 2, true)
		NewRotaryEmbedding(root, "rope", "Rope", 4, Rope{Type: "default", Theta: 10000})
	})
	require.NoError(t, err)
	require.Equal(t, ParamSpec{Name: "emb.weight", Shape: []int64{5, 4}, Persistent: true}, params[0])
	require.Equal(t, ParamSpec{Name: "head.weight", Shape: []int64{5, 4}, Persistent: true, Tied: "emb.weight"}, params[1])
	require.Equal(t, "out.weight", params[2].Name)
	require.Equal(t, "out.bias", params[3].Name)
	require.Equal(t, "rope.inv_freq", params[4].Name)
	require.Equal(t, "float32", params[4].DType)
	require.False(t, params[4].Persistent)
	require.Equal(t, []float32{1, 0.01}, params[4].Compute())
}

func TestMistakesStopTheBuild(t *testing.T) {
	vector := func(b *Builder, n int64) Value { return b.Model("M").Param("w", 1, n).Value() }
	ids := func(b *Builder) Value { return b.InputIDs() }
	for _, c := range []struct {
		name, want string
		build      func(b *Builder)
	}{
		{"linear", "a layer of 4 features is given [1, 3]", func(b *Builder) {
			v := vector(b, 3)
			NewLinear(&Module{b: b, path: "x"}, "l", 4, 5, true).Forward(v)
		}},
		{"norm", "a norm of 4 features is given [1, 3]", func(b *Builder) {
			v := vector(b, 3)
			NewLayerNorm(&Module{b: b, path: "x"}, "l", 4, 1e-5).Forward(v)
		}},
		{"broadcast", "sizes [1, 3] and [B, S] do not go together", func(b *Builder) { vector(b, 3).Add(ids(b)) }},
		{"unflatten", "an axis of size 6 cannot be split into [4 -1]", func(b *Builder) { vector(b, 6).Unflatten(-1, 4, -1) }},
		{"flatten", "axis 1 of sizes [B, S] depends on the input", func(b *Builder) { ids(b).Flatten(1, -1) }},
		{"split", "an axis of size 6 cannot be cut into pieces of 4", func(b *Builder) { vector(b, 6).Split(4, -1) }},
		{"slice", "slice 2:9 of an axis of size 6", func(b *Builder) { vector(b, 6).Slice(-1, 2, 9) }},
		{"axis", "axis 2 of a tensor of sizes [1, 6]", func(b *Builder) { vector(b, 6).Transpose(0, 2) }},
		{"cat", "cannot be joined", func(b *Builder) { Cat(-1, vector(b, 6), ids(b)) }},
		{"two modules", `there are two modules named "a"`, func(b *Builder) {
			m := b.Model("M")
			m.Child("a", "A", "")
			m.Child("a", "A", "")
		}},
		{"two parameters", "there are two parameters named w", func(b *Builder) {
			m := b.Model("M")
			m.Param("w", 1)
			m.Param("w", 1)
		}},
		{"empty parameter", "parameter w would have sizes [0]", func(b *Builder) { b.Model("M").Param("w", 0) }},
		{"tied to nothing", "w is tied to v, which the model does not have", func(b *Builder) {
			b.Model("M").TiedParam("w", "v", 1)
		}},
		{"runs twice", `module "d" runs twice`, func(b *Builder) {
			d := NewDropout(b.Model("M"), "d", "0")
			d.Forward(d.Forward(ids(b)))
		}},
		{"never left", `module "a" was entered and never left`, func(b *Builder) { b.Model("M").Child("a", "A", "").Enter() }},
		{"left out of order", `module "" is left while "a" is under way`, func(b *Builder) {
			m := b.Model("M")
			m.Enter()
			m.Child("a", "A", "").Enter()
			v := ids(b)
			m.Leave(&v)
		}},
		{"padding", "padding token 5 is not among the 5 rows of e", func(b *Builder) {
			five := int64(5)
			NewEmbedding(b.Model("M"), "e", 5, 2, &five)
		}},
		{"activation", `no activation function "gelou"`, func(b *Builder) { NewActivation(b.Model("M"), "act", "gelou") }},
		{"attention", "attention of [1, 3, 4, 2] over [1, 2, 4, 2]", func(b *Builder) {
			m := b.Model("M")
			k := m.Param("k", 1, 2, 4, 2).Value()
			m.Attention(m.Param("q", 1, 3, 4, 2).Value(), k, k, None, 1, 0)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, params, err := Build(Variant{}, func(b *Builder) {
				b.model.Modules = append(b.model.Modules, graph.Module{}) // where parameters of bare layers go
				c.build(b)
			})
			require.ErrorContains(t, err, c.want)
			require.Equal(t, fault.ModelLoad, fault.As(err).Code)
			require.Nil(t, m)
			require.Nil(t, params)
		})
	}
}

// A panic that is not the builder's own is a bug and must not be swallowed.
func TestOtherPanicsPass(t *testing.T) {
	require.PanicsWithValue(t, "bug", func() { Build(Variant{}, func(*Builder) { panic("bug") }) })
}

func TestShapes(t *testing.T) {
	B, S := graph.DimBatch, graph.DimSeq
	_, _, err := Build(Variant{}, func(b *Builder) {
		root := b.Model("M")
		emb := NewEmbedding(root, "emb", 7, 24, nil)
		x := emb.Forward(b.InputIDs())
		require.Equal(t, graph.Shape{B, S, 24}, x.Shape())
		q := x.Unflatten(-1, -1, 4).Transpose(1, 2)
		require.Equal(t, graph.Shape{B, 6, S, 4}, q.Shape())
		k := x.Slice(-1, 0, 8).Unflatten(-1, 2, -1).Transpose(1, 2)
		require.Equal(t, graph.Shape{B, 2, S, 4}, k.Shape())
		require.Equal(t, graph.Shape{B, 6, S, 4}, k.RepeatHeads(3).Shape())
		a := root.Attention(q, k, k, None, 0.5, 0)
		require.Equal(t, graph.Shape{B, 6, S, 4}, a.Shape())
		require.Equal(t, graph.Shape{B, S, 24}, a.Transpose(1, 2).Flatten(-2, -1).Shape())
		parts := x.Split(8, 2)
		require.Len(t, parts, 3)
		require.Equal(t, graph.Shape{B, S, 8}, parts[2].Shape())
		require.Equal(t, graph.Shape{B, S, 16}, Cat(-1, parts[0], parts[1]).Shape())
		require.Equal(t, graph.Shape{B, S, 1}, x.MeanLast().Shape())
		require.Equal(t, graph.Shape{1, S, 1}, b.PositionIDs().Unsqueeze(2).Shape())
		require.Equal(t, graph.Shape{B, S, 24}, b.PositionIDs().Unsqueeze(-1).Float().Add(x).Shape())
		require.Equal(t, "float32", b.PositionIDs().Float().DType())
		require.Equal(t, "", b.PositionIDs().TypeAs(x).DType())
	})
	require.NoError(t, err)
}

// Grouped heads go to the fused kernel where it knows them, and are repeated elsewhere.
func TestGroupedAttention(t *testing.T) {
	ops := func(dim int64, masked bool) (ops []string, grouped bool) {
		m, _, err := Build(Variant{Masked: masked}, func(b *Builder) {
			root := b.Model("M")
			emb := NewEmbedding(root, "emb", 7, 4*dim, nil)
			x := emb.Forward(b.InputIDs())
			k := x.Slice(-1, 0, 2*dim).Unflatten(-1, -1, dim).Transpose(1, 2)
			root.Attention(x.Unflatten(-1, -1, dim).Transpose(1, 2), k, k, b.AttentionMask(), 1, 0)
		})
		require.NoError(t, err)
		for _, n := range m.Nodes {
			ops = append(ops, n.Op)
			for _, kw := range n.Kwargs {
				grouped = grouped || kw.Name == "enable_gqa" && kw.Arg.I == 1
			}
		}
		return ops, grouped
	}
	for _, c := range []struct {
		dim     int64
		masked  bool
		grouped bool
	}{{64, false, true}, {256, false, true}, {257, false, false}, {64, true, false}} {
		names, grouped := ops(c.dim, c.masked)
		require.Equal(t, c.grouped, grouped, "%+v", c)
		if c.grouped {
			require.NotContains(t, names, "aten::expand")
		} else {
			require.Contains(t, names, "aten::expand")
		}
	}
}

func TestNumbersPrintAsInPython(t *testing.T) {
	for f, want := range map[float64]string{
		1e-5: "1e-05", 1e-6: "1e-06", 1.5e-7: "1.5e-07", 1e-4: "0.0001", 0.1: "0.1", 0: "0.0", 1: "1.0", 12: "12.0",
		1e6: "1000000.0", 1e16: "1e+16", 123456789012345680: "1.2345678901234568e+17", 1e-100: "1e-100", -0.5: "-0.5",
	} {
		require.Equal(t, want, pyFloat(f))
	}
	for n, want := range map[string]string{"0": "0", "0.0": "0.0", "0.10": "0.1", "1e-1": "0.1", "1": "1"} {
		require.Equal(t, want, pyNumber(json.Number(n)))
	}
}
