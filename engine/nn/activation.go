package nn

import (
	"maps"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// activation is one entry of transformers' table of activation functions.
type activation struct {
	class string
	extra string
	apply func(x Value) Value
}

// activations are those of transformers, by the name configs use. gelu_new and its kin are written
// out in Python there; PyTorch's fused tanh approximation is the same function to the last digits
// (and nearer the exact value in half precision) at an eighth of the memory traffic.
var activations = map[string]activation{
	"gelu":              {"GELUActivation", "", op("gelu")},
	"gelu_python":       {"GELUActivation", "", op("gelu")},
	"gelu_new":          {"NewGELUActivation", "", tanhGELU},
	"gelu_accurate":     {"AccurateGELUActivation", "", tanhGELU},
	"gelu_fast":         {"FastGELUActivation", "", tanhGELU},
	"gelu_pytorch_tanh": {"GELUTanh", "", tanhGELU},
	"gelu_python_tanh":  {"GELUTanh", "", tanhGELU},
	"quick_gelu":        {"QuickGELUActivation", "", func(x Value) Value { return x.Mul(x.MulScalar(1.702).Sigmoid()) }},
	"relu":              {"ReLU", "", op("relu")},
	"relu2":             {"ReLUSquaredActivation", "", func(x Value) Value { return x.map1("relu").Pow(2) }},
	"relu6":             {"ReLU6", "", op("relu6")},
	"leaky_relu":        {"LeakyReLU", "negative_slope=0.01", op("leaky_relu")},
	"silu":              {"SiLUActivation", "", op("silu")},
	"swish":             {"SiLU", "", op("silu")},
	"sigmoid":           {"Sigmoid", "", op("sigmoid")},
	"tanh":              {"Tanh", "", op("tanh")},
	"mish":              {"MishActivation", "", op("mish")},
	"hardswish":         {"Hardswish", "", op("hardswish")},
	"linear":            {"LinearActivation", "", func(x Value) Value { return x }},
}

func op(name string) func(Value) Value {
	return func(x Value) Value { return x.map1(name) }
}

func tanhGELU(x Value) Value {
	return x.b.call("gelu", x.shape, x.dtype, []graph.Arg{x.arg()}, graph.Kwarg{Name: "approximate", Arg: graph.String("tanh")})
}

// ActivationNames lists the activation functions there are, sorted.
func ActivationNames() []string { return slices.Sorted(maps.Keys(activations)) }

// HasActivation reports whether there is an activation function of that name.
func HasActivation(name string) bool {
	_, ok := activations[name]
	return ok
}

// Activation is an element-wise function as a module.
type Activation struct {
	*Module
	apply func(Value) Value
}

// NewActivation registers an activation function by the name configs use ("gelu_new").
func NewActivation(m *Module, name, function string) *Activation {
	a, ok := activations[function]
	if !ok {
		m.b.fail("there is no activation function %q", function)
	}
	return &Activation{Module: m.Child(name, a.class, a.extra), apply: a.apply}
}

// Forward keeps the shape.
func (a *Activation) Forward(x Value) Value {
	a.Enter(Arg(&x))
	x = a.apply(x)
	a.Leave(&x)
	return x
}
