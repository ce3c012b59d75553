package token

// This file is the only one that speaks with Rust: each function wraps one of nngtok.h.

/*
#cgo LDFLAGS: -ltokenizers -ldl -lm
#include "nngtok.h"
*/
import "C"

import (
	"encoding/binary"
	"encoding/json"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// none stands in for the length of a token that is not there.
const none = ^uint32(0)

// bytesOf and u32Of give C a view of Go memory, for the time of a call.
func bytesOf(s string) (*C.uint8_t, C.size_t) {
	return (*C.uint8_t)(unsafe.Pointer(unsafe.StringData(s))), C.size_t(len(s))
}

func u32Of(v []uint32) (*C.uint32_t, C.size_t) {
	return (*C.uint32_t)(unsafe.Pointer(unsafe.SliceData(v))), C.size_t(len(v))
}

// call makes a call of Rust and takes over its bytes or its message.
func call(what string, f func(out, err *C.nngtok_bytes) C.int32_t) ([]byte, error) {
	var out, message C.nngtok_bytes
	failed := f(&out, &message) != 0
	bytes := takeBytes(&out)
	text := takeBytes(&message)
	if failed {
		return nil, fault.New(fault.Tokenizer, "%s failed: %s", what, text)
	}
	return bytes, nil
}

func takeBytes(b *C.nngtok_bytes) []byte {
	defer C.nngtok_free(b)
	return append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(b.ptr)), int(b.len))...)
}

// packed reads what Rust packed. Rust and Go are built from one tree, so lengths are trusted; a
// mistake is a panic with an index, not a read elsewhere.
type packed struct{ rest []byte }

func (p *packed) u32() uint32 {
	v := binary.NativeEndian.Uint32(p.rest)
	p.rest = p.rest[4:]
	return v
}

func (p *packed) strings(n int) []*string {
	lengths := make([]uint32, n)
	total := 0
	for i := range lengths {
		lengths[i] = p.u32()
		if lengths[i] != none {
			total += int(lengths[i])
		}
	}
	all := string(p.rest[:total]) // one allocation, of which the strings are parts
	p.rest = p.rest[total:]
	texts := make([]string, n)
	strings := make([]*string, n)
	for i, length := range lengths {
		if length == none {
			continue
		}
		texts[i], all = all[:length], all[length:]
		strings[i] = &texts[i]
	}
	return strings
}

func rustEncode(raw unsafe.Pointer, first, second string, pair, addSpecial bool) (Encoding, error) {
	a, na := bytesOf(first)
	b, nb := bytesOf(second)
	data, err := call("encoding", func(out, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_encode(raw, a, na, b, nb, C.bool(pair), C.bool(addSpecial), out, message)
	})
	if err != nil {
		return Encoding{}, err
	}
	p := packed{data}
	n := int(p.u32())
	e := Encoding{
		IDs: make([]int64, n), Tokens: make([]string, n), Offsets: make([][2]int, n),
		SpecialMask: make([]int, n), TypeIDs: make([]int, n),
	}
	for i := range e.IDs {
		e.IDs[i] = int64(p.u32())
	}
	for i := range e.TypeIDs {
		e.TypeIDs[i] = int(p.u32())
	}
	for i := range e.SpecialMask {
		e.SpecialMask[i] = int(p.u32())
	}
	for i := range e.Offsets {
		e.Offsets[i] = [2]int{int(p.u32()), int(p.u32())}
	}
	for i, s := range p.strings(n) {
		e.Tokens[i] = *s
	}
	return e, nil
}

func rustIDs(raw unsafe.Pointer, text string, addSpecial bool) ([]int64, error) {
	s, n := bytesOf(text)
	data, err := call("encoding", func(out, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_ids(raw, s, n, C.bool(addSpecial), out, message)
	})
	if err != nil {
		return nil, err
	}
	ids := make([]int64, len(data)/8)
	for i := range ids {
		ids[i] = int64(binary.NativeEndian.Uint64(data[8*i:]))
	}
	return ids, nil
}

func rustDecode(raw unsafe.Pointer, ids []uint32, skipSpecial bool) (string, error) {
	v, n := u32Of(ids)
	data, err := call("decoding", func(out, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_decode(raw, v, n, C.bool(skipSpecial), out, message)
	})
	return string(data), err
}

func rustTokens(raw unsafe.Pointer, ids []uint32) ([]*string, error) {
	v, n := u32Of(ids)
	data, err := call("looking up ids", func(out, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_tokens(raw, v, n, out, message)
	})
	if err != nil {
		return nil, err
	}
	p := packed{data}
	return p.strings(len(ids)), nil
}

func rustLookup(raw unsafe.Pointer, token string) (int64, error) {
	s, n := bytesOf(token)
	id := C.int64_t(-1)
	_, err := call("looking up a token", func(_, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_lookup(raw, s, n, &id, message)
	})
	return int64(id), err
}

func rustVocab(raw unsafe.Pointer) (map[string]int64, error) {
	data, err := call("listing the vocabulary", func(out, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_vocab(raw, out, message)
	})
	if err != nil {
		return nil, err
	}
	p := packed{data}
	ids := make([]uint32, p.u32())
	for i := range ids {
		ids[i] = p.u32()
	}
	vocab := make(map[string]int64, len(ids))
	for i, s := range p.strings(len(ids)) {
		vocab[*s] = int64(ids[i])
	}
	return vocab, nil
}

func rustDescribe(raw unsafe.Pointer) (d described, err error) {
	data, err := call("describing the tokenizer", func(out, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_describe(raw, out, message)
	})
	if err == nil {
		err = json.Unmarshal(data, &d)
	}
	return d, err
}

func rustAddTokens(raw unsafe.Pointer, tokens []AddedToken) error {
	text, err := json.Marshal(tokens)
	if err != nil {
		return err
	}
	s, n := bytesOf(string(text))
	_, err = call("adding tokens", func(_, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_add_tokens(raw, s, n, message)
	})
	return err
}

func rustPostProcessor(raw unsafe.Pointer, processor any) error {
	text, err := json.Marshal(processor)
	if err != nil {
		return err
	}
	s, n := bytesOf(string(text))
	_, err = call("setting the post-processor", func(_, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_post_processor(raw, s, n, message)
	})
	return err
}

// rustPanic makes Rust panic, for tests.
func rustPanic() error {
	_, err := call("panicking", func(_, message *C.nngtok_bytes) C.int32_t {
		return C.nngtok_test_panic(message)
	})
	return err
}
