package proxy

import (
	"reflect"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	torch "github.com/wangkuiyi/gotorch"
)

// Value is a tensor that a trace will compute.
type Value struct {
	invoke *Invoke
	id     graph.ID
	result torch.Tensor
	filled bool
}

// Save keeps the value: after Run, Tensor gives it.
func (v *Value) Save() *Value {
	saved := v.invoke.add(graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(v.id)}})
	v.invoke.trace.saved[saved.id] = v
	return v
}

// Call records an operator whose first argument is this value.
func (v *Value) Call(op string, args ...any) *Value {
	return v.invoke.Call(op, append([]any{v}, args...)...)
}

// Add gives v + other, a value, a tensor or a number.
func (v *Value) Add(other any) *Value { return v.Call("add", other) }

// Sub gives v - other.
func (v *Value) Sub(other any) *Value { return v.Call("sub", other) }

// Mul gives v * other, element by element.
func (v *Value) Mul(other any) *Value { return v.Call("mul", other) }

// Div gives v / other.
func (v *Value) Div(other any) *Value { return v.Call("div", other) }

// MatMul gives the matrix product of v and other.
func (v *Value) MatMul(other any) *Value { return v.Call("matmul", other) }

// Softmax gives the softmax along an axis.
func (v *Value) Softmax(axis int) *Value { return v.Call("softmax", axis) }

// Argmax gives the positions of the largest elements along an axis, as int64.
func (v *Value) Argmax(axis int) *Value { return v.Call("argmax", axis) }

// Clone gives a copy that later changes in place do not reach.
func (v *Value) Clone() *Value { return v.Call("clone") }

// Item gives element i of an operator's several results, as in Call("topk", 5).Item(0).
func (v *Value) Item(i int) *Value {
	return v.invoke.add(graph.Node{Kind: graph.KindItem, Args: []graph.Arg{graph.Ref(v.id), graph.Int(int64(i))}})
}

// Index gives v[index...]: integers, [Slice], [All], [Ellipsis], nil for a new axis, booleans, and
// tensors or values of integers or booleans.
func (v *Value) Index(index ...any) *Value {
	return v.invoke.add(graph.Node{Kind: graph.KindIndex, Args: []graph.Arg{graph.Ref(v.id), v.index(index)}})
}

// SetIndex sets v[index...] to a value, a tensor or a number, in place: what the model computes
// from here on feels it.
func (v *Value) SetIndex(value any, index ...any) {
	in := v.invoke
	in.add(graph.Node{Kind: graph.KindSetIndex, Args: []graph.Arg{graph.Ref(v.id), v.index(index), in.args([]any{value})[0]}})
}

func (v *Value) index(index []any) graph.Arg { return graph.Tuple(v.invoke.args(index)...) }

// Span is a slice of an axis; make one with [Slice].
type Span struct{ start, stop, step any }

// Slice is start:stop:step in an index; nil leaves a part out.
func Slice(start, stop, step any) Span { return Span{start, stop, step} }

// All is the whole axis, ":".
var All = Span{}

// Ellipsis is "..." in an index.
var Ellipsis = ellipsis{}

type ellipsis struct{}

// DType is a torch dtype as an argument, DType("float32").
type DType string

// args turns Go values into arguments of a node.
func (in *Invoke) args(values []any) []graph.Arg {
	out := make([]graph.Arg, len(values))
	for i, v := range values {
		out[i] = in.arg(v)
	}
	return out
}

func (in *Invoke) arg(v any) graph.Arg {
	switch x := v.(type) {
	case nil:
		return graph.Null()
	case *Value:
		if x == nil {
			break
		}
		if x.invoke.trace != in.trace {
			in.trace.fail(fault.New(fault.Graph, "a value of one trace is used in another").
				WithHint("Save it, run the first trace, and pass its Tensor."))
			return graph.Null()
		}
		return graph.Ref(x.id)
	case torch.Tensor:
		return in.constant(x)
	case bool:
		return graph.Bool(x)
	case int:
		return graph.Int(int64(x))
	case int64:
		return graph.Int(x)
	case float64:
		return graph.Float(x)
	case float32:
		return graph.Float(float64(x))
	case string:
		return graph.String(x)
	case DType:
		return graph.Arg{Kind: graph.ArgDType, S: string(x)}
	case ellipsis:
		return graph.Arg{Kind: graph.ArgEllipsis}
	case Span:
		return graph.Arg{Kind: graph.ArgSlice, L: in.args([]any{x.start, x.stop, x.step})}
	}
	if r := reflect.ValueOf(v); r.Kind() == reflect.Slice {
		items := make([]any, r.Len())
		for i := range items {
			items[i] = r.Index(i).Interface()
		}
		return graph.List(in.args(items)...)
	}
	in.trace.fail(fault.New(fault.Graph, "a %T cannot be an argument of an operator", v).
		WithHint("Arguments are values, tensors, numbers, booleans, strings, nil and slices of these."))
	return graph.Null()
}

// constant captures a tensor of the program.
func (in *Invoke) constant(x torch.Tensor) graph.Arg {
	if x.T == nil {
		in.trace.fail(fault.New(fault.Graph, "an empty gotorch tensor cannot be an argument of an operator"))
		return graph.Null()
	}
	in.trace.consts = append(in.trace.consts, x)
	v := in.add(graph.Node{Kind: graph.KindConst, Index: int32(len(in.trace.consts) - 1)})
	return graph.Ref(v.id)
}
