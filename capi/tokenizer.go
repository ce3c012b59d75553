package main

/*
#include "nng.h"
*/
import "C"

import (
	"encoding/json"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/token"
)

var tokenizers = newTable[*token.Tokenizer]("tokenizer")

// withTokenizer runs the body of an export, which fills out, with the tokenizer of a handle.
func withTokenizer(handle C.nng_tokenizer, out, err *C.nng_buf, body func(*token.Tokenizer) error) C.int {
	return guard(err, func() error {
		if out == nil {
			return missing("out")
		}
		t, e := tokenizers.get(uint64(handle))
		if e != nil {
			return e
		}
		return body(t)
	})
}

// textArgument copies a text of C's; it may hold NUL bytes.
func textArgument(text *C.char, size C.int64_t) (string, error) {
	if size < 0 || text == nil && size > 0 {
		return "", fault.New(fault.Input, "a text of %d bytes at %p is not a text", int64(size), unsafe.Pointer(text))
	}
	if size == 0 {
		return "", nil
	}
	return string(unsafe.Slice((*byte)(unsafe.Pointer(text)), int(size))), nil
}

// idsArgument gives the ids of C's, which are only borrowed for the call.
func idsArgument(ids *C.int64_t, n C.int64_t) ([]int64, error) {
	if n < 0 || ids == nil && n > 0 {
		return nil, fault.New(fault.Input, "%d ids at %p are no ids", int64(n), unsafe.Pointer(ids))
	}
	if n == 0 {
		return nil, nil
	}
	return unsafe.Slice((*int64)(unsafe.Pointer(ids)), int(n)), nil
}

//export nngo_tokenizer_open
func nngo_tokenizer_open(dir *C.char, out *C.nng_tokenizer, err *C.nng_buf) C.int {
	return guard(err, func() error {
		if dir == nil || out == nil {
			return missing("dir or out")
		}
		t, e := token.Open(C.GoString(dir))
		if e != nil {
			return e
		}
		*out = C.nng_tokenizer(tokenizers.add(t))
		return nil
	})
}

//export nngo_tokenizer_close
func nngo_tokenizer_close(handle C.nng_tokenizer, err *C.nng_buf) C.int {
	return guard(err, func() error {
		t, e := tokenizers.take(uint64(handle))
		if e != nil {
			return e
		}
		return t.Close()
	})
}

//export nngo_tokenizer_describe
func nngo_tokenizer_describe(handle C.nng_tokenizer, out, err *C.nng_buf) C.int {
	return withTokenizer(handle, out, err, func(t *token.Tokenizer) error { return setJSON(out, t) })
}

//export nngo_tokenizer_encode
func nngo_tokenizer_encode(handle C.nng_tokenizer, text *C.char, size C.int64_t, addSpecial C.int32_t, out, err *C.nng_buf) C.int {
	return withTokenizer(handle, out, err, func(t *token.Tokenizer) error {
		s, e := textArgument(text, size)
		if e != nil {
			return e
		}
		encoding, e := t.Encode(s, addSpecial != 0)
		if e != nil {
			return e
		}
		return setJSON(out, encoding)
	})
}

//export nngo_tokenizer_ids
func nngo_tokenizer_ids(handle C.nng_tokenizer, text *C.char, size C.int64_t, addSpecial C.int32_t, out, err *C.nng_buf) C.int {
	return withTokenizer(handle, out, err, func(t *token.Tokenizer) error {
		s, e := textArgument(text, size)
		if e != nil {
			return e
		}
		ids, e := t.EncodeIDs(s, addSpecial != 0)
		if e != nil {
			return e
		}
		setBuf(out, unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(ids))), 8*len(ids)))
		return nil
	})
}

//export nngo_tokenizer_decode
func nngo_tokenizer_decode(handle C.nng_tokenizer, ids *C.int64_t, n C.int64_t, skipSpecial C.int32_t, out, err *C.nng_buf) C.int {
	return withTokenizer(handle, out, err, func(t *token.Tokenizer) error {
		v, e := idsArgument(ids, n)
		if e != nil {
			return e
		}
		text, e := t.Decode(v, skipSpecial != 0)
		if e != nil {
			return e
		}
		setBuf(out, []byte(text))
		return nil
	})
}

//export nngo_tokenizer_tokens
func nngo_tokenizer_tokens(handle C.nng_tokenizer, ids *C.int64_t, n C.int64_t, out, err *C.nng_buf) C.int {
	return withTokenizer(handle, out, err, func(t *token.Tokenizer) error {
		v, e := idsArgument(ids, n)
		if e != nil {
			return e
		}
		tokens, e := t.Tokens(v)
		if e != nil {
			return e
		}
		return setJSON(out, tokens)
	})
}

//export nngo_tokenizer_lookup
func nngo_tokenizer_lookup(handle C.nng_tokenizer, tokens *C.char, out, err *C.nng_buf) C.int {
	return withTokenizer(handle, out, err, func(t *token.Tokenizer) error {
		if tokens == nil {
			return missing("tokens")
		}
		var names []string
		if e := json.Unmarshal([]byte(C.GoString(tokens)), &names); e != nil {
			return fault.New(fault.Input, "the tokens are not a JSON list of strings: %v", e)
		}
		ids := make([]*int64, len(names))
		for i, name := range names {
			id, ok, e := t.Lookup(name)
			if e != nil {
				return e
			}
			if ok {
				ids[i] = &id
			}
		}
		return setJSON(out, ids)
	})
}

//export nngo_tokenizer_vocab
func nngo_tokenizer_vocab(handle C.nng_tokenizer, out, err *C.nng_buf) C.int {
	return withTokenizer(handle, out, err, func(t *token.Tokenizer) error {
		vocab, e := t.Vocab()
		if e != nil {
			return e
		}
		return setJSON(out, vocab)
	})
}
