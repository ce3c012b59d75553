package graph_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/arch"
	_ "github.com/nnsight-go/nnsight-go/engine/arch/all"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

func TestVerify(t *testing.T) {
	m := model()
	require.NoError(t, graph.Verify(trace(), m, 1))
	require.NoError(t, graph.Verify(&graph.Graph{}, m, 0), "a trace may be empty")

	all := graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{{}, {}, {}}}
	nested := graph.List()
	for range graph.MaxNesting + 1 {
		nested = graph.List(nested)
	}
	for name, c := range map[string]struct {
		edit func(g *graph.Graph)
		code fault.Code
		node int
		says string
	}{
		"kind of a model": {func(g *graph.Graph) { g.Nodes[0] = graph.Node{Kind: graph.KindInput, Op: "input_ids"} }, fault.Graph, 0, "a trace holds no input nodes"},
		"unknown kind":    {func(g *graph.Graph) { g.Nodes[0].Kind = 77 }, fault.Graph, 0, "there are no nodes of kind 77"},
		"arity":           {func(g *graph.Graph) { g.Nodes[1].Args = nil }, fault.Graph, 1, "a node of kind set index has 0 arguments instead of 3"},
		"stray keywords": {func(g *graph.Graph) { g.Nodes[5].Kwargs = []graph.Kwarg{{Name: "x"}} }, fault.Graph, 5,
			"a node of kind save has 2 arguments instead of 1"},
		"target":        {func(g *graph.Graph) { g.Nodes[1].Args[0] = graph.Int(1) }, fault.Graph, 1, "its target is an int instead of a value"},
		"index by dict": {func(g *graph.Graph) { g.Nodes[1].Args[1] = graph.Arg{Kind: graph.ArgDict} }, fault.Graph, 1, "its index is a dict"},
		"set to a list": {func(g *graph.Graph) { g.Nodes[1].Args[2] = graph.List() }, fault.Graph, 1, "what it sets is a list instead of a value or a number"},
		"write a number": {func(g *graph.Graph) { g.Nodes[8].Args[0] = graph.Int(0) }, fault.Graph, 8,
			"what it writes is an int instead of a value"},
		"key":         {func(g *graph.Graph) { g.Nodes[4].Args[1] = graph.Float(0) }, fault.Graph, 4, "its key is a float instead of a number or a string"},
		"no elements": {func(g *graph.Graph) { g.Nodes[4].Args[0] = graph.Ref(0) }, fault.Graph, 4, "%0, of kind read, has no elements to take"},
		"no backward": {func(g *graph.Graph) { g.Nodes[len(g.Nodes)-1].Args[0] = graph.Ref(0) }, fault.Graph, 16, "%0, of kind read, is no backward pass"},
		"itself":      {func(g *graph.Graph) { g.Nodes[2].Args[0] = graph.Ref(2) }, fault.Graph, 2, "it uses value 2, which does not come before it"},
		"later, deep": {func(g *graph.Graph) { g.Nodes[5].Args[0].L[1].L[0] = graph.Ref(9) }, fault.Graph, 5, "it uses value 9"},
		"negative":    {func(g *graph.Graph) { g.Nodes[2].Args[0] = graph.Ref(-1) }, fault.Graph, 2, "it uses value -1"},
		"in a keyword": {func(g *graph.Graph) { g.Nodes[3].Kwargs[0].Arg = graph.Ref(3) }, fault.Graph, 3,
			"it uses value 3"},
		"void":          {func(g *graph.Graph) { g.Nodes[2].Args[0] = graph.Ref(1) }, fault.Graph, 2, "it uses value 1, but a node of kind set index has no value"},
		"keyword name":  {func(g *graph.Graph) { g.Nodes[3].Kwargs[0].Name = "a\x00b" }, fault.Graph, 3, `"a\x00b" is not the name of an argument`},
		"operator":      {func(g *graph.Graph) { g.Nodes[2].Op = "mul" }, fault.Graph, 2, `"mul" is not the name of an operator`},
		"operator, NUL": {func(g *graph.Graph) { g.Nodes[2].Op = "aten::mul\x00" }, fault.Graph, 2, "is not the name of an operator"},
		"no overload":   {func(g *graph.Graph) { g.Nodes[2].Op = "aten::mul." }, fault.Graph, 2, "is not the name of an operator"},
		"slice":         {func(g *graph.Graph) { g.Nodes[2].Args[1] = graph.Arg{Kind: graph.ArgSlice} }, fault.Graph, 2, "a slice has 0 parts"},
		"slice of slices": {func(g *graph.Graph) {
			g.Nodes[2].Args[1] = graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{all, all, all}}
		}, fault.Graph, 2, "a slice is bounded by a slice"},
		"keys": {func(g *graph.Graph) { g.Nodes[2].Args[1] = graph.Arg{Kind: graph.ArgDict, L: []graph.Arg{{}}} }, fault.Graph, 2,
			"a dict has 0 keys and 1 values"},
		"kind of argument": {func(g *graph.Graph) { g.Nodes[2].Args[1] = graph.Arg{Kind: 99} }, fault.Graph, 2, "no arguments of kind 99"},
		"nesting":          {func(g *graph.Graph) { g.Nodes[2].Args[1] = nested }, fault.Graph, 2, "nested more than 64 deep"},
		"invoke":           {func(g *graph.Graph) { g.Nodes[2].Invoke = 3 }, fault.Graph, 2, "it belongs to invoke 3 of 3"},
		"negative invoke":  {func(g *graph.Graph) { g.Nodes[2].Invoke = -1 }, fault.Graph, 2, "it belongs to invoke -1 of 3"},
		"a later invoke":   {func(g *graph.Graph) { g.Nodes[0].Invoke = 2 }, fault.Graph, 1, "a line of invoke 0 uses value 0, which is of invoke 2"},
		"step":             {func(g *graph.Graph) { g.Nodes[0].Step = -1 }, fault.Graph, 0, "it names step -1"},
		"constant":         {func(g *graph.Graph) { g.Nodes[6].Index = 1 }, fault.Graph, 6, "it names constant 1 of 1"},
		"another port":     {func(g *graph.Graph) { g.Nodes[0].Port = 2 }, fault.Graph, 0, "modules have no port 2"},
		"port":             {func(g *graph.Graph) { g.Nodes[0].Port = 9 }, fault.Graph, 0, "modules have no port 9"},
		"module":           {func(g *graph.Graph) { g.Nodes[0].Path = "h.O" }, fault.ModulePath, 0, `the model has no module "h.O"`},
		"module called":    {func(g *graph.Graph) { g.Nodes[9].Path = "heads" }, fault.ModulePath, 9, `the model has no module "heads"`},
		"never runs":       {func(g *graph.Graph) { g.Nodes[0].Path = "h.0.drop" }, fault.ModulePath, 0, `module "h.0.drop" never runs by itself in a forward pass, so it has no output`},
		"list called":      {func(g *graph.Graph) { g.Nodes[9].Path = "h" }, fault.ModulePath, 9, `module "h" never runs`},
		"bare":             {func(g *graph.Graph) { g.Nodes[0].Path = "h.0.act" }, fault.ModulePath, 0, `the output of "h.0.act" is a bare tensor and has no element "0"`},
		"not bare":         {func(g *graph.Graph) { g.Nodes[0].Leaf = "" }, fault.ModulePath, 0, `the output of "h.0" is not a bare tensor`},
		"leaf":             {func(g *graph.Graph) { g.Nodes[8].Leaf = "args.1" }, fault.ModulePath, 8, `the input of "h.0" has no tensor "args.1"`},
		"empty row":        {func(g *graph.Graph) { g.Invokes[1].Rows[0] = nil }, fault.Input, -1, "row 0 has no tokens"},
		"masks":            {func(g *graph.Graph) { g.Invokes[1].Masks = g.Invokes[1].Masks[:1] }, fault.Input, -1, "2 rows and 1 attention masks"},
		"mask too short":   {func(g *graph.Graph) { g.Invokes[1].Masks[1] = []int64{1} }, fault.Input, -1, "row 1 has 3 tokens and its attention mask has 1"},
		"mask of twos":     {func(g *graph.Graph) { g.Invokes[1].Masks[0] = []int64{1, 2} }, fault.Input, -1, "holds 2, which is neither 0 nor 1"},
	} {
		t.Run(name, func(t *testing.T) {
			g := trace()
			c.edit(g)
			err := graph.Verify(g, m, 1)
			var e *fault.Error
			require.True(t, errors.As(err, &e), "%v", err)
			require.Equal(t, c.code, e.Code)
			require.Contains(t, e.Message, c.says)
			require.Equal(t, c.node, e.Node)
			if c.node >= 0 {
				require.Equal(t, int(g.Nodes[c.node].Invoke), e.Invoke)
				require.Equal(t, g.PosOf(&g.Nodes[c.node]), e.Pos)
			}
			if c.code == fault.ModulePath {
				require.Equal(t, g.Nodes[c.node].Path, e.Path)
			}
		})
	}
}

// TestVerifyReads holds the texts that users meet most.
func TestVerifyReads(t *testing.T) {
	for _, c := range []struct{ path, leaf, want string }{
		{"h.1", "0", `ModulePathError: the model has no module "h.1"
  module: h.1
  invoke: 0
  line: /home/user/demo.py:12
  Nearest: h.0, h, emb.`},
		{"h.0", "1", `ModulePathError: the output of "h.0" has no tensor "1"
  module: h.0
  invoke: 0
  line: /home/user/demo.py:12
  It has: 0.`},
		{"h.0.drop", "", `ModulePathError: module "h.0.drop" never runs by itself in a forward pass, so it has no output
  module: h.0.drop
  invoke: 0
  line: /home/user/demo.py:12
  Use the module that contains it, or, for a list of modules, one of its elements.`},
	} {
		g := trace()
		g.Nodes[0].Path, g.Nodes[0].Leaf = c.path, c.leaf
		require.EqualError(t, graph.Verify(g, model(), 1), c.want)
	}
}

func TestVerifyModel(t *testing.T) {
	require.NoError(t, graph.VerifyModel(model()))
	at := func(m *graph.Model, path string, port graph.Port) *graph.Point {
		i, ok := m.Point(path, port)
		require.True(t, ok)
		return &m.Points[i]
	}
	mark := func(m *graph.Model, path string, port graph.Port) *graph.Node {
		for i := range m.Nodes {
			if n := &m.Nodes[i]; n.Kind == graph.KindMark && n.Path == path && n.Port == port {
				return n
			}
		}
		t.Fatal("no such mark")
		return nil
	}
	for name, c := range map[string]struct {
		edit func(m *graph.Model)
		says string
	}{
		"no modules":      {func(m *graph.Model) { m.Modules = nil }, "is not the first of its modules"},
		"no root":         {func(m *graph.Model) { m.Modules = m.Modules[1:] }, "is not the first of its modules"},
		"module twice":    {func(m *graph.Model) { m.Modules[2].Path = "emb" }, `there are two modules "emb"`},
		"orphan":          {func(m *graph.Model) { m.Modules[2].Path = "g" }, `module "h.0" stands before "h", which it is part of`},
		"a trace's node":  {func(m *graph.Model) { m.Nodes[0] = graph.Node{Kind: graph.KindConst} }, "a model holds no const nodes"},
		"unnamed input":   {func(m *graph.Model) { m.Nodes[0].Op = "" }, "this input has no name"},
		"parameter twice": {func(m *graph.Model) { m.Nodes[len(m.Nodes)-4].Op = "emb.weight" }, "param emb.weight is there twice"},
		"forward":         {func(m *graph.Model) { m.Nodes[1].Args[0] = graph.Ref(5) }, "it uses value 5, which does not come before it"},
		"no module":       {func(m *graph.Model) { m.Points[1].Path = "embed" }, `an access point belongs to "embed", which is no module`},
		"order":           {func(m *graph.Model) { at(m, "head", graph.PortInput).At = 2 }, `the input of "head" is at node 2, out of order`},
		"beyond the end":  {func(m *graph.Model) { m.Points[len(m.Points)-1].At = 1000 }, "at node 1000"},
		"runs twice": {func(m *graph.Model) { at(m, "head", graph.PortInput).Path = "emb" },
			`module "emb" runs twice`},
		"output first": {func(m *graph.Model) { at(m, "emb", graph.PortInput).Port = graph.PortOutput },
			"stands where that module is not the one that runs"},
		"gradient": {func(m *graph.Model) { at(m, "emb", graph.PortOutput).Port = 2 }, `the port 2 of "emb" stands where`},
		"no output": {func(m *graph.Model) {
			m.Points = m.Points[:len(m.Points)-1]
			m.Nodes = m.Nodes[:len(m.Nodes)-1]
		}, `module "" has an input and no output`},
		"mark of none":   {func(m *graph.Model) { at(m, "emb", graph.PortOutput).Tree = graph.Null() }, "a mark is part of no access point"},
		"mark shared":    {func(m *graph.Model) { p := at(m, "h.0", graph.PortOutput); p.Tree.L = append(p.Tree.L, p.Tree.L[0]) }, `the mark of tensor "1" of the output is named "0"`},
		"not a mark":     {func(m *graph.Model) { at(m, "emb", graph.PortOutput).Tree = graph.Ref(0) }, "is not a mark of it"},
		"no node":        {func(m *graph.Model) { at(m, "emb", graph.PortOutput).Tree = graph.Ref(99) }, "speaks of node 99"},
		"other module":   {func(m *graph.Model) { mark(m, "emb", graph.PortOutput).Path = "head" }, "is not a mark of it"},
		"wrong name":     {func(m *graph.Model) { mark(m, "h.0", graph.PortOutput).Leaf = "1" }, `the mark of tensor "0" of the output is named "1"`},
		"mark too early": {func(m *graph.Model) { at(m, "emb", graph.PortOutput).At++ }, "does not stand between its access point and the next"},
		"tree of a kind": {func(m *graph.Model) { at(m, "emb", graph.PortOutput).Tree = graph.Arg{Kind: graph.ArgSlice} }, "holds a slice"},
		"tree's names":   {func(m *graph.Model) { at(m, "", graph.PortOutput).Tree.Keys = nil }, "has 0 names for 2 elements"},
	} {
		t.Run(name, func(t *testing.T) {
			m := model()
			c.edit(m)
			err := graph.VerifyModel(m)
			require.Error(t, err)
			require.Equal(t, fault.Graph, fault.As(err).Code)
			require.Contains(t, err.Error(), c.says)
		})
	}
}

// TestArchitectures holds the models of every architecture to the rules.
func TestArchitectures(t *testing.T) {
	configs := map[string]string{"GPT2LMHeadModel": enginetest.GPT2, "LlamaForCausalLM": enginetest.Llama}
	for name, config := range configs {
		t.Run(name, func(t *testing.T) {
			a, err := arch.Open([]byte(config))
			require.NoError(t, err)
			graphs, err := arch.Build(a)
			require.NoError(t, err)
			require.NoError(t, graph.VerifyModel(graphs.Causal))
			require.NoError(t, graph.VerifyModel(graphs.Masked))
			text := graphs.Masked.String()
			require.Equal(t, len(graphs.Masked.Nodes), strings.Count(text, "%")-countRefs(graphs.Masked), "every node is printed once")
		})
	}
}

func countRefs(m *graph.Model) (n int) {
	for i := range m.Nodes {
		m.Nodes[i].Refs(func(graph.ID) { n++ })
	}
	return n
}

func TestNearest(t *testing.T) {
	names := []string{"", "transformer", "transformer.h.0", "transformer.h.1", "transformer.h.1.mlp", "lm_head"}
	require.Equal(t, []string{"transformer.h.0", "transformer.h.1"}, graph.Nearest("transformer.h.2", names, 2), "ties keep their order")
	require.Equal(t, []string{"lm_head"}, graph.Nearest("lmhead", names, 1))
	require.Equal(t, []string{"transformer.h.1.mlp"}, graph.Nearest("transformer.h.1.mpl", names, 1))
	require.Len(t, graph.Nearest("x", names, 10), 5, "the empty name is never offered")
	require.Empty(t, graph.Nearest("x", nil, 3))
	require.Equal(t, []string{"sitten", "kitten", "fluor"}, graph.Nearest("sitting", []string{"fluor", "kitten", "sitten"}, 3), "2, 3 and 7 edits")
	long := strings.Repeat("x", 1<<20)
	require.Len(t, graph.Nearest(long, []string{long, "h"}, 2), 2, "the work is bounded")
}
