// Package engine opens language models and runs traces of them: what a Go program, the C library
// and the server see.
//
// Phases: [Open] a model by name or directory, record a trace (package proxy), run it
// ([Model.Start]). Errors are *fault.Error. A [Model] is safe for concurrent use; each run belongs
// to one goroutine at a time.
package engine

import (
	"errors"
	"path/filepath"
	"sync"

	"github.com/nnsight-go/nnsight-go/engine/arch"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/host"
	"github.com/nnsight-go/nnsight-go/engine/token"
)

// Version is the version of the library.
const Version = "0.1.0"

// Options say how a model is opened.
type Options = host.Options

// Model is an opened model with its tokenizer.
type Model struct {
	*host.Native
	mu        sync.Mutex
	tokenizer *token.Tokenizer
	closed    bool
}

// Open opens a model: a directory, the name of the built-in model, or a repository id that is in
// the local Hugging Face cache. The weights are mapped at the first run, or at once with
// Options.Load.
func Open(name string, o Options) (*Model, error) {
	dir, err := resolve(name)
	if err != nil {
		return nil, err
	}
	m, err := host.Open(dir, o)
	if err != nil {
		return nil, err
	}
	return &Model{Native: m}, nil
}

// Architectures lists the architectures that run natively.
func Architectures() []string { return arch.Names() }

// Tokenizer is the model's own tokenizer, opened when it is first asked for.
func (m *Model) Tokenizer() (*token.Tokenizer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, fault.New(fault.Handle, "this model has been closed").WithHint("Open it again.")
	}
	if m.tokenizer == nil {
		t, err := token.Open(filepath.Clean(m.Directory()))
		if err != nil {
			return nil, err
		}
		m.tokenizer = t
	}
	return m.tokenizer, nil
}

// Encode turns text into token ids, with the special tokens the tokenizer adds.
func (m *Model) Encode(text string) ([]int64, error) {
	t, err := m.Tokenizer()
	if err != nil {
		return nil, err
	}
	return t.IDs(text)
}

// Decode turns token ids into text.
func (m *Model) Decode(ids []int64) (string, error) {
	t, err := m.Tokenizer()
	if err != nil {
		return "", err
	}
	return t.Decode(ids, false)
}

// GenerationSettings are the settings that the model's files ask for, over transformers' defaults, to be
// changed where something else is wanted: 20 new tokens, the likeliest each time.
func (m *Model) GenerationSettings() (gen.Settings, error) { return gen.Defaults(m.Directory()) }

// Close frees the model and its tokenizer. Runs under way go on, and the last of them gives the
// weights back; nothing else can be done with a closed model.
func (m *Model) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	var failed error
	if m.tokenizer != nil {
		failed = m.tokenizer.Close()
		m.tokenizer = nil
	}
	return errors.Join(failed, m.Native.Close())
}
