package aten

// #include <stdlib.h>
// #include "aten.h"
import "C"

import (
	"unsafe"
)

// Track gives the value that takes t's place so that autograd follows it from here on: of the same
// memory, or t itself where autograd follows it already. retain has backward passes fill its gradient.
func Track(t Tensor, retain bool) (Tensor, error) {
	flag := C.int32_t(0)
	if retain {
		flag = 1
	}
	var out Tensor
	var msg *C.char
	if C.nnga_track(t.p, flag, &out.p, &msg) != 0 {
		return Tensor{}, opError("", msg)
	}
	return out, nil
}

// GradOrder says when autograd met the operation that gave t: what came later has the larger number.
// It is -1 where none gave it.
func (t Tensor) GradOrder() int64 { return int64(C.nnga_grad_order(t.p)) }

// Backward is a backward pass.
type Backward struct {
	Roots, Seeds     []Tensor // what it starts from, and their gradients: as many, or none for ones
	Targets          []Tensor // whose gradients are asked for
	Retained         []Tensor // that retain their gradients
	Edited, Replaced []Tensor // whose gradients are others from here on, and which
	Retain           bool     // the graph can be gone through again
	Create           bool     // the gradients have a history of their own
	Fill             bool     // fills the gradients that leaves keep, and values that retain theirs
}

// Run goes through the graph and gives the gradients of the targets, no tensor where it does not come
// to one.
func (b *Backward) Run() ([]Tensor, error) {
	var given [6]C.nnga_tensors
	for i, list := range [][]Tensor{b.Roots, b.Seeds, b.Targets, b.Retained, b.Edited, b.Replaced} {
		if len(list) == 0 {
			continue
		}
		// in C's memory, since C reads it through another pointer
		p := C.malloc(C.size_t(len(list)) * C.size_t(unsafe.Sizeof(uintptr(0))))
		defer C.free(p)
		pointers := unsafe.Slice((*unsafe.Pointer)(p), len(list))
		for k, t := range list {
			pointers[k] = t.p
		}
		given[i] = C.nnga_tensors{p: (*unsafe.Pointer)(p), n: C.int64_t(len(list))}
	}
	flags := C.int32_t(0)
	for flag, on := range map[C.int32_t]bool{C.NNGA_RETAIN: b.Retain, C.NNGA_CREATE: b.Create, C.NNGA_FILL: b.Fill} {
		if on {
			flags |= flag
		}
	}
	found := make([]Tensor, len(b.Targets)+1)
	var msg *C.char
	if C.nnga_backward(&given[0], flags, (*unsafe.Pointer)(unsafe.Pointer(&found[0])), &msg) != 0 {
		return nil, opError("backward", msg)
	}
	return found[:len(b.Targets)], nil
}
