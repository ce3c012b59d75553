package aten

// #include "aten.h"
import "C"

import (
	"strings"
	"sync"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Op is an operator that can be called. It lives as long as the process.
type Op struct {
	name string
	p    unsafe.Pointer
}

var ops sync.Map // name -> *Op

// Find looks an operator up: "aten::add.Tensor" is that overload, "aten::add" the one that fits
// the arguments of each call. Safe for concurrent use.
func Find(name string) (*Op, error) {
	if op, ok := ops.Load(name); ok {
		return op.(*Op), nil
	}
	base, overload, exact := strings.Cut(name, ".")
	if !strings.Contains(base, "::") || strings.ContainsRune(name, 0) {
		return nil, fault.New(fault.Op, "%q is not the name of an operator", name).
			WithHint(`Names look like "aten::add" or "aten::add.Tensor".`)
	}
	var overloadName *C.char
	if exact {
		if overload == "default" {
			overload = ""
		}
		overloadName = C.CString(overload)
		defer C.nnga_free(unsafe.Pointer(overloadName))
	}
	baseName := C.CString(base)
	defer C.nnga_free(unsafe.Pointer(baseName))
	op := &Op{name: name}
	var msg *C.char
	if C.nnga_op_find(baseName, overloadName, &op.p, &msg) != 0 {
		return nil, opError(name, msg)
	}
	found, _ := ops.LoadOrStore(name, op)
	return found.(*Op), nil
}

// Name is the name the operator was found by.
func (o *Op) Name() string { return o.name }

// CallFrame calls the operator on an encoded frame: nargs positional arguments, then one for each
// name of kwnames. A single result is itself, several are a tuple, none is None.
func (o *Op) CallFrame(f *Frame, nargs int, kwnames []string) (Value, error) {
	vals, strings := f.pointers()
	f.names = f.names[:0]
	for _, n := range kwnames {
		f.names = append(f.names, intern(n))
	}
	var names **C.char
	if len(f.names) > 0 {
		names = &f.names[0]
	}
	var outs *C.nnga_val
	var nouts C.int64_t
	var msg *C.char
	if C.nnga_op_call(o.p, vals, C.int64_t(len(f.vals)), C.int64_t(nargs), C.int64_t(len(kwnames)), names, strings,
		&outs, &nouts, &msg) != 0 {
		return Value{}, opError(o.name, msg)
	}
	var v Value
	if nouts > 0 {
		v, _ = parse(unsafe.Slice(outs, int(nouts)))
	}
	C.nnga_free(unsafe.Pointer(outs))
	return v, nil
}

// Named is an argument by name.
type Named struct {
	Name  string
	Value Value
}

// Call calls the operator on values.
func (o *Op) Call(args []Value, kwargs ...Named) (Value, error) {
	var f Frame
	var names []string
	for i := range args {
		if err := f.Value(args[i]); err != nil {
			return Value{}, err
		}
	}
	for i := range kwargs {
		names = append(names, kwargs[i].Name)
		if err := f.Value(kwargs[i].Value); err != nil {
			return Value{}, err
		}
	}
	return o.CallFrame(&f, len(args), names)
}

// Schemas gives the schemas of an operator's overloads, for a person.
func Schemas(name string) ([]string, error) {
	var out, msg *C.char
	c := C.CString(name)
	defer C.nnga_free(unsafe.Pointer(c))
	if C.nnga_op_schemas(c, &out, &msg) != 0 {
		return nil, opError(name, msg)
	}
	defer C.nnga_free(unsafe.Pointer(out))
	return strings.FieldsFunc(C.GoString(out), func(r rune) bool { return r == '\n' }), nil
}

// IndexGet is self[index] with Python's rules.
func IndexGet(self Tensor, index Value) (Tensor, error) {
	var f Frame
	if err := f.Value(index); err != nil {
		return Tensor{}, err
	}
	vals, strings := f.pointers()
	var out Tensor
	var msg *C.char
	if C.nnga_index_get(self.p, vals, C.int64_t(len(f.vals)), strings, &out.p, &msg) != 0 {
		return Tensor{}, opError("getitem", msg)
	}
	return out, nil
}

// IndexSet is self[index] = value, in place; value is a tensor or a number.
func IndexSet(self Tensor, index, value Value) error {
	var f, v Frame
	if err := f.Value(index); err != nil {
		return err
	}
	if err := v.Value(value); err != nil {
		return err
	}
	vals, strings := f.pointers()
	var msg *C.char
	if C.nnga_index_set(self.p, vals, C.int64_t(len(f.vals)), strings, &v.vals[0], &msg) != 0 {
		return opError("setitem", msg)
	}
	return nil
}
