package aten

import (
	"runtime"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	torch "github.com/wangkuiyi/gotorch"
)

// run calls an operator that returns one tensor.
func run(name string, args ...Value) (Tensor, error) {
	op, err := Find(name)
	if err != nil {
		return Tensor{}, err
	}
	v, err := op.Call(args)
	if err != nil {
		return Tensor{}, err
	}
	if v.Kind != graph.ArgRef {
		v.Free()
		return Tensor{}, fault.New(fault.Op, "%s did not return one tensor", name)
	}
	return v.T, nil
}

// Zeros makes a tensor of zeros.
func Zeros(dtype, device string, shape ...int64) (Tensor, error) {
	op, err := Find("aten::zeros.default")
	if err != nil {
		return Tensor{}, err
	}
	v, err := op.Call([]Value{IntsValue(shape...)}, Named{"dtype", Value{Kind: graph.ArgDType, S: dtype}},
		Named{"device", Value{Kind: graph.ArgDevice, S: device}})
	return v.T, err
}

// Narrow is the view of length elements from start on along an axis.
func Narrow(t Tensor, axis int, start, length int64) (Tensor, error) {
	return run("aten::narrow.default", TensorValue(t), IntValue(int64(axis)), IntValue(start), IntValue(length))
}

// Expand is the view with axes of size one repeated to the sizes given.
func Expand(t Tensor, sizes []int64) (Tensor, error) {
	return run("aten::expand.default", TensorValue(t), IntsValue(sizes...))
}

// Detach gives a tensor of the same memory that autograd does not follow.
func Detach(t Tensor) (Tensor, error) { return run("aten::detach.default", TensorValue(t)) }

// DetachInPlace lets autograd forget how a tensor came to be.
func DetachInPlace(t Tensor) {
	if out, err := run("aten::detach_.default", TensorValue(t)); err == nil {
		out.Free()
	}
}

// Leaf makes t a tensor whose gradient backward passes fill, and gives it.
func Leaf(t Tensor) (Tensor, error) {
	return run("aten::requires_grad_.default", TensorValue(t), BoolValue(true))
}

// Clone copies a tensor, keeping the order of its axes in memory.
func Clone(t Tensor) (Tensor, error) { return run("aten::clone.default", TensorValue(t)) }

// CloneContiguous copies a tensor into memory of its own, every element once.
func CloneContiguous(t Tensor) (Tensor, error) {
	op, err := Find("aten::clone.default")
	if err != nil {
		return Tensor{}, err
	}
	v, err := op.Call([]Value{TensorValue(t)},
		Named{"memory_format", Value{Kind: graph.ArgMemoryFormat, S: "contiguous_format"}})
	return v.T, err
}

// CloneStorage copies all of the memory that t is a part of, as one row of its dtype.
func CloneStorage(t Tensor) (Tensor, error) {
	f := t.facts()
	whole, err := run("aten::as_strided.default", TensorValue(t), IntsValue(int64(f[11]/f[3])), IntsValue(1), IntValue(0))
	if err != nil {
		return whole, err
	}
	defer whole.Free()
	return Clone(whole)
}

// ViewLike is the view of a storage, given as one row, that t is of its own.
func ViewLike(row, t Tensor) (Tensor, error) {
	f := t.facts()
	sizes, strides := t.geometry()
	return run("aten::as_strided.default", TensorValue(row), IntsValue(sizes...), IntsValue(strides...), IntValue(int64(f[4])))
}

// CopyInto writes from into t, which it must broadcast to.
func CopyInto(t, from Tensor) error {
	out, err := run("aten::copy_.default", TensorValue(t), TensorValue(from))
	out.Free()
	return err
}

// Prepack copies outputs [from, to) of a weight into the layout in which oneDNN multiplies it; no tensor
// where oneDNN does no such products. The weight is [out, in], or [in, out] if transposed.
func Prepack(weight Tensor, transposed bool, from, to int64) (Tensor, error) {
	op, err := Find("nng::prepack")
	if err != nil {
		return Tensor{}, err
	}
	v, err := op.Call([]Value{TensorValue(weight), BoolValue(transposed), IntValue(from), IntValue(to)})
	return v.T, err
}

// To converts to a device and a dtype; it shares the tensor where nothing changes.
func To(t Tensor, device, dtype string) (Tensor, error) {
	return run("aten::to.device", TensorValue(t), Value{Kind: graph.ArgDevice, S: device}, Value{Kind: graph.ArgDType, S: dtype})
}

// FillInt64s makes an int64 tensor on the CPU whose elements, 0 at first, fill sets.
func FillInt64s(fill func([]int64), shape ...int64) (Tensor, error) {
	return filled("int64", shape, fill)
}

// FillBools makes a bool tensor on the CPU whose elements, false at first, fill sets.
func FillBools(fill func([]bool), shape ...int64) (Tensor, error) { return filled("bool", shape, fill) }

func filled[T int64 | bool](dtype string, shape []int64, fill func([]T)) (Tensor, error) {
	op, err := Find("aten::zeros.default")
	if err != nil {
		return Tensor{}, err
	}
	v, err := op.Call([]Value{IntsValue(shape...)}, Named{"dtype", Value{Kind: graph.ArgDType, S: dtype}})
	if err != nil {
		return Tensor{}, err
	}
	fill(unsafe.Slice((*T)(v.T.DataPointer()), int(v.T.Numel())))
	return v.T, nil
}

// FromFloat32s copies numbers into a float32 tensor on the CPU.
func FromFloat32s(data []float32, shape ...int64) (Tensor, error) {
	return fromSlice(unsafe.Pointer(unsafe.SliceData(data)), len(data), "float32", shape)
}

// FromBytes copies the elements of a contiguous tensor, in this machine's order, into a new one on the CPU.
func FromBytes(data []byte, dtype string, shape ...int64) (Tensor, error) {
	t, err := Zeros(dtype, "cpu", shape...)
	if err != nil {
		return Tensor{}, err
	}
	if t.Bytes() != int64(len(data)) {
		t.Free()
		return Tensor{}, fault.New(fault.Op, "%d bytes do not fill a tensor of %s %v", len(data), dtype, shape)
	}
	if len(data) > 0 {
		copy(unsafe.Slice((*byte)(t.DataPointer()), len(data)), data)
	}
	return t, nil
}

// AppendBytes appends the elements to out, row-major and in this machine's order.
func (t Tensor) AppendBytes(out []byte) ([]byte, error) {
	flat, err := t.flat(t.DType())
	if err != nil {
		return nil, err
	}
	defer flat.Free()
	if n := int(flat.Bytes()); n > 0 {
		out = append(out, unsafe.Slice((*byte)(flat.DataPointer()), n)...)
	}
	return out, nil
}

// flat is the tensor on the CPU, one element beside the other; free what it gives.
func (t Tensor) flat(dtype string) (Tensor, error) {
	there, err := To(t, "cpu", dtype)
	if err != nil {
		return Tensor{}, err
	}
	defer there.Free()
	return run("aten::contiguous.default", TensorValue(there))
}

func fromSlice(data unsafe.Pointer, n int, dtype string, shape []int64) (Tensor, error) {
	want := int64(1)
	for _, s := range shape {
		want *= s
	}
	if want != int64(n) {
		return Tensor{}, fault.New(fault.Op, "%d elements do not fill a tensor of sizes %v", n, shape)
	}
	lent, err := FromBlob(data, shape, dtype, nil) // lent for as long as the copy takes
	if err != nil {
		return Tensor{}, err
	}
	defer lent.Free()
	defer runtime.KeepAlive(data) // nothing that Go sees holds it meanwhile
	return Clone(lent)
}

// Int64s copies the elements out, converted and in row-major order.
func (t Tensor) Int64s() ([]int64, error) { return toSlice[int64](t, "int64") }

// Float32s copies the elements out, converted and in row-major order.
func (t Tensor) Float32s() ([]float32, error) { return toSlice[float32](t, "float32") }

func toSlice[T int64 | float32](t Tensor, dtype string) ([]T, error) {
	flat, err := t.flat(dtype)
	if err != nil {
		return nil, err
	}
	defer flat.Free()
	out := make([]T, flat.Numel())
	copy(out, unsafe.Slice((*T)(flat.DataPointer()), len(out)))
	return out, nil
}

// Gotorch hands the tensor over to gotorch, which frees it when Go's collector finds it unused.
// Do not use t afterwards.
func (t Tensor) Gotorch() torch.Tensor {
	p := new(unsafe.Pointer)
	*p = t.Release()
	torch.SetTensorFinalizer(p)
	return torch.Tensor{T: p}
}

// FromGotorch makes a handle of our own on a gotorch tensor.
func FromGotorch(g torch.Tensor) (Tensor, error) {
	if g.T == nil {
		return Tensor{}, fault.New(fault.Op, "the gotorch tensor is empty")
	}
	t, err := Borrow(*g.T)
	runtime.KeepAlive(g.T) // its finalizer frees the tensor
	return t, err
}
