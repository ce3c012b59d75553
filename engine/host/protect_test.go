package host

import (
	"regexp"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/guard"
	"github.com/stretchr/testify/require"
)

func TestWeightsOfASharedModelStayAsTheyAre(t *testing.T) {
	m, err := Open(enginetest.Directory(t, enginetest.GPT2, 1), Options{Prepack: -1})
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	require.NoError(t, m.Protect())
	weight, err := m.Constant("transformer.wte.weight")
	require.NoError(t, err)
	defer weight.Free()
	before, err := weight.Float32s()
	require.NoError(t, err)
	live := aten.Live()

	ref, integer := graph.Ref, func(n int64) graph.Arg { return graph.Arg{Kind: graph.ArgInt, I: n} }
	call := func(op string, args ...graph.Arg) graph.Node {
		return graph.Node{Kind: graph.KindCall, Op: op, Args: args, Pos: 0}
	}
	zero := call("aten::zero_.default", ref(2))
	for name, lines := range map[string][]graph.Node{
		"a view":               {call("aten::view.default", ref(1), graph.Arg{Kind: graph.ArgList, L: []graph.Arg{integer(-1)}}), zero},
		"what comes back":      {call("aten::contiguous.default", ref(1)), zero},
		"dropout in eval":      {call("aten::dropout.default", ref(1), graph.Arg{Kind: graph.ArgFloat, F: 0.5}, graph.Arg{Kind: graph.ArgBool}), zero},
		"a type that it has":   {call("aten::type_as.default", ref(1), ref(1)), zero},
		"a transposed view":    {call("aten::t.default", ref(1)), zero},
		"the parameter itself": {call("aten::alias.default", ref(1)), call("aten::mul_.Tensor", ref(1), ref(1))},
		"a gradient":           {call("aten::alias.default", ref(1)), call("nng::add_grad.default", ref(1), ref(1))},
		"an element": {call("aten::alias.default", ref(1)), {Kind: graph.KindSetIndex,
			Args: []graph.Arg{ref(1), integer(0), integer(7)}, Pos: 0}},
		"out":                   {call("aten::alias.default", ref(1)), {Kind: graph.KindCall, Op: "aten::sin.out", Args: []graph.Arg{ref(1)}, Kwargs: []graph.Kwarg{{Name: "out", Arg: ref(1)}}, Pos: 0}},
		"a copy into the value": {call("aten::detach.default", ref(1)), call("aten::copy_.default", ref(2), integer(0))},
	} {
		if name == "a copy into the value" {
			lines[1].Args[1] = ref(1)
		}
		given, err := weight.Share()
		require.NoError(t, err)
		g := &graph.Graph{Invokes: []graph.Invoke{{Rows: [][]int64{{1, 2}}}}, Positions: []fault.Pos{{File: "mine.py", Line: 3}}}
		g.Nodes = append([]graph.Node{{Kind: graph.KindRead, Path: "transformer.h.1", Port: graph.PortOutput, Leaf: "0", Pos: -1},
			{Kind: graph.KindConst, Pos: -1}}, lines...)
		g.Nodes = append(g.Nodes, graph.Node{Kind: graph.KindSave, Args: []graph.Arg{ref(0)}, Pos: -1},
			graph.Node{Kind: graph.KindSave, Args: []graph.Arg{ref(2)}, Pos: -1})
		run, err := m.Start(g, []aten.Tensor{given})
		require.NoError(t, err, name)
		_, err = run.Step(0)
		run.Free()
		require.ErrorContains(t, err, "writes to the weights", name)
		e := fault.As(err)
		require.Equal(t, fault.Remote, e.Code, name)
		require.Equal(t, 3, e.Pos.Line, name)
		after, err := weight.Float32s()
		require.NoError(t, err)
		require.Equal(t, before, after, name)
		require.Equal(t, live, aten.Live(), name)
	}
}

func TestAProtectedModelRunsWhatItRan(t *testing.T) {
	m, err := Open(enginetest.Directory(t, enginetest.GPT2, 1), Options{})
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	edit := &graph.Graph{Invokes: []graph.Invoke{{Rows: [][]int64{{1, 2}}}}, Nodes: []graph.Node{
		{Kind: graph.KindRead, Path: "transformer.h.1", Port: graph.PortOutput, Leaf: "0", Pos: -1},
		{Kind: graph.KindCall, Op: "aten::zero_.default", Args: []graph.Arg{graph.Ref(0)}, Pos: -1},
		{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(1)}, Pos: -1}}}
	for range 2 {
		run, err := m.Start(edit, nil)
		require.NoError(t, err)
		_, err = run.Step(0)
		require.NoError(t, err)
		_, tensors, err := run.Results()
		require.NoError(t, err)
		freeAll(tensors)
		require.NoError(t, m.Protect())
	}
}

// What refuseWrite relies on.
func TestOperatorsThatWriteSaySoInTheirNames(t *testing.T) {
	written := regexp.MustCompile(`\(\w+!( -> [^)]*)?\)`)
	for _, op := range guard.Operators() {
		schemas, err := aten.Schemas(op)
		require.NoError(t, err, op)
		for _, schema := range schemas {
			head, rest, _ := strings.Cut(schema, "(")
			arguments, _, _ := strings.Cut(rest, ") -> ")
			inPlace, named, _ := strings.Cut(arguments, "*, ")
			for _, argument := range strings.Split(named, ", ") { // results that go somewhere: they have no place, only names
				if written.MatchString(argument) {
					words := strings.Fields(argument)
					n := graph.Node{Kind: graph.KindCall, Op: head, Kwargs: []graph.Kwarg{{Name: words[len(words)-1], Arg: graph.Ref(0)}}, Pos: -1}
					g := &graph.Graph{Invokes: []graph.Invoke{{}}, Nodes: []graph.Node{n}}
					require.Error(t, guard.Check(g), schema)
				}
			}
			if arguments = inPlace; !written.MatchString(arguments) {
				continue
			}
			require.True(t, isInPlace(head), schema)
			first, others, _ := strings.Cut(arguments, ",")
			require.Regexp(t, written, first, schema)
			require.NotRegexp(t, written, others, schema)
		}
	}
}
