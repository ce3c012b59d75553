package weights

import (
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Tensor gives a tensor over the mapped file [new], on the CPU, in the dtype of the file. Two tensors
// of one name share memory, and changes in place stay in this process. Data that does not begin at a
// multiple of its elements' size is copied, since kernels may rely on it.
func (c *Checkpoint) Tensor(name string) (aten.Tensor, error) {
	info, ok := c.infos[name]
	if !ok {
		return aten.Tensor{}, fault.New(fault.ModelLoad, "%s has no tensor %q", c.dir, name)
	}
	t, err := c.tensor(info)
	if err != nil {
		if e := fault.As(err); e.Code == fault.Op { // libtorch's refusal, say of a dtype
			err = fault.New(fault.ModelLoad, "tensor %q of %s cannot be made", name, c.where[name].path).WithCause(err)
		}
	}
	return t, err
}

func (c *Checkpoint) tensor(info Info) (aten.Tensor, error) {
	if info.Bytes == 0 {
		return aten.FromBlob(nil, info.Shape, info.DType, nil)
	}
	data, release, err := c.bytes(info.Name)
	if err != nil {
		return aten.Tensor{}, err
	}
	at := unsafe.Pointer(&data[0])
	if info.Start%info.Width != 0 { // mappings begin at a page
		defer release()
		return realigned(at, info)
	}
	t, err := aten.FromBlob(at, info.Shape, info.DType, release)
	if err != nil {
		release()
	}
	return t, err
}

// GiveBack lets the kernel have the memory of a tensor that lies in the mapped files and that nobody has
// written to; it is read from the file again where it is used. Other tensors keep theirs.
func (c *Checkpoint) GiveBack(t aten.Tensor) {
	for _, s := range c.all {
		s.giveBack(t.DataPointer(), t.Bytes())
	}
}

// realigned copies data as bytes, into memory of torch's, and views it as what it is.
func realigned(at unsafe.Pointer, info Info) (aten.Tensor, error) {
	lent, err := aten.FromBlob(at, []int64{info.Bytes}, "uint8", nil)
	if err != nil {
		return lent, err
	}
	defer lent.Free()
	flat, err := aten.Clone(lent)
	if err != nil {
		return flat, err
	}
	defer flat.Free()
	typed, err := call("aten::view.dtype", aten.TensorValue(flat), aten.Value{Kind: graph.ArgDType, S: info.DType})
	if err != nil {
		return typed, err
	}
	defer typed.Free()
	return call("aten::view.default", aten.TensorValue(typed), aten.IntsValue(info.Shape...))
}

// call calls an operator that gives one tensor.
func call(name string, args ...aten.Value) (aten.Tensor, error) {
	op, err := aten.Find(name)
	if err != nil {
		return aten.Tensor{}, err
	}
	v, err := op.Call(args)
	return v.T, err
}
