package aten

// #include "aten.h"
import "C"

import (
	"sync/atomic"
	"unsafe"
)

var captures atomic.Int64

// Captures is how many there are now.
func Captures() int64 { return captures.Load() }

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
	captures.Add(1)
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

// Here reports whether this thread gives its work to the stream that the capture belongs to, and so may replay it.
func (c *Capture) Here() bool { return C.nnga_capture_here(c.p) != 0 }

// Replay has the device do what was captured, to the same memory.
func (c *Capture) Replay() error {
	var msg *C.char
	if C.nnga_capture_replay(c.p, &msg) != 0 {
		return opError("", msg)
	}
	return nil
}

// Free gives up what was captured, and the memory it works on.
func (c *Capture) Free() {
	C.nnga_capture_free(c.p)
	c.p = nil
	captures.Add(-1)
}

// CaptureSettings are the settings of torch on this thread that a captured pass keeps to. It reports false where
// nothing is to be captured or replayed now: under autocast.
func CaptureSettings(device string) (int64, bool) {
	c := C.CString(device)
	defer C.nnga_free(unsafe.Pointer(c))
	settings := C.nnga_capture_settings(c)
	return int64(settings), settings >= 0
}

// IsPlain reports whether a tensor is no more than elements in a storage: not sparse, conjugated lazily or quantized.
func (t Tensor) IsPlain() bool { return C.nnga_is_plain(t.p) != 0 }

// Places are tensors, and what tells whether they are where they were.
type Places struct{ tensors, known []unsafe.Pointer }

// Add notes where a tensor is now: where known, which shares its memory, is. p borrows both.
func (p *Places) Add(t, known Tensor) {
	p.tensors = append(p.tensors, t.p)
	p.known = append(p.known, known.p)
}

// Unmoved reports whether all of them are where they were, of the same sizes and dtype, and autograd follows none.
func (p *Places) Unmoved() bool {
	n := len(p.tensors)
	return n == 0 || C.nnga_unmoved(&p.tensors[0], &p.known[0], C.int64_t(n)) != 0
}
