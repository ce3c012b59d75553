package main

/*
#include <stdlib.h>
#include <string.h>
#include "nng.h"
*/
import "C"

import (
	"encoding/json"
	"runtime/debug"
	"sync"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// guard runs the body of an export: it catches panics, puts a failure into *err as JSON and gives
// the code to return.
func guard(err *C.nng_buf, body func() error) (code C.int) {
	defer func() {
		if r := recover(); r != nil {
			e := fault.New(fault.Internal, "the engine panicked: %v\n%s", r, debug.Stack()).
				WithHint("This is a bug in nnsight-go; please report it with the text above.")
			code = C.NNG_EPANIC
			setFault(err, e)
		}
	}()
	e := fault.As(body())
	if e == nil {
		return C.NNG_OK
	}
	setFault(err, e)
	switch {
	case e.Code == fault.Handle && e.Cause == errBusy:
		return C.NNG_EBUSY
	case e.Code == fault.Handle:
		return C.NNG_EHANDLE
	}
	return C.NNG_EFAULT
}

// missing says that an argument without which a function can do nothing is null, or its size negative.
func missing(what string) error {
	return fault.New(fault.Input, "the arguments make no sense: %s is null, or its size is negative", what)
}

func setFault(err *C.nng_buf, e *fault.Error) {
	if err == nil {
		return
	}
	text, failed := json.Marshal(e)
	if failed != nil {
		text, _ = json.Marshal(map[string]string{"code": string(fault.Internal), "message": e.Error()})
	}
	setBuf(err, text)
}

// setBuf gives the caller a copy of data, which they free with nng_free.
func setBuf(out *C.nng_buf, data []byte) {
	out.size = C.int64_t(len(data))
	out.data = (*C.uint8_t)(C.malloc(C.size_t(len(data) + 1)))
	if len(data) > 0 {
		C.memcpy(unsafe.Pointer(out.data), unsafe.Pointer(&data[0]), C.size_t(len(data)))
	}
	*(*byte)(unsafe.Add(unsafe.Pointer(out.data), len(data))) = 0 // so that it prints in a debugger
}

func setJSON(out *C.nng_buf, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	setBuf(out, text)
	return nil
}

// table hands out handles for values. A handle is never used twice, so a stale one is always
// recognised; its top byte says what it is a handle of.
type table[T any] struct {
	name  string
	kind  uint64
	mu    sync.Mutex
	next  uint64
	items map[uint64]T
}

var tables []interface{ count() int }

func newTable[T any](name string) *table[T] {
	t := &table[T]{name: name, kind: uint64(len(tables)+1) << 56, items: map[uint64]T{}}
	tables = append(tables, t)
	return t
}

func (t *table[T]) add(v T) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next++
	h := t.kind | t.next
	t.items[h] = v
	return h
}

func (t *table[T]) get(h uint64) (T, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	v, ok := t.items[h]
	if !ok {
		return v, t.stale(h)
	}
	return v, nil
}

// take gives the value and forgets the handle.
func (t *table[T]) take(h uint64) (T, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	v, ok := t.items[h]
	if !ok {
		return v, t.stale(h)
	}
	delete(t.items, h)
	return v, nil
}

func (t *table[T]) stale(h uint64) error {
	if h&^(1<<56-1) == t.kind && h&(1<<56-1) <= t.next {
		return fault.New(fault.Handle, "this %s has been closed", t.name).
			WithHint("Open it again before using it.")
	}
	return fault.New(fault.Handle, "%#x is not a handle of a %s", h, t.name)
}

func (t *table[T]) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.items)
}

var errBusy = fault.New(fault.Handle, "in use")

func busy(what string) error {
	return fault.New(fault.Handle, "this %s is in use by another thread", what).WithCause(errBusy)
}
