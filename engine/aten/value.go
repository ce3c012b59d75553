package aten

// #include "aten.h"
import "C"

import (
	"strings"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Value is an argument or a result of an operator. Its kind says which fields count, as in a
// graph.Arg, but that ArgRef means the tensor T.
type Value struct {
	Kind graph.ArgKind
	T    Tensor
	I    int64
	F, G float64
	S    string
	L    []Value
	Keys []string
}

// Free frees the tensors of a value.
func (v Value) Free() {
	if v.Kind == graph.ArgRef {
		v.T.Free()
	}
	for i := range v.L {
		v.L[i].Free()
	}
}

// Share makes a value of the same structure with handles of its own.
func (v Value) Share() (Value, error) {
	if v.Kind == graph.ArgRef {
		t, err := v.T.Share()
		v.T = t
		return v, err
	}
	list := v.L
	v.L = make([]Value, 0, len(list))
	for i := range list {
		item, err := list[i].Share()
		if err != nil {
			v.Free()
			return Value{}, err
		}
		v.L = append(v.L, item)
	}
	return v, nil
}

// TensorValue is a tensor as a value.
func TensorValue(t Tensor) Value { return Value{Kind: graph.ArgRef, T: t} }

// IntValue is an integer as a value.
func IntValue(i int64) Value { return Value{Kind: graph.ArgInt, I: i} }

// FloatValue is a floating-point number as a value.
func FloatValue(f float64) Value { return Value{Kind: graph.ArgFloat, F: f} }

// BoolValue is a boolean as a value.
func BoolValue(b bool) Value {
	if b {
		return Value{Kind: graph.ArgBool, I: 1}
	}
	return Value{Kind: graph.ArgBool}
}

// IntsValue is a list of integers as a value.
func IntsValue(list ...int64) Value {
	v := Value{Kind: graph.ArgList, L: make([]Value, len(list))}
	for i, x := range list {
		v.L[i] = IntValue(x)
	}
	return v
}

// Frame encodes the arguments of a call, flat, in memory that is reused from call to call. A
// container is its head and then its elements. A name that torch does not know is reported by the
// call. The zero value is ready to use; a frame belongs to one goroutine at a time.
type Frame struct {
	vals    []C.nnga_val // hold no Go pointers: C reads them as they are
	strings []byte
	names   []byte
	err     error
	// Where C puts the outcome of a call. It lives here because an operator may free memory that Go
	// lent, which calls back into Go, which may move the stack: C must not point there.
	result struct {
		out   C.nnga_val
		outs  *C.nnga_val
		nouts C.int64_t
		msg   *C.char
	}
}

// Reset empties the frame.
func (f *Frame) Reset() {
	f.vals = f.vals[:0]
	f.strings = f.strings[:0]
	f.err = nil
}

func (f *Frame) put(tag C.int32_t, i int64) {
	f.vals = append(f.vals, C.nnga_val{tag: tag, i: C.int64_t(i)})
}

// Tensor adds a tensor, which must outlive the call; no tensor is None.
func (f *Frame) Tensor(t Tensor) {
	if t.p == nil {
		f.None()
		return
	}
	f.vals = append(f.vals, C.nnga_val{tag: C.NNGA_TENSOR, p: C.intptr_t(uintptr(t.p))})
}

// None adds None.
func (f *Frame) None() { f.put(C.NNGA_NONE, 0) }

// Int adds an integer.
func (f *Frame) Int(i int64) { f.put(C.NNGA_INT, i) }

// Float adds a floating-point number.
func (f *Frame) Float(x float64) {
	f.vals = append(f.vals, C.nnga_val{tag: C.NNGA_FLOAT, d: C.double(x)})
}

// Complex adds a complex number.
func (f *Frame) Complex(x complex128) {
	f.vals = append(f.vals, C.nnga_val{tag: C.NNGA_COMPLEX, d: C.double(real(x)), e: C.double(imag(x))})
}

// Bool adds a boolean.
func (f *Frame) Bool(b bool) {
	if b {
		f.put(C.NNGA_BOOL, 1)
	} else {
		f.put(C.NNGA_BOOL, 0)
	}
}

// String adds a string.
func (f *Frame) String(s string) { f.text(C.NNGA_STRING, s) }

// List adds the head of a list; its n elements follow.
func (f *Frame) List(n int) { f.put(C.NNGA_LIST, int64(n)) }

// Tuple adds the head of a tuple; its n elements follow.
func (f *Frame) Tuple(n int) { f.put(C.NNGA_TUPLE, int64(n)) }

// Slice adds the head of a slice; start, stop and step follow, each an integer or None.
func (f *Frame) Slice() { f.put(C.NNGA_SLICE, 0) }

// Ellipsis adds Python's "...".
func (f *Frame) Ellipsis() { f.put(C.NNGA_ELLIPSIS, 0) }

// DType adds a dtype by torch's name, "float32".
func (f *Frame) DType(name string) {
	n, err := dtypeNumber(name)
	f.fail(err)
	f.put(C.NNGA_DTYPE, n)
}

// Device adds a device by torch's name, "cpu" or "cuda:0".
func (f *Frame) Device(name string) { f.text(C.NNGA_DEVICE, name) }

// Layout adds a layout by torch's name, "strided".
func (f *Frame) Layout(name string) {
	n, ok := layouts[name]
	if !ok {
		f.fail(fault.New(fault.Op, "there is no layout %q", name))
	}
	f.put(C.NNGA_LAYOUT, n)
}

// MemoryFormat adds a memory format by torch's name, "contiguous_format".
func (f *Frame) MemoryFormat(name string) {
	n, ok := memoryFormats[name]
	if !ok {
		f.fail(fault.New(fault.Op, "there is no memory format %q", name))
	}
	f.put(C.NNGA_MEMORY_FORMAT, n)
}

// fail keeps the first failure for the call to report.
func (f *Frame) fail(err error) {
	if f.err == nil {
		f.err = err
	}
}

func (f *Frame) text(tag C.int32_t, s string) {
	f.vals = append(f.vals, C.nnga_val{tag: tag, i: C.int64_t(len(s)), p: C.intptr_t(len(f.strings))})
	f.strings = append(f.strings, s...)
}

// The numbers of c10::Layout and c10::MemoryFormat.
var (
	layouts = map[string]int64{"strided": 0, "sparse_coo": 1, "sparse_csr": 2, "_mkldnn": 3, "sparse_csc": 4,
		"sparse_bsr": 5, "sparse_bsc": 6, "jagged": 7}
	memoryFormats = map[string]int64{"contiguous_format": 0, "preserve_format": 1, "channels_last": 2,
		"channels_last_3d": 3}
)

// Value adds a value of any kind but a dictionary. The error is also what the call will report.
func (f *Frame) Value(v Value) error {
	switch v.Kind {
	case graph.ArgNone:
		f.None()
	case graph.ArgBool:
		f.Bool(v.I != 0)
	case graph.ArgInt:
		f.Int(v.I)
	case graph.ArgFloat:
		f.Float(v.F)
	case graph.ArgComplex:
		f.Complex(complex(v.F, v.G))
	case graph.ArgString:
		f.String(v.S)
	case graph.ArgRef:
		f.Tensor(v.T)
	case graph.ArgEllipsis:
		f.Ellipsis()
	case graph.ArgDType:
		f.DType(v.S)
	case graph.ArgDevice:
		f.Device(v.S)
	case graph.ArgLayout:
		f.Layout(v.S)
	case graph.ArgMemoryFormat:
		f.MemoryFormat(v.S)
	case graph.ArgList, graph.ArgTuple, graph.ArgSlice:
		switch {
		case v.Kind == graph.ArgList:
			f.List(len(v.L))
		case v.Kind == graph.ArgTuple:
			f.Tuple(len(v.L))
		case len(v.L) == 3:
			f.Slice()
		default:
			f.fail(fault.New(fault.Op, "a slice has a start, a stop and a step, not %d parts", len(v.L)))
			return f.err
		}
		for i := range v.L {
			if err := f.Value(v.L[i]); err != nil {
				return err
			}
		}
	case graph.ArgDict:
		f.fail(fault.New(fault.Op, "an operator takes no dictionary"))
	default:
		f.fail(fault.New(fault.Internal, "an argument of kind %d is unknown", v.Kind))
	}
	return f.err
}

// values is the first value as C sees it.
func (f *Frame) values() *C.nnga_val { return unsafe.SliceData(f.vals) }

// texts is the strings as C sees them.
func (f *Frame) texts() *C.char { return (*C.char)(unsafe.Pointer(unsafe.SliceData(f.strings))) }

// keywords lists the names, each ended by a NUL, as C wants them.
func (f *Frame) keywords(names []string) (*C.char, error) {
	f.names = f.names[:0]
	for _, name := range names {
		if strings.IndexByte(name, 0) >= 0 {
			return nil, fault.New(fault.Op, "%q is not the name of an argument", name)
		}
		f.names = append(append(f.names, name...), 0)
	}
	return (*C.char)(unsafe.Pointer(unsafe.SliceData(f.names))), nil
}

// parse reads one value of a result and says how many flat values it took.
func parse(vals []C.nnga_val) (Value, int) {
	head := &vals[0]
	switch head.tag {
	case C.NNGA_TENSOR:
		return Value{Kind: graph.ArgRef, T: tensorAt(head)}, 1
	case C.NNGA_BOOL:
		return Value{Kind: graph.ArgBool, I: int64(head.i)}, 1
	case C.NNGA_INT:
		return Value{Kind: graph.ArgInt, I: int64(head.i)}, 1
	case C.NNGA_FLOAT:
		return Value{Kind: graph.ArgFloat, F: float64(head.d)}, 1
	case C.NNGA_COMPLEX:
		return Value{Kind: graph.ArgComplex, F: float64(head.d), G: float64(head.e)}, 1
	case C.NNGA_STRING, C.NNGA_DEVICE:
		kind := graph.ArgString
		if head.tag == C.NNGA_DEVICE {
			kind = graph.ArgDevice
		}
		return Value{Kind: kind, S: C.GoStringN(*(**C.char)(unsafe.Pointer(&head.p)), C.int(head.i))}, 1
	case C.NNGA_LIST, C.NNGA_TUPLE:
		v := Value{Kind: graph.ArgList, L: make([]Value, int(head.i))}
		if head.tag == C.NNGA_TUPLE {
			v.Kind = graph.ArgTuple
		}
		at := 1
		for i := range v.L {
			item, n := parse(vals[at:])
			v.L[i] = item
			at += n
		}
		return v, at
	}
	return Value{}, 1
}

// tensorAt is the tensor of a value. Its address is libtorch's, not Go's.
func tensorAt(v *C.nnga_val) Tensor { return Tensor{*(*unsafe.Pointer)(unsafe.Pointer(&v.p))} }
