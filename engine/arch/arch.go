// Package arch is the registry of the model architectures that run natively, and what they have in
// common. Each architecture is one file of its own package, which registers itself under the name
// that Hugging Face's config.json gives in "architectures"; import package all for all of them.
package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/nn"
)

// Architecture is a model whose config has been read and found good.
type Architecture interface {
	// Build registers the modules and runs the forward pass once. The parameters it names are those
	// the checkpoint must hold.
	Build(b *nn.Builder)
	// Context is the largest number of tokens of a row.
	Context() int
	// Vocab is the number of token ids: ids are below it.
	Vocab() int
}

// Checkpoint is what an architecture knows about checkpoints beside its parameters' names. It is
// optional.
type Checkpoint interface {
	// BasePrefix is the module that checkpoints of the model without its head leave out of names:
	// "transformer" where "wte.weight" stands for "transformer.wte.weight".
	BasePrefix() string
	// IgnoreSurplus lists patterns of tensors that old checkpoints hold and nobody needs. A *
	// stands for any characters.
	IgnoreSurplus() []string
}

// Opener reads an architecture's config.json.
type Opener func(config []byte) (Architecture, error)

var openers = map[string]Opener{}

// Register adds an architecture by the name it has in config.json. A second one of the same name is
// a programming error and panics.
func Register(name string, open Opener) {
	if _, ok := openers[name]; ok {
		panic("arch: " + name + " is registered twice")
	}
	openers[name] = open
}

// Names lists the registered architectures, sorted.
func Names() []string { return slices.Sorted(maps.Keys(openers)) }

// Open reads a config.json and gives the architecture it names. Errors have code ModelLoad.
func Open(config []byte) (Architecture, error) {
	var head struct {
		Architectures []string        `json:"architectures"`
		Quantization  json.RawMessage `json:"quantization_config"`
	}
	if err := Decode(config, &head); err != nil {
		return nil, err
	}
	if len(head.Architectures) == 0 {
		return nil, fault.New(fault.ModelLoad, "config.json does not name an architecture").
			WithHint(`It needs a line such as "architectures": [%q].`, "GPT2LMHeadModel")
	}
	name := head.Architectures[0]
	open, ok := openers[name]
	if !ok {
		return nil, fault.New(fault.ModelLoad, "architecture %s is not supported", name).
			WithHint("Supported are %s.", strings.Join(Names(), ", "))
	}
	if len(head.Quantization) > 0 && string(head.Quantization) != "null" {
		return nil, fault.New(fault.ModelLoad, "the checkpoint is quantized, which is not supported").
			WithHint("Use the model in float32, float16 or bfloat16.")
	}
	return open(config)
}

// Graphs is a model laid down in both variants, with the tensors it needs in registration order.
type Graphs struct {
	Causal, Masked *graph.Model
	Params         []nn.ParamSpec
	// Of lays another variant down, when it is first asked for.
	Of func(v nn.Variant) (*graph.Model, error)
}

// Build lays an architecture down.
func Build(a Architecture) (*Graphs, error) {
	causal, params, err := nn.Build(nn.Variant{}, a.Build)
	if err != nil {
		return nil, err
	}
	masked, _, err := nn.Build(nn.Variant{Masked: true}, a.Build)
	if err != nil {
		return nil, err
	}
	made := map[nn.Variant]*graph.Model{{}: causal, {Masked: true}: masked}
	return &Graphs{Causal: causal, Masked: masked, Params: params, Of: variants(a, made)}, nil
}

func variants(a Architecture, made map[nn.Variant]*graph.Model) func(v nn.Variant) (*graph.Model, error) {
	var mu sync.Mutex
	return func(v nn.Variant) (*graph.Model, error) {
		mu.Lock()
		defer mu.Unlock()
		if m := made[v]; m != nil {
			return m, nil
		}
		m, _, err := nn.Build(v, a.Build)
		if err == nil {
			made[v] = m
		}
		return m, err
	}
}

// Decode reads a config.json into a struct that already holds the defaults: fields that are absent
// or null keep them. Unknown fields are ignored, as configs carry settings for training and
// generation. Errors name the field or the place.
func Decode(config []byte, into any) error {
	err := json.Unmarshal(config, into)
	if err == nil {
		return nil
	}
	e := fault.New(fault.ModelLoad, "config.json cannot be read: %v", err)
	var wrongType *json.UnmarshalTypeError
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &wrongType) && wrongType.Field != "":
		e = fault.New(fault.ModelLoad, "config.json: %s cannot be %s", wrongType.Field, wrongType.Value)
	case errors.As(err, &syntax):
		line := 1 + bytes.Count(config[:min(int(syntax.Offset), len(config))], []byte("\n"))
		e = fault.New(fault.ModelLoad, "config.json is not JSON: %v in line %d", err, line)
	}
	return e.WithCause(err)
}

// Invalid is the error of a config that no model can be built from.
func Invalid(format string, args ...any) error {
	return fault.New(fault.ModelLoad, "config.json: "+format, args...)
}

// First gives the first error there is.
func First(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Sizes checks that sizes of a config are positive and sane: a hostile one must not make us build a
// graph of a billion layers.
func Sizes(limits ...Limit) error {
	for _, l := range limits {
		if l.Value < 1 || l.Value > l.Max {
			return Invalid("%s is %d, which is not between 1 and %d", l.Name, l.Value, l.Max)
		}
	}
	return nil
}

// Limit is one size of a config.
type Limit struct {
	Name       string
	Value, Max int64
}

// The most that sizes of a config may be; far beyond any model there is.
const (
	MaxLayers = 4096
	MaxWidth  = 1 << 24
	MaxVocab  = 1 << 28
	MaxTokens = 1 << 30
)

// Activation checks that an activation function is known.
func Activation(field, name string) error {
	if nn.HasActivation(name) {
		return nil
	}
	return fault.New(fault.ModelLoad, "config.json: %s %q is not a known activation function", field, name).
		WithHint("Known are %s.", strings.Join(nn.ActivationNames(), ", "))
}

// Divides checks that one size is a multiple of another.
func Divides(name string, value int64, by string, divisor int64) error {
	if divisor < 1 || value%divisor != 0 {
		return Invalid("%s (%d) is not a multiple of %s (%d)", name, value, by, divisor)
	}
	return nil
}

// Unsupported is the error of an option that is known and not built.
func Unsupported(field string, value any) error {
	return Invalid("%s = %s is not supported", field, fmt.Sprint(value))
}
