package graph_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "rewrite the files in testdata that this package makes")

// golden holds a text against a file of testdata.
func golden(t *testing.T, file, got string) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), got)
}

// model is a transformer in miniature, with a module that never runs, a tuple and an object.
func model() *graph.Model {
	m := &graph.Model{Modules: []graph.Module{
		{Path: "", Class: "ToyLM"}, {Path: "emb", Class: "Embedding", Params: []string{"weight"}}, {Path: "h", Class: "ModuleList"},
		{Path: "h.0", Class: "Block"}, {Path: "h.0.act", Class: "ReLU"}, {Path: "h.0.drop", Class: "Dropout", Extra: "p=0.1"},
		{Path: "head", Class: "Linear", Params: []string{"weight"}},
	}}
	hidden := graph.Shape{graph.DimBatch, graph.DimSeq, 8}
	var path []string
	add := func(n graph.Node) graph.Arg {
		n.Pos = -1
		if n.Kind != graph.KindMark && len(path) > 0 {
			n.Path = path[len(path)-1]
		}
		m.Nodes = append(m.Nodes, n)
		return graph.Ref(graph.ID(len(m.Nodes) - 1))
	}
	call := func(op string, args ...graph.Arg) graph.Arg {
		return add(graph.Node{Kind: graph.KindCall, Op: "aten::" + op, Args: args, Shape: hidden})
	}
	mark := func(port graph.Port, leaf string, v graph.Arg) graph.Arg {
		shape := m.Nodes[v.Ref].Shape
		return add(graph.Node{Kind: graph.KindMark, Path: path[len(path)-1], Port: port, Leaf: leaf, Args: []graph.Arg{v}, Shape: shape})
	}
	enter := func(module string, v graph.Arg) graph.Arg {
		path = append(path, module)
		at := graph.ID(len(m.Nodes))
		v = mark(graph.PortInput, "args.0", v)
		tree := graph.Arg{Kind: graph.ArgDict, Keys: []string{"args", "kwargs"}, L: []graph.Arg{graph.List(v), {
			Kind: graph.ArgDict, Keys: []string{"use_cache", "mask"}, L: []graph.Arg{graph.Bool(false), graph.Null()}}}}
		m.Points = append(m.Points, graph.Point{Path: module, Port: graph.PortInput, Tree: tree, At: at})
		return v
	}
	leave := func(leaf string, v graph.Arg) graph.Arg {
		module, at := path[len(path)-1], graph.ID(len(m.Nodes))
		v = mark(graph.PortOutput, leaf, v)
		tree := v
		switch leaf {
		case "0":
			tree = graph.Tuple(v)
		case "logits":
			tree = graph.Arg{Kind: graph.ArgDict, S: "Output", Keys: []string{leaf, "loss"}, L: []graph.Arg{v, graph.Null()}}
		}
		m.Points = append(m.Points, graph.Point{Path: module, Port: graph.PortOutput, Tree: tree, At: at})
		path = path[:len(path)-1]
		return v
	}
	param := func(name string) graph.Arg {
		return add(graph.Node{Kind: graph.KindParam, Op: name, Shape: graph.Shape{16, 8}})
	}
	x := add(graph.Node{Kind: graph.KindInput, Op: "input_ids", Shape: hidden[:2], DType: "int64"})
	x = enter("", x)
	x = enter("emb", x)
	x = leave("", call("embedding", param("emb.weight"), x))
	x = enter("h.0", x)
	a := enter("h.0.act", x)
	a = leave("", call("relu", a))
	x = leave("0", call("add.Tensor", x, a))
	x = enter("head", x)
	x = leave("", call("linear", x, param("head.weight")))
	leave("logits", x)
	m.Index()
	return m
}

// trace is a recorded program with a node of every kind.
func trace() *graph.Graph {
	all := graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{{}, {}, {}}}
	g := &graph.Graph{
		Invokes: []graph.Invoke{
			{Rows: [][]int64{{5, 6, 7}}},
			{Rows: [][]int64{{1, 2}, {3, 4, 5}}, Masks: [][]int64{{0, 1}, {1, 1, 1}}},
			{},
		},
		Positions: []fault.Pos{{File: "/home/user/demo.py", Line: 12, Func: "<module>"}, {File: "/home/user/demo.py", Line: 13, Func: "<module>"}},
	}
	add := func(n graph.Node) graph.Arg {
		g.Nodes = append(g.Nodes, n)
		return graph.Ref(graph.ID(len(g.Nodes) - 1))
	}
	h := add(graph.Node{Kind: graph.KindRead, Path: "h.0", Port: graph.PortOutput, Leaf: "0", Mode: graph.ModeGrad})
	add(graph.Node{Kind: graph.KindSetIndex, Args: []graph.Arg{h, graph.Tuple(all, graph.Int(-1)), graph.Float(0)}, Mode: graph.ModeGrad, Pos: 1})
	y := add(graph.Node{Kind: graph.KindCall, Op: "aten::mul", Args: []graph.Arg{h, graph.Int(2)}, Pos: 1})
	top := add(graph.Node{Kind: graph.KindCall, Op: "aten::topk", Args: []graph.Arg{y, graph.Int(3)},
		Kwargs: []graph.Kwarg{{Name: "largest", Arg: graph.Bool(true)}}, Pos: 1})
	first := add(graph.Node{Kind: graph.KindItem, Args: []graph.Arg{top, graph.Int(0)}, Pos: -1})
	add(graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.List(first, graph.Arg{Kind: graph.ArgDict, Keys: []string{"y"}, L: []graph.Arg{y}})}, Pos: -1})
	c := add(graph.Node{Kind: graph.KindConst, Index: 0, Invoke: 1, Pos: -1})
	i := add(graph.Node{Kind: graph.KindIndex, Args: []graph.Arg{y, graph.Tuple(graph.Arg{Kind: graph.ArgEllipsis}, c)}, Invoke: 1, Pos: -1})
	add(graph.Node{Kind: graph.KindWrite, Path: "h.0", Port: graph.PortInput, Leaf: "args.0", Args: []graph.Arg{i}, Invoke: 1, Pos: -1})
	z := add(graph.Node{Kind: graph.KindModule, Path: "head", Args: []graph.Arg{h}, Invoke: 2, Mode: graph.ModeInference, Pos: -1})
	f16 := graph.Arg{Kind: graph.ArgDType, S: "float16"}
	z = add(graph.Node{Kind: graph.KindCall, Op: "aten::to", Args: []graph.Arg{z, {Kind: graph.ArgDevice, S: "cpu"}, f16}, Invoke: 2, Pos: -1})
	add(graph.Node{Kind: graph.KindSave, Args: []graph.Arg{z}, Invoke: 2, Pos: -1})
	gradient := func(k graph.Kind, args ...graph.Arg) graph.Arg {
		return add(graph.Node{Kind: k, Args: args, Invoke: 2, Mode: graph.ModeGrad, Pos: -1})
	}
	gradient(graph.KindTrack, h, graph.Int(graph.TrackRetain))
	b := gradient(graph.KindBackward, z, graph.Null(), graph.Bool(false), graph.Bool(false), graph.Bool(true), graph.Bool(true))
	gradient(graph.KindSetGrad, h, b, gradient(graph.KindGrad, h, b))
	gradient(graph.KindEnd, b)
	return g
}

// maker makes random graphs that are well formed, whatever they mean.
type maker struct {
	*rand.Rand
	values []graph.ID
}

var texts = []string{"", "x", "transformer.h.0", "aten::add", "ключ", "a\x00b", "\"quoted\"", "%%{init}", "end\n# fake line"}

func (r *maker) text() string { return texts[r.IntN(len(texts))] }

func (r *maker) arg(depth int) graph.Arg {
	k := graph.ArgKind(r.IntN(int(graph.ArgComplex) + 1))
	a := graph.Arg{Kind: k}
	switch k {
	case graph.ArgBool:
		a.I = r.Int64N(2)
	case graph.ArgInt:
		a.I = int64(r.Uint64()) >> r.IntN(64)
	case graph.ArgFloat:
		a.F = r.NormFloat64()
	case graph.ArgComplex:
		a.F, a.G = r.NormFloat64(), r.NormFloat64()
	case graph.ArgString, graph.ArgDType, graph.ArgDevice, graph.ArgLayout, graph.ArgMemoryFormat:
		a.S = r.text()
	case graph.ArgRef:
		if len(r.values) == 0 {
			return graph.Null()
		}
		a.Ref = r.values[r.IntN(len(r.values))]
	case graph.ArgSlice:
		a.L = []graph.Arg{graph.Null(), graph.Int(r.Int64N(9)), graph.Int(1)}
	case graph.ArgList, graph.ArgTuple, graph.ArgDict:
		for i := range r.IntN(4) {
			if depth == 0 {
				break
			}
			a.L = append(a.L, r.arg(depth-1))
			if k == graph.ArgDict {
				a.Keys = append(a.Keys, fmt.Sprint(r.text(), i))
			}
		}
		if k == graph.ArgDict && r.IntN(2) == 0 {
			a.S = "Class"
		}
	}
	return a
}

func (r *maker) args(n int) (out []graph.Arg) {
	for range n {
		out = append(out, r.arg(3))
	}
	return out
}

func (r *maker) graph(nodes int) *graph.Graph {
	g := &graph.Graph{Nodes: make([]graph.Node, nodes), Invokes: make([]graph.Invoke, 1+r.IntN(3)), Positions: make([]fault.Pos, r.IntN(3))}
	for i := range g.Invokes {
		masked := r.IntN(2) == 0
		for range r.IntN(3) {
			row, mask := make([]int64, r.IntN(5)), make([]int64, 0)
			for k := range row {
				row[k] = r.Int64N(50000)
				mask = append(mask, r.Int64N(2))
			}
			g.Invokes[i].Rows = append(g.Invokes[i].Rows, row)
			if masked {
				g.Invokes[i].Masks = append(g.Invokes[i].Masks, mask)
			}
		}
	}
	for i := range g.Positions {
		g.Positions[i] = fault.Pos{File: r.text(), Line: r.IntN(100000), Func: r.text()}
	}
	r.values = nil
	counts := map[graph.Kind]int{graph.KindIndex: 2, graph.KindSetIndex: 3, graph.KindItem: 2, graph.KindWrite: 1, graph.KindSave: 1,
		graph.KindTrack: 2, graph.KindBackward: 6, graph.KindGrad: 2, graph.KindSetGrad: 3, graph.KindEnd: 1}
	for i := range g.Nodes {
		n := &g.Nodes[i]
		n.Kind = graph.Kind(r.IntN(int(graph.KindParam)))
		n.Invoke, n.Mode, n.Pos = r.Int32N(int32(len(g.Invokes))), graph.Mode(r.IntN(4)), r.Int32N(int32(len(g.Positions)+1))-1
		n.Args = r.args(counts[n.Kind])
		switch n.Kind {
		case graph.KindCall, graph.KindModule:
			n.Args = r.args(r.IntN(4))
			for k := range r.IntN(3) {
				n.Kwargs = append(n.Kwargs, graph.Kwarg{Name: fmt.Sprint(r.text(), k), Arg: r.arg(3)})
			}
			if n.Kind == graph.KindCall {
				n.Op = r.text()
			} else {
				n.Path = r.text()
			}
		case graph.KindRead, graph.KindWrite:
			n.Path, n.Leaf, n.Port, n.Step = r.text(), r.text(), graph.Port(r.IntN(2)), r.Int32N(1000)
		case graph.KindConst:
			n.Index = r.Int32N(1000)
		}
		r.values = append(r.values, graph.ID(i))
	}
	return g
}
