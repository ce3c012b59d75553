package graph_test

import (
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

func TestPrint(t *testing.T) {
	golden(t, "trace.txt", trace().String())
	golden(t, "model.txt", model().String())
	golden(t, "trace.mmd", trace().Mermaid())
}

func TestPrintArguments(t *testing.T) {
	many := graph.List()
	for i := range 40 {
		many.L = append(many.L, graph.Int(int64(i)))
	}
	slice := graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{graph.Int(1), graph.Null(), graph.Int(-1)}}
	for _, c := range []struct {
		arg  graph.Arg
		want string
	}{
		{graph.Null(), "None"},
		{graph.Bool(true), "True"},
		{graph.Bool(false), "False"},
		{graph.Int(-3), "-3"},
		{graph.Float(2), "2.0"},
		{graph.Float(1e300), "1e+300"},
		{graph.String("a\nb"), `"a\nb"`},
		{graph.Arg{Kind: graph.ArgComplex, F: 1, G: -2}, "(1.0-2.0j)"},
		{graph.Arg{Kind: graph.ArgComplex, F: 1, G: 2}, "(1.0+2.0j)"},
		{graph.Tuple(), "()"},
		{graph.Tuple(graph.Ref(7)), "(%7,)"},
		{slice, "slice(1, None, -1)"},
		{graph.Arg{Kind: graph.ArgDict, Keys: []string{"a"}, L: []graph.Arg{graph.Int(1)}}, `{"a": 1}`},
		{graph.Arg{Kind: graph.ArgDict, S: "Output", Keys: []string{"a"}, L: []graph.Arg{graph.Int(1)}}, "Output(a=1)"},
		{graph.Arg{Kind: graph.ArgDType, S: "float32"}, "torch.float32"},
		{graph.Arg{Kind: 99}, "argument kind 99"},
	} {
		require.Equal(t, c.want, c.arg.String())
	}
	require.True(t, strings.HasSuffix(many.String(), ", 31, and 8 more]"))
	index := func(a graph.Arg) string {
		g := graph.Graph{Nodes: []graph.Node{{}, {Kind: graph.KindIndex, Args: []graph.Arg{graph.Ref(0), a}}}}
		return strings.TrimSpace(strings.Split(g.String(), "\n")[4])
	}
	require.Equal(t, "%1 = %0[1::-1]", index(slice))
	require.Equal(t, "%1 = %0[1::-1, 0, ...]", index(graph.Tuple(slice, graph.Int(0), graph.Arg{Kind: graph.ArgEllipsis})))
	require.Equal(t, "%1 = %0[0,]", index(graph.Tuple(graph.Int(0))))
	require.Equal(t, "%1 = %0[()]", index(graph.Tuple()))
}

// TestPrintHostile prints names that try to pass for lines or markup of the printer's own.
func TestPrintHostile(t *testing.T) {
	evil := "x\"]\nend\n  n9 --> n8 %%{init: {}}%% <script>&#`"
	g := &graph.Graph{
		Nodes: []graph.Node{
			{Kind: graph.KindRead, Path: evil, Leaf: evil, Pos: 0},
			{Kind: graph.KindCall, Op: evil, Args: []graph.Arg{graph.String(evil), graph.Ref(0), graph.Ref(0)}, Kwargs: []graph.Kwarg{{Name: evil}}, Pos: -1},
			{Kind: 200, Args: []graph.Arg{graph.Ref(5000), graph.Ref(-7)}, Invoke: -4, Pos: 12},
			{Kind: graph.KindSetIndex}, {Kind: graph.KindSave}, {Kind: graph.KindItem}, {Kind: graph.KindWrite},
		},
		Positions: []fault.Pos{{File: evil, Line: 3}},
	}
	text := g.String()
	require.Equal(t, 1+len(g.Nodes)+3+1, strings.Count(text, "\n"), "a line a node, three heads of invokes, one of modes:\n%s", text)
	chart := g.Mermaid()
	for _, part := range []string{"%%", "<", "&", "`"} {
		require.NotContains(t, chart, part)
	}
	require.Equal(t, 1, strings.Count(chart, "-->"), "one arrow, from %%0 to %%1:\n%s", chart)
	for _, line := range strings.Split(strings.TrimSpace(chart), "\n")[1:] {
		require.Regexp(t, `^  (  n\d+[^"]+"[^"]*"[^"]+|subgraph i\d+\["[^"]*"\]|end|n\d+ --> n\d+)$`, line)
	}
}

func TestNames(t *testing.T) {
	require.Equal(t, "set index", graph.KindSetIndex.String())
	require.Equal(t, "kind 200", graph.Kind(200).String())
	require.Equal(t, "port 7", graph.Port(7).String())
	require.Equal(t, "[B, S, 768]", graph.Shape{graph.DimBatch, graph.DimSeq, 768}.String())
	require.Equal(t, "[]", graph.Shape{}.String())
}
