package aten

// #include "aten.h"
import "C"

import "unsafe"

// Capture is what a device was given once, to be done again: a CUDA graph. It must be freed once.
type Capture struct{ p unsafe.Pointer }

// CanCapture reports whether torch can capture what this device does.
func CanCapture(device string) bool {
	c := C.CString(device)
	defer C.nnga_free(unsafe.Pointer(c))
	return C.nnga_can_capture(c) != 0
}

// BeginCapture has the device note what this OS thread gives it, rather than do it, until [Capture.End].
// Meanwhile what looks at a value, or copies from the CPU, is an error, and so is the end then.
func BeginCapture(device string) (*Capture, error) {
	c := C.CString(device)
	defer C.nnga_free(unsafe.Pointer(c))
	out := &Capture{}
	var msg *C.char
	if C.nnga_capture_begin(c, &out.p, &msg) != 0 {
		return nil, opError("", msg)
	}
	return out, nil
}

// End ends the capture, on the thread that began it. It must be called, also after an error; where it
// gives one the capture can only be freed.
func (c *Capture) End() error {
	var msg *C.char
	if C.nnga_capture_end(c.p, &msg) != 0 {
		return opError("", msg)
	}
	return nil
}

// Replay has the device do what was captured, to the same memory. It reports false, and nothing was done, where
// this thread gives its work to another stream than the one that the capture belongs to.
func (c *Capture) Replay() (bool, error) {
	var done C.int32_t
	var msg *C.char
	if C.nnga_capture_replay(c.p, &done, &msg) != 0 {
		return false, opError("", msg)
	}
	return done != 0, nil
}

// Free gives up what was captured, and the memory it works on.
func (c *Capture) Free() {
	C.nnga_capture_free(c.p)
	c.p = nil
}

// Places are tensors with the addresses of their elements.
type Places struct {
	tensors []unsafe.Pointer
	places  []C.uintptr_t
}

// Add notes where a tensor is now. The tensor must outlive p.
func (p *Places) Add(t Tensor) {
	p.tensors = append(p.tensors, t.p)
	p.places = append(p.places, C.uintptr_t(uintptr(t.DataPointer())))
}

// Unmoved reports whether all of them are where they were, and autograd follows none.
func (p *Places) Unmoved() bool {
	n := len(p.tensors)
	return n == 0 || C.nnga_unmoved(&p.tensors[0], &p.places[0], C.int64_t(n)) != 0
}
