package aten

/*
#include <stdlib.h>
#include "aten.h"
*/
import "C"

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Op is an operator that can be called. It lives as long as the process.
type Op struct {
	name   string
	p      unsafe.Pointer
	writes []Place
}

// Place is an argument of an operator: by position, or by its name alone where At is -1.
type Place struct {
	At   int
	Name string
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
	if err := op.findWrites(base); err != nil {
		return nil, err
	}
	found, _ := ops.LoadOrStore(name, op)
	return found.(*Op), nil
}

// Name is the name the operator was found by.
func (o *Op) Name() string { return o.name }

// Writes lists the arguments that a call may change in place; where calls choose an overload, those of any.
func (o *Op) Writes() []Place { return o.writes }

// silent lists what operators write to without their schemas saying so: running statistics, in training.
var silent = func() map[string][]Place {
	statistics := []Place{{3, "running_mean"}, {4, "running_var"}}
	list := map[string][]Place{}
	for _, name := range []string{"batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
		"_batch_norm_impl_index"} {
		list["aten::"+name] = statistics
	}
	return list
}()

func (o *Op) findWrites(base string) error {
	var text, msg *C.char
	if C.nnga_op_writes(o.p, &text, &msg) != 0 {
		return opError(o.name, msg)
	}
	defer C.nnga_free(unsafe.Pointer(text))
	o.writes = silent[base]
	for line := range strings.Lines(C.GoString(text)) {
		var w Place
		if _, err := fmt.Sscan(line, &w.At, &w.Name); err != nil {
			return fault.New(fault.Internal, "the schema of %s has an argument %q", o.name, line)
		}
		if !slices.Contains(o.writes, w) {
			o.writes = append(slices.Clip(o.writes), w)
		}
	}
	return nil
}

// CallFrame calls the operator on an encoded frame: nargs positional arguments, then one for each
// name of kwnames. A single result is itself, several are a tuple, none is None. The tensors of the
// result are new; an in-place operator gives a new handle on its argument.
func (o *Op) CallFrame(f *Frame, nargs int, kwnames []string) (Value, error) {
	if f.err != nil {
		return Value{}, o.where(f.err)
	}
	var names *C.char
	if len(kwnames) > 0 {
		var err error
		if names, err = f.keywords(kwnames); err != nil {
			return Value{}, o.where(err)
		}
	}
	r := &f.result
	r.outs, r.msg = nil, nil
	if C.nnga_op_call(o.p, f.values(), C.int64_t(nargs), C.int64_t(len(kwnames)), names, f.texts(),
		&r.out, &r.outs, &r.nouts, &r.msg) != 0 {
		return Value{}, opError(o.name, r.msg)
	}
	if r.nouts == 0 {
		if r.out.tag == C.NNGA_TENSOR {
			return Value{Kind: graph.ArgRef, T: tensorAt(&r.out)}, nil
		}
		v, _ := parse(unsafe.Slice(&r.out, 1))
		return v, nil
	}
	v, _ := parse(unsafe.Slice(r.outs, int(r.nouts)))
	C.nnga_free(unsafe.Pointer(r.outs))
	return v, nil
}

// where names the operator in an error about its arguments.
func (o *Op) where(err error) error {
	e := *fault.As(err)
	e.Op = o.name
	return &e
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
			return Value{}, o.where(err)
		}
	}
	for i := range kwargs {
		names = append(names, kwargs[i].Name)
		if err := f.Value(kwargs[i].Value); err != nil {
			return Value{}, o.where(err)
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

// IndexGet is self[index] with Python's rules: integers, slices, None, Ellipsis, booleans, lists, and
// boolean or integer tensors, or a tuple of these. What Python gives as a view is a view.
func IndexGet(self Tensor, index Value) (Tensor, error) {
	if self.p == nil {
		return Tensor{}, fault.New(fault.Op, "there is no tensor to index")
	}
	var f Frame
	if err := f.Value(index); err != nil {
		return Tensor{}, err
	}
	var out Tensor
	var msg *C.char
	if C.nnga_index_get(self.p, f.values(), &out.p, &msg) != 0 {
		return Tensor{}, opError("getitem", msg)
	}
	return out, nil
}

// IndexSet is self[index] = value, in place and with Python's rules; value is a tensor, which must
// broadcast to the place, or a number.
func IndexSet(self Tensor, index, value Value) error {
	if self.p == nil {
		return fault.New(fault.Op, "there is no tensor to index")
	}
	var f, v Frame
	if err := f.Value(index); err != nil {
		return err
	}
	if err := v.Value(value); err != nil {
		return err
	}
	var msg *C.char
	if C.nnga_index_set(self.p, f.values(), v.values(), &msg) != 0 {
		return opError("setitem", msg)
	}
	return nil
}
