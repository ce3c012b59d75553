// Package aten is the engine's only door to libtorch.
//
// Any operator of PyTorch can be called by its schema name ([Find], [Op.Call]); the overload is
// chosen by the arguments, as Python would. Errors are *fault.Error with PyTorch's own message.
//
// Ownership: a [Tensor] owns one at::Tensor handle and must be freed once ([Tensor.Free]); functions
// that take tensors only borrow them, and tensors they return are new. No finalizer helps: [Live]
// counts the handles, and tests hold it to zero.
//
// Threads: calls act on the calling OS thread, whose grad mode and thread pool torch keeps for
// itself; a caller that changes them locks its thread first.
package aten

/*
#cgo CFLAGS: -I${SRCDIR}/../../pybind
// The program itself must ask for torch's libraries: a library's run path says nothing about what
// other libraries need, and where the linker drops libraries that the program does not call
// directly, CUDA's kernels would never be loaded.
#cgo LDFLAGS: -lnng_aten -Wl,--push-state -Wl,--no-as-needed -lc10 -ltorch -ltorch_cpu -Wl,--pop-state
#include "aten.h"

extern void nngoRelease(uintptr_t);
// Only C can take the address of an exported function.
static int from_blob(void* data, const int64_t* sizes, int64_t ndim, int64_t type, uintptr_t ctx, void** out, char** err) {
	return nnga_from_blob(data, sizes, ndim, type, ctx != 0 ? nngoRelease : NULL, ctx, out, err);
}
*/
import "C"

import (
	"fmt"
	"runtime/cgo"
	"sync"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Tensor owns one handle on an at::Tensor. The zero value is no tensor.
type Tensor struct{ p unsafe.Pointer }

// Adopt takes over an at::Tensor* made with new.
func Adopt(p unsafe.Pointer) Tensor {
	if p != nil {
		C.nnga_count(1)
	}
	return Tensor{p}
}

// Release gives the handle up: its new owner deletes the at::Tensor.
func (t Tensor) Release() unsafe.Pointer {
	if t.p != nil {
		C.nnga_count(-1)
	}
	return t.p
}

// Borrow makes a handle of our own on a tensor that somebody else owns.
func Borrow(p unsafe.Pointer) (Tensor, error) {
	if p == nil {
		return Tensor{}, fault.New(fault.Op, "a tensor is needed, not nothing")
	}
	return Tensor{p}.Share()
}

// Pointer lends the at::Tensor*.
func (t Tensor) Pointer() unsafe.Pointer { return t.p }

// IsZero reports whether this is no tensor.
func (t Tensor) IsZero() bool { return t.p == nil }

// Share makes another handle on the same tensor; of no tensor, it is no tensor.
func (t Tensor) Share() (Tensor, error) {
	if t.p == nil {
		return Tensor{}, nil
	}
	out := C.nnga_tensor_clone_handle(t.p)
	if out == nil {
		return Tensor{}, opError("", nil)
	}
	return Tensor{out}, nil
}

// Free gives the handle back to libtorch. Freeing no tensor is fine; freeing twice is not.
func (t Tensor) Free() { C.nnga_tensor_free(t.p) }

// FreeAll gives up all of them.
func FreeAll(tensors []Tensor) {
	for _, t := range tensors {
		t.Free()
	}
}

// Live is the number of handles now held.
func Live() int64 { return int64(C.nnga_live()) }

// facts is what libtorch says of a tensor in one call; the zero value speaks of no tensor.
type facts [C.NNGA_FACTS]C.int64_t

func (t Tensor) facts() (f facts) {
	if t.p == nil {
		f[0], f[1] = -1, -1
		return f
	}
	var ndim C.int64_t
	var msg *C.char
	if C.nnga_tensor_facts(t.p, &f[0], nil, nil, &ndim, &msg) != 0 {
		C.nnga_free(unsafe.Pointer(msg)) // a tensor without memory of its own: what was found out stands
	}
	return f
}

// geometry gives sizes and strides.
func (t Tensor) geometry() (sizes, strides []int64) {
	if t.p == nil {
		return nil, nil
	}
	var f facts
	var msg *C.char
	for room := C.int64_t(8); ; {
		both := make([]int64, 2*room)
		ndim := room
		if C.nnga_tensor_facts(t.p, &f[0], (*C.int64_t)(&both[0]), (*C.int64_t)(&both[room]), &ndim, &msg) != 0 {
			C.nnga_free(unsafe.Pointer(msg))
		}
		if ndim <= room {
			return both[:ndim:ndim], both[room : room+ndim : room+ndim]
		}
		room = ndim
	}
}

// Shape is the sizes of the axes.
func (t Tensor) Shape() []int64 { sizes, _ := t.geometry(); return sizes }

// Strides is the step of each axis in elements.
func (t Tensor) Strides() []int64 { _, strides := t.geometry(); return strides }

// DType is torch's name of the element type: "float32"; "" where it has none here.
func (t Tensor) DType() string { f := t.facts(); return dtypeNames[int64(f[0])] }

// Device is torch's name of the device: "cpu", "cuda:0".
func (t Tensor) Device() string {
	f := t.facts()
	name, known := deviceNames.Load(f[1])
	if !known {
		c := C.nnga_device_name(f[1])
		name = C.GoString(c)
		C.nnga_free(unsafe.Pointer(c))
		deviceNames.Store(f[1], name)
	}
	if name == "cpu" || name == "meta" {
		return name.(string)
	}
	return fmt.Sprintf("%s:%d", name, f[2])
}

var deviceNames sync.Map // by c10::DeviceType

// RequiresGrad reports whether autograd follows the tensor.
func (t Tensor) RequiresGrad() bool { f := t.facts(); return f[5] != 0 }

// Numel is the number of elements.
func (t Tensor) Numel() int64 { f := t.facts(); return int64(f[6]) }

// Bytes is what the elements take.
func (t Tensor) Bytes() int64 { f := t.facts(); return int64(f[3] * f[6]) }

// Version counts the changes in place that autograd knows of.
func (t Tensor) Version() int64 { f := t.facts(); return int64(f[7]) }

// StorageID is the same for tensors that share storage, while one of them lives.
func (t Tensor) StorageID() uintptr { f := t.facts(); return uintptr(f[8]) }

// Storage is what StorageID gives, and the bytes of that storage, which views share.
func (t Tensor) Storage() (id uintptr, bytes int64) {
	f := t.facts()
	return uintptr(f[8]), int64(f[11])
}

// DataPointer is the address of the first element, on the tensor's device.
func (t Tensor) DataPointer() unsafe.Pointer {
	f := t.facts()
	return *(*unsafe.Pointer)(unsafe.Pointer(&f[9]))
}

// dtypeNumbers and dtypeNames go from names to c10::ScalarType numbers and back.
var dtypeNumbers, dtypeNames = func() (map[string]int64, map[int64]string) {
	numbers, names := map[string]int64{}, map[int64]string{}
	for i := range int64(64) {
		if c := C.nnga_dtype_name(C.int64_t(i)); c != nil {
			names[i] = C.GoString(c)
			numbers[names[i]] = i
		}
	}
	return numbers, names
}()

func dtypeNumber(name string) (int64, error) {
	n, ok := dtypeNumbers[name]
	if !ok {
		return 0, fault.New(fault.Op, "there is no dtype %q", name).WithHint(`Names are torch's: "float32", "bfloat16", "int64".`)
	}
	return n, nil
}

// FromBlob makes a contiguous CPU tensor over memory that is not torch's, without copying. release,
// if not nil, is called once, when the last tensor that shares the storage dies, on whatever thread
// that is; it is not called if FromBlob fails, nor in a forked child.
func FromBlob(data unsafe.Pointer, shape []int64, dtype string, release func()) (Tensor, error) {
	number, err := dtypeNumber(dtype)
	if err != nil {
		return Tensor{}, err
	}
	var handle C.uintptr_t
	if release != nil {
		handle = C.uintptr_t(cgo.NewHandle(release))
	}
	sizes := make([]C.int64_t, len(shape)+1)
	for i, s := range shape {
		sizes[i] = C.int64_t(s)
	}
	var out Tensor
	var msg *C.char
	if C.from_blob(data, &sizes[0], C.int64_t(len(shape)), C.int64_t(number), handle, &out.p, &msg) != 0 {
		if handle != 0 {
			cgo.Handle(handle).Delete()
		}
		return Tensor{}, opError("", msg)
	}
	return out, nil
}

//export nngoRelease
func nngoRelease(ctx C.uintptr_t) {
	h := cgo.Handle(ctx)
	release := h.Value().(func())
	h.Delete()
	release()
}

// opError takes over a message of the C side.
func opError(op string, msg *C.char) error {
	text := "out of memory"
	if msg != nil {
		text = C.GoString(msg)
	}
	C.nnga_free(unsafe.Pointer(msg))
	e := fault.New(fault.Op, "%s", text)
	e.Op = op
	return e
}

// CUDAAvailable reports whether torch sees a CUDA device.
func CUDAAvailable() bool { return C.nnga_cuda_available() != 0 }

// TorchVersion is libtorch's own version.
func TorchVersion() string { return C.GoString(C.nnga_torch_version()) }
