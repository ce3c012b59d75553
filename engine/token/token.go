// Package token turns text into token ids and back, as the Python tokenizers library does.
//
// It stands on github.com/daulet/tokenizers, whose Rust library is built by tokenizers-rs/build.sh
// together with functions of ours (nngtok.h) for what daulet's lack: texts with NUL bytes, errors
// instead of empty results, offsets in characters, tokens and ids both ways.
//
// A Tokenizer is opened from a model directory and closed by hand; nothing is finalized. Any number
// of goroutines may use one at the same time, also while another closes it: they then get an error.
// Errors are *fault.Error with code Tokenizer.
package token

import (
	"encoding/json"
	"reflect"
	"sync"
	"unsafe"

	daulet "github.com/daulet/tokenizers"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Tokenizer is an open tokenizer. Its zero value is a closed one.
type Tokenizer struct {
	mu    sync.RWMutex // held for reading while Rust works, for writing by Close
	inner *daulet.Tokenizer
	raw   unsafe.Pointer // inner's Rust object, for the functions of nngtok.h
	dir   string
	info  described
	conf  config
	spec  Special
	// addBOS and addEOS say what Encode puts around a text.
	addBOS, addEOS bool
}

// Encoding is an encoded text. All slices have one entry a token.
type Encoding struct {
	IDs     []int64  `json:"ids"`
	Tokens  []string `json:"tokens"`
	Offsets [][2]int `json:"offsets"` // [start, end) of the token in the text, in characters (Unicode code points)
	// SpecialMask is 1 where the token was put there by the post-processor (a leading <s>, say).
	SpecialMask []int `json:"special_tokens_mask"`
	TypeIDs     []int `json:"type_ids"` // 0 for the first text of a pair, 1 for the second
}

// AddedToken is an entry of the vocabulary that is matched in the text before the model runs.
type AddedToken struct {
	ID         int64  `json:"id"`
	Content    string `json:"content"`
	SingleWord bool   `json:"single_word"` // matches whole words only
	LStrip     bool   `json:"lstrip"`      // takes the whitespace before it
	RStrip     bool   `json:"rstrip"`      // takes the whitespace after it
	Normalized bool   `json:"normalized"`  // matched in normalized text
	Special    bool   `json:"special"`     // left out by Decode when special tokens are skipped
}

// described is what nngtok_describe says.
type described struct {
	Model         string       `json:"model"`
	VocabSize     int          `json:"vocab_size"`
	Len           int          `json:"len"`
	PostProcessor bool         `json:"post_processor"`
	Adds          int          `json:"adds"`
	Added         []AddedToken `json:"added"`
}

// handle gives the Rust object of a tokenizer of daulet's, which keeps it in its only field. reflect
// may read an unexported pointer; it panics, rather than reads elsewhere, should the field be gone.
func handle(t *daulet.Tokenizer) unsafe.Pointer {
	return reflect.ValueOf(t).Elem().FieldByName("tokenizer").UnsafePointer()
}

// Close frees the tokenizer. Calls that are running end first; later ones fail. Closing twice is fine.
func (t *Tokenizer) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.inner == nil {
		return nil
	}
	err := t.inner.Close()
	t.inner, t.raw = nil, nil
	return err
}

// use runs f with the Rust object, which lives until f returns.
func (t *Tokenizer) use(f func(raw unsafe.Pointer) error) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.raw == nil {
		return fault.New(fault.Tokenizer, "the tokenizer is closed").
			WithHint("Open it again with token.Open.")
	}
	return f(t.raw)
}

// Encode gives the tokens of a text. addSpecial adds what the post-processor adds (a leading <s>,
// say). Special tokens written in the text are recognised either way. The text must be UTF-8; NUL
// bytes are fine.
func (t *Tokenizer) Encode(text string, addSpecial bool) (Encoding, error) {
	return t.encode(text, "", false, addSpecial)
}

// EncodePair gives the tokens of two texts in one sequence. Offsets of each count from its own start.
func (t *Tokenizer) EncodePair(first, second string, addSpecial bool) (Encoding, error) {
	return t.encode(first, second, true, addSpecial)
}

func (t *Tokenizer) encode(first, second string, pair, addSpecial bool) (e Encoding, err error) {
	err = t.use(func(raw unsafe.Pointer) error {
		e, err = rustEncode(raw, first, second, pair, addSpecial)
		return err
	})
	return e, err
}

// IDs gives the ids of a text with the special tokens the post-processor adds: what a model takes.
func (t *Tokenizer) IDs(text string) ([]int64, error) { return t.EncodeIDs(text, true) }

// EncodeIDs is Encode for callers that need no more than the ids; it is faster.
func (t *Tokenizer) EncodeIDs(text string, addSpecial bool) (ids []int64, err error) {
	err = t.use(func(raw unsafe.Pointer) error {
		ids, err = rustIDs(raw, text, addSpecial)
		return err
	})
	return ids, err
}

// Decode gives the text of ids; skipSpecial leaves special tokens out. Bytes that are not UTF-8
// become U+FFFD. An id outside the vocabulary is an error that names it.
func (t *Tokenizer) Decode(ids []int64, skipSpecial bool) (text string, err error) {
	narrow, err := t.narrow(ids)
	if err != nil {
		return "", err
	}
	err = t.use(func(raw unsafe.Pointer) error {
		text, err = rustDecode(raw, narrow, skipSpecial)
		return err
	})
	return text, err
}

// narrow checks that every id has a token and gives the ids as Rust wants them.
func (t *Tokenizer) narrow(ids []int64) ([]uint32, error) {
	tokens, err := t.Tokens(ids)
	if err != nil {
		return nil, err
	}
	narrow := make([]uint32, len(ids))
	for i, id := range ids {
		if tokens[i] == nil {
			return nil, fault.New(fault.Tokenizer, "id %d (at index %d of %d) is not in the vocabulary of %d tokens",
				id, i, len(ids), t.info.Len).
				WithHint("Ids run from 0 to %d; were they made by this model's tokenizer?", t.info.Len-1)
		}
		narrow[i] = uint32(id)
	}
	return narrow, nil
}

// Tokens gives the token of each id as it stands in the vocabulary, nil where there is none.
func (t *Tokenizer) Tokens(ids []int64) (tokens []*string, err error) {
	// An id that is not a uint32 has no token either; UINT32_MAX stands in for it, and its place is
	// cleared below.
	narrow := make([]uint32, len(ids))
	for i, id := range ids {
		narrow[i] = uint32(id)
		if id < 0 || id > int64(^uint32(0)) {
			narrow[i] = ^uint32(0)
		}
	}
	err = t.use(func(raw unsafe.Pointer) error {
		tokens, err = rustTokens(raw, narrow)
		return err
	})
	for i := range tokens {
		if int64(narrow[i]) != ids[i] {
			tokens[i] = nil
		}
	}
	return tokens, err
}

// IDToToken gives the token of an id as it stands in the vocabulary, and whether there is one.
func (t *Tokenizer) IDToToken(id int64) (string, bool) {
	tokens, err := t.Tokens([]int64{id})
	if err != nil || tokens[0] == nil {
		return "", false
	}
	return *tokens[0], true
}

// TokenToID gives the id of a token, and whether the vocabulary has it.
func (t *Tokenizer) TokenToID(token string) (int64, bool) {
	id, ok, _ := t.Lookup(token)
	return id, ok
}

// Lookup is TokenToID with the reason why it could not look (the tokenizer is closed, say).
func (t *Tokenizer) Lookup(token string) (id int64, ok bool, err error) {
	err = t.use(func(raw unsafe.Pointer) error {
		id, err = rustLookup(raw, token)
		return err
	})
	return id, err == nil && id >= 0, err
}

// Vocab gives the whole vocabulary, added tokens included.
func (t *Tokenizer) Vocab() (vocab map[string]int64, err error) {
	err = t.use(func(raw unsafe.Pointer) error {
		vocab, err = rustVocab(raw)
		return err
	})
	return vocab, err
}

// VocabSize is the size of the vocabulary without added tokens.
func (t *Tokenizer) VocabSize() int { return t.info.VocabSize }

// Len is the size of the vocabulary with added tokens.
func (t *Tokenizer) Len() int { return t.info.Len }

// Model names the algorithm: "BPE", "WordPiece", "WordLevel" or "Unigram".
func (t *Tokenizer) Model() string { return t.info.Model }

// Added gives the added tokens by rising id.
func (t *Tokenizer) Added() []AddedToken { return append([]AddedToken(nil), t.info.Added...) }

// Special gives the special tokens the configuration names.
func (t *Tokenizer) Special() Special {
	s := t.spec
	s.Additional = append([]SpecialToken(nil), s.Additional...)
	return s
}

// AddsBOS reports whether the post-processor puts a bos token before a text.
func (t *Tokenizer) AddsBOS() bool { return t.addBOS }

// AddsEOS reports whether the post-processor puts an eos token after a text.
func (t *Tokenizer) AddsEOS() bool { return t.addEOS }

// Dir is the directory the tokenizer was opened from.
func (t *Tokenizer) Dir() string { return t.dir }

// PaddingSide is "left" or "right", as the configuration says; "right" where it says nothing.
func (t *Tokenizer) PaddingSide() string { return t.conf.PaddingSide }

// TruncationSide is "left" or "right", as the configuration says; "right" where it says nothing.
func (t *Tokenizer) TruncationSide() string { return t.conf.TruncationSide }

// ModelMaxLength is the longest sequence the model takes, in tokens; 0 where nothing is said.
func (t *Tokenizer) ModelMaxLength() int { return t.conf.ModelMaxLength }

// ChatTemplate is the default Jinja template of chats, or "".
func (t *Tokenizer) ChatTemplate() string { return t.conf.Templates["default"] }

// ChatTemplates gives every chat template by name; the default one is "default".
func (t *Tokenizer) ChatTemplates() map[string]string {
	templates := make(map[string]string, len(t.conf.Templates))
	for name, text := range t.conf.Templates {
		templates[name] = text
	}
	return templates
}

// MarshalJSON describes the tokenizer to other languages: sizes, special tokens with their ids, and
// what the configuration says. It works on a closed tokenizer too.
func (t *Tokenizer) MarshalJSON() ([]byte, error) {
	var limit *int
	if t.conf.ModelMaxLength > 0 {
		limit = &t.conf.ModelMaxLength
	}
	var template *string
	if text, ok := t.conf.Templates["default"]; ok {
		template = &text
	}
	return json.Marshal(map[string]any{
		"directory": t.dir, "model": t.info.Model, "vocab_size": t.info.VocabSize, "len": t.info.Len,
		"special_tokens": t.spec, "added_tokens": t.info.Added, "adds": t.info.Adds,
		"padding_side": t.conf.PaddingSide, "truncation_side": t.conf.TruncationSide, "model_max_length": limit,
		"chat_template": template, "chat_templates": t.conf.Templates,
		"add_bos_token": t.addBOS, "add_eos_token": t.addEOS,
		"clean_up_tokenization_spaces": t.conf.CleanUp, "model_input_names": t.conf.InputNames,
	})
}
