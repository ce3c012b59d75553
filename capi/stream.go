package main

/*
#include "nng.h"
*/
import "C"

import (
	"sync"

	"github.com/nnsight-go/nnsight-go/engine/token"
)

// stream is a token.DecodeStream that one thread at a time may work on.
type stream struct {
	mu     sync.Mutex
	decode *token.DecodeStream
}

var streams = newTable[*stream]("stream")

//export nngo_stream_new
func nngo_stream_new(handle C.nng_tokenizer, skip C.int32_t, out *C.nng_stream, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil {
			return missing("out")
		}
		t, e := tokenizers.get(uint64(handle))
		if e != nil {
			return e
		}
		*out = C.nng_stream(streams.add(&stream{decode: t.DecodeStream(skip != 0)}))
		return nil
	})
}

//export nngo_stream_step
func nngo_stream_step(handle C.nng_stream, ids *C.int64_t, n C.int64_t, end C.int32_t, out, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if out == nil {
			return missing("out")
		}
		given, e := idsArgument(ids, n)
		if e != nil {
			return e
		}
		s, e := streams.get(uint64(handle))
		if e != nil {
			return e
		}
		if !s.mu.TryLock() {
			return busy("stream")
		}
		defer s.mu.Unlock()
		text := ""
		for _, id := range given {
			piece, e := s.decode.Step(id)
			if e != nil {
				return e
			}
			text += piece
		}
		if end != 0 {
			rest, e := s.decode.Flush()
			if e != nil {
				return e
			}
			text += rest
		}
		setBuf(out, []byte(text))
		return nil
	})
}

//export nngo_stream_free
func nngo_stream_free(handle C.nng_stream, err *C.nng_buf) C.int {
	return guard(err, func() error {
		_, e := streams.take(uint64(handle))
		return e
	})
}
