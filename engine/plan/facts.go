package plan

import (
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// fresh lists the operators whose results never share storage with their arguments. Anything not
// listed is taken to be a possible view, which is always safe: it only keeps more alive. The list
// is by the operator's base name, without overload.
var fresh = opSet(
	// arithmetic and comparison
	"add", "sub", "rsub", "mul", "div", "neg", "abs", "pow", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos",
	"tanh", "sigmoid", "erf", "clamp", "maximum", "minimum", "where", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
	"logical_or", "logical_not", "bitwise_not", "remainder", "floor_divide", "square", "sign", "round", "floor", "ceil",
	// reductions
	"sum", "mean", "std", "var", "amax", "amin", "argmax", "argmin", "norm", "linalg_vector_norm", "logsumexp", "topk",
	"sort", "argsort", "cumsum", "prod", "any", "all",
	// linear algebra
	"mm", "bmm", "matmul", "addmm", "baddbmm", "linear", "dot", "mv", "outer", "cosine_similarity",
	// layers
	"embedding", "layer_norm", "rms_norm", "softmax", "log_softmax", "gelu", "relu", "silu", "leaky_relu", "softplus",
	"scaled_dot_product_attention", "cross_entropy_loss", "nll_loss", "mse_loss", "kl_div",
	// building
	"clone", "cat", "stack", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "tril",
	"triu", "gather", "index_select", "masked_fill", "one_hot", "scatter", "repeat", "roll", "flip", "multinomial",
)

func opSet(names ...string) map[string]bool {
	set := make(map[string]bool, len(names))
	for _, n := range names {
		set[n] = true
	}
	return set
}

// baseName is the operator's name without namespace and overload: "add" of "aten::add.Tensor".
func baseName(op string) string {
	if i := strings.Index(op, "::"); i >= 0 {
		op = op[i+2:]
	}
	if i := strings.IndexByte(op, '.'); i >= 0 {
		op = op[:i]
	}
	return op
}

func isFresh(op string) bool { return fresh[baseName(op)] }

// isInPlace says whether an operator changes its first argument: PyTorch names those with a
// trailing underscore.
func isInPlace(op string) bool {
	name := baseName(op)
	return strings.HasSuffix(name, "_") && !strings.HasSuffix(name, "__") ||
		strings.HasPrefix(name, "__i") && strings.HasSuffix(name, "__")
}

// isGradient tells the kinds that are about gradients.
func isGradient(k graph.Kind) bool { return k >= graph.KindTrack && k <= graph.KindEnd }

// mutated gives the argument a node changes in place, or nil.
func mutated(n *graph.Node) *graph.Arg {
	switch n.Kind {
	case graph.KindSetIndex:
		return &n.Args[0]
	case graph.KindCall:
		for i := range n.Kwargs {
			if n.Kwargs[i].Name == "out" {
				return &n.Kwargs[i].Arg
			}
		}
		if isInPlace(n.Op) && len(n.Args) > 0 {
			return &n.Args[0]
		}
	}
	return nil
}

// shares calls f for each value that a node's result may share storage with: what it changes in
// place, or all it uses, unless its operator is known to give fresh memory. (set_ makes its target
// share the storage of another.)
func shares(n *graph.Node, f func(graph.ID)) {
	switch {
	case mutated(n) != nil && baseName(n.Op) != "set_":
		mutated(n).Refs(f)
	case n.Kind == graph.KindCall && isFresh(n.Op), isGradient(n.Kind):
	default:
		n.Refs(f)
	}
}

// random lists operators that draw from the generator: they run even when nothing reads their
// result, so that later draws are what PyTorch's would be.
var random = opSet("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "dropout",
	"native_dropout", "alpha_dropout", "feature_dropout", "bernoulli", "multinomial", "normal", "poisson", "binomial", "rrelu")

func isRandom(op string) bool { return random[baseName(op)] }

// Draws reports whether a node draws random numbers.
func Draws(n *graph.Node) bool { return n.Kind == graph.KindCall && isRandom(n.Op) }

// lasting lists operators that change what a tensor keeps beside its elements: they run though nothing
// reads their result.
var lasting = opSet("set_grad", "add_grad")

func isLasting(op string) bool { return lasting[baseName(op)] }
