package aten

// #include "aten.h"
import "C"

import "github.com/nnsight-go/nnsight-go/engine/graph"

// gotorch, which this package imports and so comes first, gives torch half as many threads as there are
// processors. That is less than it had, and in a Python process takes them from the user's own code too.
func init() { C.nnga_keep_threads() }

// GradEnabled reports whether autograd records on this thread.
func GradEnabled() bool { return C.nnga_grad_enabled() != 0 }

// SetGradEnabled switches autograd on this thread.
func SetGradEnabled(on bool) {
	flag := C.int32_t(0)
	if on {
		flag = 1
	}
	C.nnga_set_grad_enabled(flag)
}

// CurrentMode is this thread's autograd state.
func CurrentMode() graph.Mode {
	var m graph.Mode
	if GradEnabled() {
		m |= graph.ModeGrad
	}
	if C.nnga_inference_enabled() != 0 {
		m |= graph.ModeInference
	}
	return m
}

// InferenceMode switches inference mode on this thread until leave is called.
func InferenceMode(on bool) (leave func()) {
	flag := C.int32_t(0)
	if on {
		flag = 1
	}
	guard := C.nnga_inference_enter(flag)
	return func() { C.nnga_inference_leave(guard) }
}
