// Package main is the C library libnnsight_go: nng.h, the manual, says what each function does and
// who owns what. shim.c holds the exported names; this file and its neighbours do the work.
package main

/*
#cgo LDFLAGS: -lpthread
#include <stdlib.h>
#include "nng.h"
*/
import "C"

import (
	"context"
	"encoding/json"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
	"github.com/nnsight-go/nnsight-go/engine/remote"
)

// abi numbers the functions of nng.h and the wire form together.
const abi = 2

func main() {}

// run is a host.Run that one thread at a time may work on.
type run struct {
	mu   sync.Mutex
	host *host.Run
}

var (
	models = newTable[*engine.Model]("model")
	runs   = newTable[*run]("run")
)

//export nngo_version
func nngo_version(out, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil {
			return missing("out")
		}
		return setJSON(out, map[string]any{
			"abi": abi, "version": engine.Version, "torch": aten.TorchVersion(), "go": runtime.Version(),
			"architectures": engine.Architectures(), "cuda": aten.CUDAAvailable(),
		})
	})
}

//export nngo_counters
func nngo_counters(out, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil {
			return missing("out")
		}
		handles := 0
		for _, t := range tables {
			handles += t.count()
		}
		return setJSON(out, map[string]any{"tensors": aten.Live(), "handles": handles, "captures": aten.Captures()})
	})
}

//export nngo_model_open
func nngo_model_open(dir, options *C.char, out *C.nng_model, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if dir == nil || out == nil {
			return missing("dir or out")
		}
		var o struct {
			DType  string `json:"dtype"`
			Device string `json:"device"`
			Load   bool   `json:"load"`
			Bare   bool   `json:"bare"`

			Prepack  int64 `json:"prepack"`
			Captures int   `json:"captures"`
		}
		if options != nil {
			if e := json.Unmarshal([]byte(C.GoString(options)), &o); e != nil {
				return fault.New(fault.Input, "the options are not JSON: %v", e)
			}
		}
		m, e := engine.Open(C.GoString(dir), engine.Options{
			DType: o.DType, Device: o.Device, Load: o.Load, Bare: o.Bare, Prepack: o.Prepack, Captures: o.Captures})
		if e != nil {
			return e
		}
		*out = C.nng_model(models.add(m))
		return nil
	})
}

//export nngo_model_load
func nngo_model_load(model C.nng_model, err *C.nng_buf) C.int {
	return guard(err, func() error {
		m, e := models.get(uint64(model))
		if e != nil {
			return e
		}
		return m.Load()
	})
}

//export nngo_model_train
func nngo_model_train(model C.nng_model, on C.int32_t, err *C.nng_buf) C.int {
	return guard(err, func() error {
		m, e := models.get(uint64(model))
		if e != nil {
			return e
		}
		m.Train(on != 0)
		return nil
	})
}

//export nngo_model_apart
func nngo_model_apart(model C.nng_model, on C.int32_t, err *C.nng_buf) C.int {
	return guard(err, func() error {
		m, e := models.get(uint64(model))
		if e != nil {
			return e
		}
		m.Apart(on != 0)
		return nil
	})
}

//export nngo_model_explain
func nngo_model_explain(model C.nng_model, wire *C.uint8_t, size, nconsts C.int64_t, out, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil || size < 0 || wire == nil && size > 0 || nconsts < 0 {
			return missing("graph or out")
		}
		m, e := models.get(uint64(model))
		if e != nil {
			return e
		}
		g, e := graph.Decode(unsafe.Slice((*byte)(wire), int(size)))
		if e != nil {
			return e
		}
		text, e := m.Explain(g, int(nconsts))
		if e != nil {
			return e
		}
		setBuf(out, []byte(text))
		return nil
	})
}

//export nngo_model_perform
func nngo_model_perform(model C.nng_model, request *C.uint8_t, size C.int64_t, out, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil || size < 0 || request == nil && size > 0 {
			return missing("request or out")
		}
		m, e := models.get(uint64(model))
		if e != nil {
			return e
		}
		r, e := remote.Parse(unsafe.Slice((*byte)(request), int(size)), remote.Limits{})
		if e != nil {
			return e
		}
		response, e := (&remote.Performer{Model: m.Native}).Perform(context.Background(), "", r)
		if e != nil {
			return e
		}
		setBuf(out, response)
		return nil
	})
}

//export nngo_model_close
func nngo_model_close(model C.nng_model, err *C.nng_buf) C.int {
	return guard(err, func() error {
		m, e := models.take(uint64(model))
		if e != nil {
			return e
		}
		return m.Close()
	})
}

//export nngo_model_describe
func nngo_model_describe(model C.nng_model, out, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil {
			return missing("out")
		}
		m, e := models.get(uint64(model))
		if e != nil {
			return e
		}
		return setJSON(out, m.Describe())
	})
}

//export nngo_model_param
func nngo_model_param(model C.nng_model, name *C.char, tensor *unsafe.Pointer, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if name == nil || tensor == nil {
			return missing("name or tensor")
		}
		m, e := models.get(uint64(model))
		if e != nil {
			return e
		}
		t, e := m.Parameter(C.GoString(name))
		if e != nil {
			return e
		}
		*tensor = t.Release()
		return nil
	})
}

//export nngo_run_new
func nngo_run_new(model C.nng_model, wire *C.uint8_t, size C.int64_t, consts *unsafe.Pointer, nconsts C.int64_t,
	end C.int32_t, out *C.nng_run, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil || size < 0 || wire == nil && size > 0 || nconsts < 0 || consts == nil && nconsts > 0 {
			return missing("graph, consts or out")
		}
		m, e := models.get(uint64(model))
		if e != nil {
			return e
		}
		given, e := borrow(consts, nconsts)
		if e != nil {
			return e
		}
		r, e := m.BeginBytes(unsafe.Slice((*byte)(wire), int(size)), given, end != 0)
		if e != nil {
			return e
		}
		*out = C.nng_run(runs.add(&run{host: r}))
		return nil
	})
}

//export nngo_run_more
func nngo_run_more(handle C.nng_run, wire *C.uint8_t, size C.int64_t, consts *unsafe.Pointer, nconsts C.int64_t,
	end C.int32_t, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if size < 0 || wire == nil && size > 0 || nconsts < 0 || consts == nil && nconsts > 0 {
			return missing("graph or consts")
		}
		return withRun(handle, func(r *host.Run) error {
			given, e := borrow(consts, nconsts)
			if e != nil {
				return e
			}
			return r.Extend(func(g *graph.Graph) error {
				return graph.DecodeMore(g, unsafe.Slice((*byte)(wire), int(size)))
			}, given, end != 0)
		})
	})
}

// borrow takes references of its own on the caller's tensors.
func borrow(consts *unsafe.Pointer, nconsts C.int64_t) ([]aten.Tensor, error) {
	given := make([]aten.Tensor, 0, int(nconsts))
	for i, p := range unsafe.Slice(consts, int(nconsts)) {
		t, e := aten.Borrow(p)
		if e != nil {
			aten.FreeAll(given)
			return nil, fault.New(fault.Input, "constant %d is no tensor", i).WithCause(e)
		}
		given = append(given, t)
	}
	return given, nil
}

//export nngo_run_step
func nngo_run_step(handle C.nng_run, budget C.int64_t, done *C.int32_t, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if done == nil {
			return missing("done")
		}
		return withRun(handle, func(r *host.Run) error {
			const most = 1 << 40 // milliseconds, so that nanoseconds fit too
			ended, e := r.Step(time.Duration(min(budget, most)) * time.Millisecond)
			if e != nil {
				return e
			}
			*done = 0
			if ended {
				*done = 1
			} else if _, ok := r.Wanted(); ok {
				*done = 2
			}
			return nil
		})
	})
}

// withRun lends a run to one thread.
func withRun(handle C.nng_run, f func(*host.Run) error) error {
	r, err := runs.get(uint64(handle))
	if err != nil {
		return err
	}
	if !r.mu.TryLock() {
		return busy("run")
	}
	defer r.mu.Unlock()
	return f(r.host)
}

//export nngo_run_results
func nngo_run_results(handle C.nng_run, out *C.nng_buf, tensors **unsafe.Pointer, ntensors *C.int64_t, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil || tensors == nil || ntensors == nil {
			return missing("out, tensors or ntensors")
		}
		return withRun(handle, func(r *host.Run) error {
			results, given, e := r.Results()
			if e != nil {
				return e
			}
			array := (*unsafe.Pointer)(C.malloc(C.size_t(len(given)+1) * C.size_t(unsafe.Sizeof(uintptr(0)))))
			for i, t := range given {
				unsafe.Slice(array, len(given))[i] = t.Release()
			}
			*tensors, *ntensors = array, C.int64_t(len(given))
			setBuf(out, graph.EncodeResults(results))
			return nil
		})
	})
}

//export nngo_run_free
func nngo_run_free(handle C.nng_run, err *C.nng_buf) C.int {
	return guard(err, func() error {
		r, e := runs.take(uint64(handle))
		if e != nil {
			return e
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.host.Free()
		return nil
	})
}

//export nngo_graph_text
func nngo_graph_text(wire *C.uint8_t, size C.int64_t, mermaid C.int32_t, out, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil || size < 0 || wire == nil && size > 0 {
			return missing("graph or out")
		}
		g, e := graph.Decode(unsafe.Slice((*byte)(wire), int(size)))
		if e != nil {
			return e
		}
		text := g.String
		if mermaid != 0 {
			text = g.Mermaid
		}
		setBuf(out, []byte(text()))
		return nil
	})
}

//export nngo_tensors_free
func nngo_tensors_free(tensors *unsafe.Pointer, ntensors C.int64_t) {
	guard(nil, func() error {
		if tensors == nil {
			return nil
		}
		for _, p := range unsafe.Slice(tensors, int(max(ntensors, 0))) {
			aten.Adopt(p).Free()
		}
		C.free(unsafe.Pointer(tensors))
		return nil
	})
}

//export nngo_tensor_free
func nngo_tensor_free(tensor unsafe.Pointer) {
	guard(nil, func() error {
		aten.Adopt(tensor).Free()
		return nil
	})
}
