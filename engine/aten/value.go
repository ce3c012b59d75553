package aten

// #include "aten.h"
import "C"

import (
	"sync"
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
// container is its head and then its elements.
type Frame struct {
	vals    []C.nnga_val
	strings []byte
	names   []*C.char
}

// Reset empties the frame.
func (f *Frame) Reset() {
	f.vals = f.vals[:0]
	f.strings = f.strings[:0]
}

func (f *Frame) put(v C.nnga_val) { f.vals = append(f.vals, v) }

// Tensor adds a tensor, which must outlive the call.
func (f *Frame) Tensor(t Tensor) { f.put(C.nnga_val{tag: C.NNGA_TENSOR, p: t.p}) }

// None adds None.
func (f *Frame) None() { f.put(C.nnga_val{tag: C.NNGA_NONE}) }

// Int adds an integer.
func (f *Frame) Int(i int64) { f.put(C.nnga_val{tag: C.NNGA_INT, i: C.int64_t(i)}) }

// Float adds a floating-point number.
func (f *Frame) Float(x float64) { f.put(C.nnga_val{tag: C.NNGA_FLOAT, d: C.double(x)}) }

// Bool adds a boolean.
func (f *Frame) Bool(b bool) {
	v := C.nnga_val{tag: C.NNGA_BOOL}
	if b {
		v.i = 1
	}
	f.put(v)
}

// List adds the head of a list; its n elements follow.
func (f *Frame) List(n int) { f.put(C.nnga_val{tag: C.NNGA_LIST, i: C.int64_t(n)}) }

// Tuple adds the head of a tuple; its n elements follow.
func (f *Frame) Tuple(n int) { f.put(C.nnga_val{tag: C.NNGA_TUPLE, i: C.int64_t(n)}) }

func (f *Frame) text(tag C.int32_t, s string) {
	v := C.nnga_val{tag: tag, i: C.int64_t(len(s))}
	*(*uintptr)(unsafe.Pointer(&v.p)) = uintptr(len(f.strings)) // an offset, not an address
	f.strings = append(f.strings, s...)
	f.put(v)
}

var layouts = map[string]int64{"strided": 0, "sparse_coo": 1, "sparse_csr": 2, "_mkldnn": 3, "sparse_csc": 4, "sparse_bsr": 5, "sparse_bsc": 6, "jagged": 7}

var memoryFormats = map[string]int64{"contiguous_format": 0, "preserve_format": 1, "channels_last": 2, "channels_last_3d": 3}

// Value adds a value of any kind but a dictionary.
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
		f.put(C.nnga_val{tag: C.NNGA_COMPLEX, d: C.double(v.F), e: C.double(v.G)})
	case graph.ArgString:
		f.text(C.NNGA_STRING, v.S)
	case graph.ArgDevice:
		f.text(C.NNGA_DEVICE, v.S)
	case graph.ArgRef:
		f.Tensor(v.T)
	case graph.ArgEllipsis:
		f.put(C.nnga_val{tag: C.NNGA_ELLIPSIS})
	case graph.ArgDType:
		n := dtypeNumber(v.S)
		if n < 0 {
			return fault.New(fault.Op, "there is no dtype %q", v.S)
		}
		f.put(C.nnga_val{tag: C.NNGA_DTYPE, i: C.int64_t(n)})
	case graph.ArgLayout:
		n, ok := layouts[v.S]
		if !ok {
			return fault.New(fault.Op, "there is no layout %q", v.S)
		}
		f.put(C.nnga_val{tag: C.NNGA_LAYOUT, i: C.int64_t(n)})
	case graph.ArgMemoryFormat:
		n, ok := memoryFormats[v.S]
		if !ok {
			return fault.New(fault.Op, "there is no memory format %q", v.S)
		}
		f.put(C.nnga_val{tag: C.NNGA_MEMORY_FORMAT, i: C.int64_t(n)})
	case graph.ArgList, graph.ArgTuple, graph.ArgSlice:
		switch v.Kind {
		case graph.ArgList:
			f.List(len(v.L))
		case graph.ArgTuple:
			f.Tuple(len(v.L))
		default:
			if len(v.L) != 3 {
				return fault.New(fault.Op, "a slice has a start, a stop and a step")
			}
			f.put(C.nnga_val{tag: C.NNGA_SLICE})
		}
		for i := range v.L {
			if err := f.Value(v.L[i]); err != nil {
				return err
			}
		}
	default:
		return fault.New(fault.Op, "an operator takes no dictionary")
	}
	return nil
}

// pointers gives the frame as C sees it.
func (f *Frame) pointers() (vals *C.nnga_val, strings *C.char) {
	if len(f.vals) > 0 {
		vals = &f.vals[0]
	}
	if len(f.strings) > 0 {
		strings = (*C.char)(unsafe.Pointer(&f.strings[0]))
	}
	return vals, strings
}

// parse reads one value of a result and says how many flat values it took.
func parse(vals []C.nnga_val) (Value, int) {
	head := &vals[0]
	switch head.tag {
	case C.NNGA_TENSOR:
		return Value{Kind: graph.ArgRef, T: Tensor{head.p}}, 1
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
		return Value{Kind: kind, S: C.GoStringN((*C.char)(head.p), C.int(head.i))}, 1
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

var interned sync.Map // string -> *C.char, kept for the life of the process

// intern gives a C copy of a name out of a small set: operator, argument and dtype names.
func intern(s string) *C.char {
	if p, ok := interned.Load(s); ok {
		return p.(*C.char)
	}
	p, _ := interned.LoadOrStore(s, C.CString(s))
	return p.(*C.char)
}
