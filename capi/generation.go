package main

/*
#include "nng.h"
*/
import "C"

import (
	"encoding/json"
	"sync"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/remote"
)

// generation is a gen.Generation that one thread at a time may work on.
type generation struct {
	mu  sync.Mutex
	gen *gen.Generation
}

var generations = newTable[*generation]("generation")

//export nngo_generation_new
func nngo_generation_new(model C.nng_model, prompt, settings *C.char, out *C.nng_generation, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if prompt == nil || settings == nil || out == nil {
			return missing("prompt, settings or out")
		}
		m, e := models.get(uint64(model))
		if e != nil {
			return e
		}
		var p struct {
			Rows  [][]int64 `json:"rows"`
			Masks [][]int64 `json:"masks"`
		}
		var s gen.Settings
		if e := json.Unmarshal([]byte(C.GoString(prompt)), &p); e != nil {
			return fault.New(fault.Input, "the prompt is not what it should be: %v", e)
		}
		if e := json.Unmarshal([]byte(C.GoString(settings)), &s); e != nil {
			return fault.New(fault.Input, "the settings are not what they should be: %v", e)
		}
		g, e := gen.New(m.Native, p.Rows, p.Masks, s)
		if e != nil {
			return e
		}
		*out = C.nng_generation(generations.add(&generation{gen: g}))
		return nil
	})
}

// withGeneration lends a generation to one thread.
func withGeneration(handle C.nng_generation, f func(*gen.Generation) error) error {
	g, err := generations.get(uint64(handle))
	if err != nil {
		return err
	}
	if !g.mu.TryLock() {
		return busy("generation")
	}
	defer g.mu.Unlock()
	return f(g.gen)
}

//export nngo_generation_step
func nngo_generation_step(handle C.nng_generation, wire *C.uint8_t, size C.int64_t, consts *unsafe.Pointer, nconsts C.int64_t,
	end C.int32_t, out *C.nng_run, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil || size < 0 || wire == nil && size > 0 || nconsts < 0 || consts == nil && nconsts > 0 {
			return missing("graph, consts or out")
		}
		return withGeneration(handle, func(g *gen.Generation) error {
			program, e := graph.Decode(unsafe.Slice((*byte)(wire), int(size)))
			if e != nil {
				return e
			}
			given, e := borrow(consts, nconsts)
			if e != nil {
				return e
			}
			r, e := g.Begin(program, given, end != 0)
			if e != nil {
				return e
			}
			*out = C.nng_run(runs.add(&run{host: r}))
			return nil
		})
	})
}

//export nngo_generation_next
func nngo_generation_next(handle C.nng_generation, out, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil {
			return missing("out")
		}
		return withGeneration(handle, func(g *gen.Generation) error {
			tokens, e := g.Next()
			if e != nil {
				return e
			}
			return setJSON(out, remote.DrawnOf(g, tokens))
		})
	})
}

//export nngo_generation_scores
func nngo_generation_scores(handle C.nng_generation, tensor *unsafe.Pointer, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if tensor == nil {
			return missing("tensor")
		}
		return withGeneration(handle, func(g *gen.Generation) error {
			t, e := g.Scores()
			if e != nil {
				return e
			}
			*tensor = t.Release()
			return nil
		})
	})
}

//export nngo_generation_choose
func nngo_generation_choose(handle C.nng_generation, scores unsafe.Pointer, filtered *unsafe.Pointer, out, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if scores == nil || out == nil {
			return missing("scores or out")
		}
		return withGeneration(handle, func(g *gen.Generation) error {
			given, e := aten.Borrow(scores)
			if e != nil {
				return fault.New(fault.Input, "the scores are no tensor").WithCause(e)
			}
			defer given.Free()
			tokens, left, e := g.Choose(given)
			if e != nil {
				return e
			}
			if filtered != nil {
				*filtered = left.Release()
			} else {
				left.Free()
			}
			return setJSON(out, remote.DrawnOf(g, tokens))
		})
	})
}

//export nngo_generation_end
func nngo_generation_end(handle C.nng_generation, rows *C.int32_t, n C.int64_t, done *C.int32_t, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if rows == nil || n < 0 || done == nil {
			return missing("rows or done")
		}
		return withGeneration(handle, func(g *gen.Generation) error {
			ends := make([]bool, int(n))
			for i, bit := range unsafe.Slice(rows, int(n)) {
				ends[i] = bit != 0
			}
			if e := g.End(ends); e != nil {
				return e
			}
			*done = 0
			if g.Done() {
				*done = 1
			}
			return nil
		})
	})
}

//export nngo_generation_free
func nngo_generation_free(handle C.nng_generation, err *C.nng_buf) C.int {
	return guard(err, func() error {
		g, e := generations.take(uint64(handle))
		if e != nil {
			return e
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		g.gen.Free()
		return nil
	})
}
