// Package plantest has what tests of plan and exec share: a model in miniature and a notation for
// traces.
package plantest

import (
	"bufio"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

// Model is a model in miniature: every op works element by element, so that padding cannot leak
// and a few lines of Go can compute it (package exec's tests do). Its modules:
//
//	emb: [B, S] from input_ids      pos: [1, S] from position_ids, shared by all rows
//	l.0 .. l.n-1: x + act(x), returning a tuple of one, with a child act
//	head: x * 3
func Model(layers int) *graph.Model {
	m := &graph.Model{}
	node := func(n graph.Node) graph.ID {
		n.Pos = -1
		m.Nodes = append(m.Nodes, n)
		return graph.ID(len(m.Nodes) - 1)
	}
	call := func(op string, args ...graph.Arg) graph.ID {
		return node(graph.Node{Kind: graph.KindCall, Op: "aten::" + op, Args: args})
	}
	full := graph.Shape{graph.DimBatch, graph.DimSeq}
	shared := graph.Shape{1, graph.DimSeq}
	mark := func(path string, port graph.Port, leaf string, v graph.ID, shape graph.Shape) graph.ID {
		at := node(graph.Node{Kind: graph.KindMark, Path: path, Port: port, Leaf: leaf, Args: []graph.Arg{graph.Ref(v)}, Shape: shape})
		tree := graph.Ref(at)
		switch {
		case port == graph.PortInput:
			tree = graph.Arg{Kind: graph.ArgDict, Keys: []string{"args", "kwargs"}, L: []graph.Arg{graph.List(tree), {Kind: graph.ArgDict}}}
		case leaf == "0":
			tree = graph.Tuple(tree)
		}
		m.Points = append(m.Points, graph.Point{Path: path, Port: port, Tree: tree, At: at})
		return at
	}
	module := func(path string) { m.Modules = append(m.Modules, graph.Module{Path: path, Class: "Toy"}) }
	module("")
	ids := node(graph.Node{Kind: graph.KindInput, Op: "input_ids", Shape: full})
	pos := node(graph.Node{Kind: graph.KindInput, Op: "position_ids", Shape: shared})
	module("emb")
	x := mark("emb", graph.PortInput, "args.0", ids, full)
	x = mark("emb", graph.PortOutput, "", call("mul", graph.Ref(x), graph.Float(1)), full)
	module("pos")
	p := mark("pos", graph.PortInput, "args.0", pos, shared)
	p = mark("pos", graph.PortOutput, "", call("mul", graph.Ref(p), graph.Float(0.5)), shared)
	x = call("add", graph.Ref(x), graph.Ref(p))
	for i := range layers {
		path := fmt.Sprintf("l.%d", i)
		module(path)
		module(path + ".act")
		x = mark(path, graph.PortInput, "args.0", x, full)
		a := mark(path+".act", graph.PortInput, "args.0", x, full)
		a = mark(path+".act", graph.PortOutput, "", call("mul", graph.Ref(a), graph.Float(float64(i+2))), full)
		x = mark(path, graph.PortOutput, "0", call("add", graph.Ref(x), graph.Ref(a)), full)
	}
	module("head")
	x = mark("head", graph.PortInput, "args.0", x, full)
	w := node(graph.Node{Kind: graph.KindParam, Op: "head.weight"})
	mark("head", graph.PortOutput, "", call("mul", graph.Ref(x), graph.Ref(w)), full)
	m.Index()
	return m
}

// Parse reads a trace in a small notation, one node a line:
//
//	back 0                  the lines from here on belong to invoke 0
//	invoke 2,3              an invoke of two rows, of two and three tokens ("whole": no input)
//	h = l.1.output.0        a read (port and leaf follow the path)
//	l.1.output.0 = h        a write
//	y = mul h 2             an ATen call on values and numbers
//	h[0, :] = 0             row 0 set in place
//	y = call head h         a module called on a value
//	save y
func Parse(t testing.TB, text string) *graph.Graph {
	g := &graph.Graph{}
	names := map[string]graph.ID{}
	invoke := -1
	add := func(n graph.Node) graph.ID {
		n.Pos = -1
		n.Invoke = int32(invoke)
		n.Mode = graph.ModeGrad
		g.Nodes = append(g.Nodes, n)
		return graph.ID(len(g.Nodes) - 1)
	}
	arg := func(word string) graph.Arg {
		if id, ok := names[word]; ok {
			return graph.Ref(id)
		}
		f, err := strconv.ParseFloat(word, 64)
		require.NoError(t, err, "neither a value nor a number: %q", word)
		return graph.Float(f)
	}
	point := func(word string) (graph.Node, bool) {
		for port, name := range map[graph.Port]string{graph.PortInput: ".input", graph.PortOutput: ".output"} {
			if i := strings.LastIndex(word, name); i >= 0 {
				return graph.Node{Path: word[:i], Port: port, Leaf: strings.TrimPrefix(word[i+len(name):], ".")}, true
			}
		}
		return graph.Node{}, false
	}
	scan := bufio.NewScanner(strings.NewReader(text))
	next := int64(1)
	for scan.Scan() {
		line := strings.TrimSpace(scan.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		left, right, assigned := strings.Cut(line, " = ")
		words := strings.Fields(right)
		switch {
		case strings.HasPrefix(line, "invoke "):
			var in graph.Invoke
			if spec := strings.TrimPrefix(line, "invoke "); spec != "whole" {
				for _, n := range strings.Split(spec, ",") {
					size, err := strconv.Atoi(n)
					require.NoError(t, err)
					row := make([]int64, size)
					for i := range row {
						row[i] = next
						next++
					}
					in.Rows = append(in.Rows, row)
				}
			}
			g.Invokes = append(g.Invokes, in)
			invoke = len(g.Invokes) - 1
		case strings.HasPrefix(line, "back "):
			_, err := fmt.Sscan(line[len("back "):], &invoke)
			require.NoError(t, err)
		case strings.HasPrefix(line, "save "):
			add(graph.Node{Kind: graph.KindSave, Args: []graph.Arg{arg(strings.Fields(line)[1])}})
		case strings.HasSuffix(left, "[0, :]"):
			row := graph.Tuple(graph.Int(0), graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{{}, {}, {}}})
			add(graph.Node{Kind: graph.KindSetIndex, Args: []graph.Arg{arg(strings.TrimSuffix(left, "[0, :]")), row, arg(right)}})
		case !assigned:
			words = strings.Fields(line) // an in-place call
			n := graph.Node{Kind: graph.KindCall, Op: "aten::" + words[0]}
			for _, w := range words[1:] {
				n.Args = append(n.Args, arg(w))
			}
			add(n)
		default:
			if n, ok := point(left); ok {
				n.Kind, n.Args = graph.KindWrite, []graph.Arg{arg(right)}
				add(n)
				continue
			}
			if n, ok := point(right); ok {
				n.Kind = graph.KindRead
				names[left] = add(n)
				continue
			}
			n := graph.Node{Kind: graph.KindCall, Op: "aten::" + words[0]}
			if words[0] == "call" {
				n = graph.Node{Kind: graph.KindModule, Path: words[1]}
				words = words[1:]
			}
			for _, w := range words[1:] {
				n.Args = append(n.Args, arg(w))
			}
			names[left] = add(n)
			if n.Kind == graph.KindModule && n.Path != "head" { // a layer gives a tuple of one
				names[left] = add(graph.Node{Kind: graph.KindItem, Args: []graph.Arg{graph.Ref(names[left]), graph.Int(0)}})
			}
		}
	}
	return g
}
