package main

/*
#include <stdlib.h>
#include "nng.h"
*/
import "C"

import (
	"slices"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/host"
)

//export nngo_hosted_new
func nngo_hosted_new(points *C.char, out *C.nng_model, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if points == nil || out == nil {
			return missing("points or out")
		}
		m, e := host.ReadHosted([]byte(C.GoString(points)))
		if e != nil {
			return e
		}
		*out = C.nng_model(models.add(&engine.Model{Native: m}))
		return nil
	})
}

//export nngo_run_wanted
func nngo_run_wanted(handle C.nng_run, forward, point *C.int32_t, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if forward == nil || point == nil {
			return missing("forward or point")
		}
		return withRun(handle, func(r *host.Run) error {
			at, ok := r.Wanted()
			if !ok {
				return fault.New(fault.Handle, "this run wants nothing").WithHint("Step it.")
			}
			*forward, *point = C.int32_t(at.Forward), C.int32_t(at.Point)
			return nil
		})
	})
}

//export nngo_run_feed
func nngo_run_feed(handle C.nng_run, tensors *unsafe.Pointer, n C.int64_t, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if n < 0 || tensors == nil && n > 0 {
			return missing("tensors")
		}
		return withRun(handle, func(r *host.Run) error {
			given := make([]aten.Tensor, 0, int(n))
			for _, p := range unsafe.Slice(tensors, int(n)) {
				t, e := aten.Tensor{}, error(nil)
				if p != nil { // else there is none this time
					t, e = aten.Borrow(p)
				}
				if e != nil {
					aten.FreeAll(given)
					return e
				}
				given = append(given, t)
			}
			return r.Feed(given)
		})
	})
}

//export nngo_run_given
func nngo_run_given(handle C.nng_run, out *C.nng_buf, tensors **unsafe.Pointer, n *C.int64_t, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil || tensors == nil || n == nil {
			return missing("out, tensors or n")
		}
		return withRun(handle, func(r *host.Run) error {
			given := r.Given()
			leaves := make([]int, 0, len(given))
			for leaf := range given {
				leaves = append(leaves, leaf)
			}
			slices.Sort(leaves)
			array := (*unsafe.Pointer)(C.malloc(C.size_t(len(given)+1) * C.size_t(unsafe.Sizeof(uintptr(0)))))
			for i, leaf := range leaves {
				unsafe.Slice(array, len(given))[i] = given[leaf].Release()
			}
			*tensors, *n = array, C.int64_t(len(given))
			return setJSON(out, leaves)
		})
	})
}
