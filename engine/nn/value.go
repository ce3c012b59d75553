package nn

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Value is a tensor of the forward pass under construction. Its methods append the ATen calls of
// the same name and follow shapes and dtypes; axes count from the end when negative.
type Value struct {
	b     *Builder
	id    graph.ID
	shape graph.Shape
	dtype string
}

// None is no tensor: Python's None.
var None Value

// IsNone reports whether there is no tensor.
func (v Value) IsNone() bool { return v.b == nil }

// Shape is the symbolic shape.
func (v Value) Shape() graph.Shape { return v.shape }

// DType is torch's name of the dtype, "" for the model's own.
func (v Value) DType() string { return v.dtype }

// arg is the value as an argument of a node.
func (v Value) arg() graph.Arg {
	if v.IsNone() {
		return graph.Null()
	}
	return graph.Ref(v.id)
}

func ints(xs ...int64) graph.Arg {
	l := graph.List()
	for _, x := range xs {
		l.L = append(l.L, graph.Int(x))
	}
	return l
}

// axis turns an axis that may be negative into an index of the shape.
func (v Value) axis(dim int) int {
	i := dim
	if i < 0 {
		i += len(v.shape)
	}
	if i < 0 || i >= len(v.shape) {
		v.b.fail("axis %d of a tensor of sizes %s", dim, shapeText(v.shape))
	}
	return i
}

// Size is a size that does not depend on the input.
func (v Value) Size(dim int) int64 {
	d := v.shape[v.axis(dim)]
	if d < 0 {
		v.b.fail("axis %d of sizes %s depends on the input", dim, shapeText(v.shape))
	}
	return int64(d)
}

// map1 is an operator that keeps shape and dtype.
func (v Value) map1(op string, args ...graph.Arg) Value {
	return v.b.call(op, v.shape, v.dtype, append([]graph.Arg{v.arg()}, args...))
}

// broadcast is the shape of an element-wise operation on two tensors.
func (v Value) broadcast(o Value) graph.Shape {
	long, short := v.shape, o.shape
	if len(long) < len(short) {
		long, short = short, long
	}
	out := slices.Clone(long)
	for i := range short {
		at := len(long) - len(short) + i
		switch {
		case out[at] == short[i] || short[i] == 1:
		case out[at] == 1:
			out[at] = short[i]
		default:
			v.b.fail("sizes %s and %s do not go together", shapeText(v.shape), shapeText(o.shape))
		}
	}
	return out
}

// Add is v + o.
func (v Value) Add(o Value) Value {
	return v.b.call("add.Tensor", v.broadcast(o), v.dtype, []graph.Arg{v.arg(), o.arg()})
}

// Mul is v * o.
func (v Value) Mul(o Value) Value {
	return v.b.call("mul.Tensor", v.broadcast(o), v.dtype, []graph.Arg{v.arg(), o.arg()})
}

// AddScalar is v + x.
func (v Value) AddScalar(x float64) Value { return v.map1("add.Scalar", graph.Float(x)) }

// MulScalar is v * x.
func (v Value) MulScalar(x float64) Value { return v.map1("mul.Scalar", graph.Float(x)) }

// Neg is -v.
func (v Value) Neg() Value { return v.map1("neg") }

// Pow is v to the power x.
func (v Value) Pow(x int64) Value { return v.map1("pow.Tensor_Scalar", graph.Int(x)) }

// Rsqrt is 1 / sqrt(v).
func (v Value) Rsqrt() Value { return v.map1("rsqrt") }

// Cos is the cosine.
func (v Value) Cos() Value { return v.map1("cos") }

// Sin is the sine.
func (v Value) Sin() Value { return v.map1("sin") }

// Sigmoid is the logistic function.
func (v Value) Sigmoid() Value { return v.map1("sigmoid") }

// MeanLast is the mean over the last axis, which stays with size 1.
func (v Value) MeanLast() Value {
	shape := slices.Clone(v.shape)
	shape[v.axis(-1)] = 1
	return v.b.call("mean.dim", shape, v.dtype, []graph.Arg{v.arg(), ints(-1), graph.Bool(true)})
}

// Float converts to float32; a float32 tensor is itself.
func (v Value) Float() Value {
	return v.b.call("to.dtype", v.shape, "float32", []graph.Arg{v.arg(), {Kind: graph.ArgDType, S: "float32"}})
}

// TypeAs converts to the dtype of o; a tensor of that dtype is itself.
func (v Value) TypeAs(o Value) Value {
	return v.b.call("type_as", v.shape, o.dtype, []graph.Arg{v.arg(), o.arg()})
}

// Transpose exchanges two axes, as a view.
func (v Value) Transpose(a, b int) Value {
	shape := slices.Clone(v.shape)
	i, j := v.axis(a), v.axis(b)
	shape[i], shape[j] = shape[j], shape[i]
	return v.b.call("transpose.int", shape, v.dtype, []graph.Arg{v.arg(), graph.Int(int64(a)), graph.Int(int64(b))})
}

// Unsqueeze inserts an axis of size 1; dim counts in the result.
func (v Value) Unsqueeze(dim int) Value {
	at := dim
	if at < 0 {
		at += len(v.shape) + 1
	}
	if at < 0 || at > len(v.shape) {
		v.b.fail("unsqueeze(%d) of a tensor of sizes %s", dim, shapeText(v.shape))
	}
	shape := slices.Insert(slices.Clone(v.shape), at, 1)
	return v.b.call("unsqueeze", shape, v.dtype, []graph.Arg{v.arg(), graph.Int(int64(dim))})
}

// Unflatten splits an axis into several; one size may be -1 and is then what is left.
func (v Value) Unflatten(dim int, sizes ...int64) Value {
	at, total, known, hole := v.axis(dim), v.Size(dim), int64(1), -1
	parts := make(graph.Shape, len(sizes))
	for i, n := range sizes {
		parts[i] = graph.Dim(n)
		if n == -1 {
			hole = i
			continue
		}
		known *= n
	}
	if hole >= 0 && known > 0 {
		parts[hole] = graph.Dim(total / known)
		known *= total / known
	}
	if known != total {
		v.b.fail("an axis of size %d cannot be split into %v", total, sizes)
	}
	shape := slices.Concat(v.shape[:at], parts, v.shape[at+1:])
	return v.b.call("unflatten.int", shape, v.dtype, []graph.Arg{v.arg(), graph.Int(int64(dim)), ints(sizes...)})
}

// Flatten joins the axes from start to end (included) into one: a view where strides allow it,
// else a copy.
func (v Value) Flatten(start, end int) Value {
	i, j := v.axis(start), v.axis(end)
	total := int64(1)
	for k := i; k <= j; k++ {
		total *= v.Size(k)
	}
	shape := slices.Concat(v.shape[:i], graph.Shape{graph.Dim(total)}, v.shape[j+1:])
	return v.b.call("flatten.using_ints", shape, v.dtype,
		[]graph.Arg{v.arg(), graph.Int(int64(start)), graph.Int(int64(end))})
}

// Split cuts an axis into views of the given size.
func (v Value) Split(size int64, dim int) []Value {
	at, total := v.axis(dim), v.Size(dim)
	if size < 1 || total%size != 0 {
		v.b.fail("an axis of size %d cannot be cut into pieces of %d", total, size)
	}
	pieces := v.b.call("split.Tensor", nil, v.dtype, []graph.Arg{v.arg(), graph.Int(size), graph.Int(int64(dim))})
	shape := slices.Clone(v.shape)
	shape[at] = graph.Dim(size)
	out := make([]Value, total/size)
	for i := range out {
		out[i] = v.b.node(graph.Node{Kind: graph.KindItem, Args: []graph.Arg{pieces.arg(), graph.Int(int64(i))},
			Shape: shape, DType: v.dtype})
	}
	return out
}

// LastToken is the view of the last token of a tensor [batch, seq, ...], where the model generates: there
// the head computes what comes next, and nothing else. Elsewhere it is the tensor itself.
func (v Value) LastToken() Value {
	if !v.b.variant.Cached {
		return v
	}
	shape := slices.Clone(v.shape)
	shape[1] = 1
	var out Value
	v.b.varying(func() {
		out = v.b.call("slice.Tensor", shape, v.dtype, []graph.Arg{v.arg(), graph.Int(1), graph.Int(-1), graph.Null()})
	})
	return out
}

// Slice is the view [start:end] of an axis whose size does not depend on the input; end may be -1
// for the axis's end.
func (v Value) Slice(dim int, start, end int64) Value {
	at, total := v.axis(dim), v.Size(dim)
	stop, last := end, graph.Int(end)
	if end == -1 {
		stop, last = total, graph.Null()
	}
	if start < 0 || stop < start || stop > total {
		v.b.fail("slice %d:%d of an axis of size %d", start, stop, total)
	}
	shape := slices.Clone(v.shape)
	shape[at] = graph.Dim(stop - start)
	return v.b.call("slice.Tensor", shape, v.dtype,
		[]graph.Arg{v.arg(), graph.Int(int64(dim)), graph.Int(start), last})
}

// Cat joins tensors along an axis.
func Cat(dim int, vs ...Value) Value {
	first := vs[0]
	shape := slices.Clone(first.shape)
	at := first.axis(dim)
	list := graph.List(first.arg())
	for _, v := range vs[1:] {
		if len(v.shape) != len(shape) {
			first.b.fail("tensors of sizes %s and %s cannot be joined", shapeText(shape), shapeText(v.shape))
		}
		for i := range shape {
			if i != at && shape[i] != v.shape[i] {
				first.b.fail("tensors of sizes %s and %s cannot be joined", shapeText(shape), shapeText(v.shape))
			}
		}
		shape[at] += graph.Dim(v.Size(dim))
		list.L = append(list.L, v.arg())
	}
	return first.b.call("cat", shape, first.dtype, []graph.Arg{list, graph.Int(int64(dim))})
}

// MatMul is the matrix product over the last two axes; the others are equal.
func (v Value) MatMul(o Value) Value {
	if v.shape[v.axis(-1)] != o.shape[o.axis(-2)] {
		v.b.fail("%s cannot be multiplied by %s", shapeText(v.shape), shapeText(o.shape))
	}
	shape := slices.Clone(v.shape)
	shape[len(shape)-1] = o.shape[o.axis(-1)]
	return v.b.call("matmul", shape, v.dtype, []graph.Arg{v.arg(), o.arg()})
}

// SoftmaxLast is the softmax over the last axis, computed in float32 and given in v's own dtype.
func (v Value) SoftmaxLast() Value {
	soft := v.b.call("softmax.int", v.shape, "float32",
		[]graph.Arg{v.arg(), graph.Int(-1), {Kind: graph.ArgDType, S: "float32"}})
	return soft.TypeAs(v)
}

// MaskTo gives x where a boolean mask is false, and v elsewhere.
func (v Value) MaskTo(mask Value, x float64) Value {
	return v.b.call("where.ScalarOther", v.broadcast(mask), v.dtype, []graph.Arg{mask.arg(), v.arg(), graph.Float(x)})
}

// RepeatHeads repeats each head n times: [batch, heads, seq, dim] becomes [batch, heads*n, seq, dim].
func (v Value) RepeatHeads(n int64) Value {
	if n == 1 {
		return v
	}
	wide := v.Unsqueeze(2)
	shape := slices.Clone(wide.shape)
	shape[2] = graph.Dim(n)
	return v.b.call("expand", shape, v.dtype, []graph.Arg{wide.arg(), ints(-1, -1, n, -1, -1)}).Flatten(1, 2)
}
