package aten

// #include <stdlib.h>
// #include "aten.h"
import "C"

import "unsafe"

// RandomState is the state of the generator of a device, "cpu" or "cuda:0", that random operators draw from.
func RandomState(device string) (Tensor, error) {
	name := C.CString(device)
	defer C.free(unsafe.Pointer(name))
	var out Tensor
	var msg *C.char
	if C.nnga_random_state(name, &out.p, &msg) != 0 {
		return Tensor{}, opError("", msg)
	}
	return out, nil
}

// SetRandomState puts a state back.
func SetRandomState(device string, state Tensor) error {
	name := C.CString(device)
	defer C.free(unsafe.Pointer(name))
	var msg *C.char
	if C.nnga_set_random_state(name, state.p, &msg) != 0 {
		return opError("", msg)
	}
	return nil
}
