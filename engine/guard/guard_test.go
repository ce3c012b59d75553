package guard

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

// with is a trace of one call of a value.
func with(op string, args ...graph.Arg) *graph.Graph {
	return &graph.Graph{
		Invokes: []graph.Invoke{{Rows: [][]int64{{1, 2, 3}}}}, Positions: []fault.Pos{{File: "demo.py", Line: 7}},
		Nodes: []graph.Node{{Kind: graph.KindRead, Port: graph.PortOutput, Pos: -1},
			{Kind: graph.KindCall, Op: op, Args: append([]graph.Arg{graph.Ref(0)}, args...)}},
	}
}

// named gives the call an argument by name.
func named(g *graph.Graph, name string, a graph.Arg) *graph.Graph {
	g.Nodes[1].Kwargs = append(g.Nodes[1].Kwargs, graph.Kwarg{Name: name, Arg: a})
	return g
}

func refuses(t *testing.T, g *graph.Graph, message string) {
	t.Helper()
	err := Check(g)
	require.ErrorContains(t, err, message)
	e := fault.As(err)
	require.Equal(t, fault.Remote, e.Code)
	require.Equal(t, 1, e.Node)
	require.Equal(t, "demo.py:7", e.Pos.String())
}

func TestLists(t *testing.T) {
	require.Greater(t, len(allowed), 600)
	for text, list := range map[string][]string{
		operatorsText: slices.Sorted(maps.Keys(allowed)), refusedText: slices.Sorted(maps.Keys(refused)),
	} {
		var lines []string
		for line := range strings.Lines(text) {
			lines = append(lines, strings.Fields(line)[0])
		}
		require.Equal(t, list, lines, "sorted, and nothing is there twice")
	}
	used := map[string]bool{}
	for name, why := range refused {
		require.NotContains(t, allowed, name)
		require.Contains(t, reasons, why, name)
		used[why] = true
	}
	require.Len(t, used, len(reasons), "every reason is one of an operator")
	for name := range checks {
		require.Contains(t, allowed, "aten::"+name)
	}
	for name, names := range allowed {
		require.NotEmpty(t, names, name)
		for _, withheld := range []string{"out", "generator", "pin_memory", "storage"} {
			require.NotContains(t, names, withheld, name)
		}
		for _, part := range []string{"sparse", "quantized", "mkldnn", "cudnn", "miopen", "_fused", "from_file", "nested",
			"storage", "stream", "as_strided", "resize", "empty", "rand", "bernoulli", "dropout"} {
			require.NotContains(t, name, part)
		}
	}
}

func TestAllowed(t *testing.T) {
	for _, g := range []*graph.Graph{
		with("aten::add", graph.Int(1)), with("aten::add.Tensor", graph.Ref(0)), named(with("aten::sum"), "dim", graph.Int(0)),
		with("aten::softmax.int", graph.Int(-1)), with("aten::div", graph.Int(2), graph.String("floor")),
		with("aten::chunk", graph.Int(4)), with("aten::tensor_split", graph.List(graph.Int(1), graph.Int(1<<40))),
		with("aten::to", graph.Arg{Kind: graph.ArgDevice, S: "cuda:1"}, graph.Arg{Kind: graph.ArgDType, S: "float16"}),
		with("aten::batch_norm", graph.Null(), graph.Null(), graph.Ref(0), graph.Ref(0), graph.Bool(false), graph.Float(.1), graph.Float(1e-5), graph.Bool(false)),
		with("aten::batch_norm", graph.Null(), graph.Null(), graph.Null(), graph.Null(), graph.Bool(true), graph.Float(.1), graph.Float(1e-5), graph.Bool(false)),
		named(with("aten::scaled_dot_product_attention", graph.Ref(0), graph.Ref(0)), "dropout_p", graph.Float(0)),
		with("nng::grad_of"),
	} {
		require.NoError(t, Check(g), "%s", g)
	}
}

func TestRefused(t *testing.T) {
	for op, message := range map[string]string{
		"aten::as_strided":           "past the tensor's own sizes",
		"aten::set_.source_Tensor":   "past the tensor's own sizes",
		"aten::resize_":              "past the tensor's own sizes",
		"aten::from_file":            "past the tensor's own sizes",
		"aten::empty_like":           "whatever the server's memory held",
		"aten::rand_like":            "draws random numbers",
		"aten::dropout":              "draws random numbers",
		"aten::embedding_renorm_":    "changes what several runs share",
		"aten::to_sparse":            "sparse, nested and oneDNN",
		"aten::quantize_per_tensor":  "quantized",
		"aten::pin_memory":           "the server's devices",
		"aten::requires_grad_":       "autograd",
		"aten::_unsafe_masked_index": "part of other operators",
		"aten::linalg_lu_solve":      "could end the server",
		"aten::_fused_adam_":         "is not among the operators",
		"aten::_foreach_add_":        "is not among the operators",
		"aten::mkldnn_linear":        "is not among the operators",
		"nng::linear":                "is not among the operators",
		"nng::prepack":               "is not among the operators",
		"prim::Print":                "is not among the operators",
		"aten::":                     "is not among the operators",
		"aten::softmx":               "Nearest: aten::softmax",
		strings.Repeat("x", 1<<20):   "is not among the operators",
	} {
		refuses(t, with(op), message)
	}
}

func TestArguments(t *testing.T) {
	refuses(t, named(with("aten::add", graph.Int(1)), "out", graph.Ref(0)), "writes them to nothing")
	refuses(t, named(with("aten::add.out", graph.Int(1)), "out", graph.Ref(0)), "writes them to nothing")
	refuses(t, named(with("aten::topk", graph.Int(1)), "values", graph.Ref(0)), `has no argument "values"`)
	refuses(t, named(with("aten::clone"), "generator", graph.Null()), "drawn where a trace is written")
	refuses(t, named(with("aten::zeros_like"), "pin_memory", graph.Bool(true)), "pinned memory")
	for _, name := range []string{"meta", "mkldnn", "xla:1", "", "privateuseone"} {
		refuses(t, named(with("aten::zeros_like"), "device", graph.Arg{Kind: graph.ArgDevice, S: name}), "computes on no device")
		refuses(t, named(with("aten::zeros_like"), "device", graph.String(name)), "computes on no device")
	}
	refuses(t, with("aten::to", graph.String("meta")), "computes on no device")
	refuses(t, named(with("aten::zeros_like"), "layout", graph.Arg{Kind: graph.ArgLayout, S: "sparse_coo"}), "layout sparse_coo")
	refuses(t, with("aten::add", graph.List(graph.Tuple(graph.Arg{Kind: graph.ArgLayout, S: "jagged"}))), "layout jagged")
	trained := []graph.Arg{graph.Null(), graph.Null(), graph.Ref(0), graph.Ref(0)}
	for _, op := range []string{"aten::batch_norm", "aten::instance_norm"} {
		refuses(t, with(op, append(trained, graph.Bool(true))...), "changes what several runs share")
		refuses(t, with(op, append(trained, graph.Ref(0))...), "changes what several runs share")
		refuses(t, with(op, trained...), "changes what several runs share")
	}
	refuses(t, named(named(with("aten::batch_norm"), "running_mean", graph.Ref(0)), "training", graph.Bool(true)), "changes what several runs share")
	refuses(t, with("aten::scaled_dot_product_attention", graph.Ref(0), graph.Ref(0), graph.Null(), graph.Float(.5)), "its dropout_p is 0.5")
	refuses(t, with("aten::scaled_dot_product_attention", graph.Ref(0), graph.Ref(0), graph.Null(), graph.Ref(0)), "its dropout_p is a value")
	require.NoError(t, Check(with("aten::median")))
	refuses(t, with("aten::median", graph.Int(-1)), "the median of all elements alone")
	refuses(t, named(with("aten::nanmedian.dim"), "dim", graph.Int(-1)), "the median of all elements alone")
	refuses(t, with("aten::chunk", graph.Int(1<<40)), "its chunks is")
	refuses(t, named(with("aten::tensor_split.sections"), "sections", graph.Int(1<<40)), "its sections is")
	refuses(t, named(with("aten::tensor_split"), "tensor_indices_or_sections", graph.Ref(0)), "is a value of the trace")
	refuses(t, with("aten::special_multigammaln", graph.Int(1<<31)), "its p is")
	refuses(t, with("aten::special_hermite_polynomial_h", graph.Int(1<<40)), "its n is")
	refuses(t, with("aten::special_hermite_polynomial_h", graph.Ref(0)), "its n is a value")
	refuses(t, with("aten::div", graph.Int(-1), graph.String("trunc")), "rounds quotients down")
	refuses(t, with("aten::div_", graph.Int(-1), graph.Ref(0)), "rounds quotients down")
}

func TestLimits(t *testing.T) {
	small := Limits{Nodes: 3, Invokes: 2, Tokens: 5, Arguments: 8, Steps: 4}
	for what, change := range map[string]func(*graph.Graph){
		"3 lines":     func(g *graph.Graph) { g.Nodes = append(g.Nodes, g.Nodes[0], g.Nodes[0]) },
		"2 invokes":   func(g *graph.Graph) { g.Invokes = append(g.Invokes, graph.Invoke{}, graph.Invoke{}) },
		"5 tokens":    func(g *graph.Graph) { g.Invokes = append(g.Invokes, g.Invokes[0]) },
		"8 arguments": func(g *graph.Graph) { g.Nodes[1].Args = make([]graph.Arg, 9) },
		"step 5":      func(g *graph.Graph) { g.Nodes[0].Step = 5 },
	} {
		g := with("aten::neg")
		require.NoError(t, small.Check(g))
		change(g)
		err := small.Check(g)
		require.ErrorContains(t, err, what)
		require.Equal(t, fault.Remote, fault.As(err).Code)
		require.NoError(t, Limits{}.Check(g), "zeros are no limits")
	}
}

// FuzzCheck decodes and checks what a stranger might send. What passes names nothing that is not on the list.
func FuzzCheck(f *testing.F) {
	for _, g := range []*graph.Graph{with("aten::add", graph.Int(1)), with("aten::as_strided"), named(with("aten::topk", graph.Int(1)), "largest", graph.Bool(false))} {
		f.Add(graph.Encode(g))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		g, err := graph.Decode(data)
		if err != nil {
			return
		}
		if err := Check(g); err != nil {
			require.Equal(t, fault.Remote, fault.As(err).Code)
			return
		}
		for i := range g.Nodes {
			if n := &g.Nodes[i]; n.Kind == graph.KindCall {
				base, _, _ := strings.Cut(n.Op, ".")
				require.Contains(t, allowed, base)
			}
		}
	})
}
