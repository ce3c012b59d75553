package proxy

import (
	"context"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
	"github.com/nnsight-go/nnsight-go/engine/token"
)

// Settings say how tokens are drawn. [engine.Model.GenerationSettings] gives those of a model.
type Settings = gen.Settings

// Generation continues prompts: at each step the model computes one token a row. It belongs to one
// goroutine, runs once, and gives its memory back when it has run.
//
//	g := proxy.Generate(model, settings, "The Eiffel Tower is in the city of")
//	g.Each(func(s *proxy.Step) {
//		h := s.Module("transformer.h.3").Output("0")
//		h.SetIndex(h.Mul(0.9), proxy.All)
//	})
//	rows, err := g.Run(ctx)
type Generation struct {
	model    Model
	settings Settings
	rows     [][]int64
	begun    fault.Pos
	each     []func(*Step)
	after    []func(*Step) error
	err      error // a mistake in what it was given, or how its stream went
	ran      bool
}

// Step is a step of a generation. Its lines see the tokens that are new in it: of step 0 the prompts
// [batch, seq], padded on the left, of every other step [batch, 1]. The head sees the last alone.
type Step struct {
	*Invoke
	Number int
	tokens []int64
	done   bool
}

// Tokens are what the step drew, one a row, once it has run: those of its beams in a beam search.
func (s *Step) Tokens() []int64 { return s.tokens }

// Last tells whether no step follows, once it has run.
func (s *Step) Last() bool { return s.done }

// Generate begins a generation of prompts, each continued on a row of its own.
func Generate(model Model, settings Settings, prompts ...string) *Generation {
	g := GenerateIDs(model, settings)
	for _, p := range prompts {
		ids, err := model.Encode(p)
		if err != nil {
			g.fail(err)
		}
		g.rows = append(g.rows, ids)
	}
	return g
}

// GenerateIDs begins a generation of rows of token ids.
func GenerateIDs(model Model, settings Settings, rows ...[]int64) *Generation {
	return &Generation{model: model, settings: settings, rows: rows, begun: caller()}
}

func (g *Generation) fail(err error) {
	if g.err == nil {
		e := fault.As(err)
		if e.Pos.IsZero() {
			e.Pos = g.begun
		}
		g.err = e
	}
}

// Each has a function record lines of every step, before it runs: lines of some steps alone stand behind
// an if on its number. Values of earlier steps are used as tensors ([Value.Tensor]).
func (g *Generation) Each(record func(*Step)) { g.each = append(g.each, record) }

// After has a function look at every step that has run: values that its lines saved hold tensors. An
// error of the function ends the generation.
func (g *Generation) After(look func(*Step) error) { g.after = append(g.after, look) }

// Run runs all steps and gives all tokens of each row, prompts and padding included; of a beam search
// the best rows it found. Cancelling the context ends it between two operators.
func (g *Generation) Run(ctx context.Context) ([][]int64, error) {
	rows, err := g.run(ctx)
	if err != nil {
		g.fail(err)
		return nil, g.err
	}
	return rows, nil
}

func (g *Generation) run(ctx context.Context) ([][]int64, error) {
	if g.err == nil && g.ran {
		return nil, fault.New(fault.Graph, "this generation has run").WithHint("Begin a new one.")
	}
	g.ran = true
	if g.err != nil {
		return nil, g.err
	}
	if m, there := g.model.(*RemoteModel); there {
		return g.runThere(ctx, m)
	}
	m, here := g.model.(*engine.Model)
	if !here {
		return nil, strange(g.model)
	}
	generation, err := gen.New(m.Native, g.rows, nil, g.settings)
	if err != nil {
		return nil, err
	}
	defer generation.Free()
	for number := 0; !generation.Done(); number++ {
		if err := g.step(ctx, generation, number); err != nil {
			return nil, err
		}
	}
	return generation.Rows(), nil
}

// step records a step, runs it, draws its tokens and shows it.
func (g *Generation) step(ctx context.Context, generation *gen.Generation, number int) error {
	trace := New(g.model)
	s := &Step{Invoke: trace.invoke(graph.Invoke{}), Number: number}
	for _, record := range g.each {
		record(s)
	}
	err := trace.begin()
	if err != nil {
		return atStep(err, number)
	}
	err = trace.run(ctx, func(consts []aten.Tensor) (*host.Run, error) {
		return generation.Begin(&trace.graph, consts, true)
	})
	if err != nil {
		return atStep(err, number)
	}
	if s.tokens, err = generation.Next(); err != nil {
		return err
	}
	s.done = generation.Done()
	for _, look := range g.after {
		if err := look(s); err != nil {
			return err
		}
	}
	return nil
}

// Drawn is what one step of a stream gives.
type Drawn struct {
	Step   int
	Tokens []int64  // one a row
	Text   []string // what became certain of each row's text, without special tokens; "" where there is no tokenizer
}

// Stream runs the generation on a goroutine of its own, which sends what each step drew and closes the
// channel at its end; Err then tells how it went. Functions of Each and After are called there. A reader
// that leaves early cancels the context: the goroutine ends, and the memory comes back.
func (g *Generation) Stream(ctx context.Context) <-chan Drawn {
	out := make(chan Drawn)
	if g.settings.Beams > 1 {
		g.fail(fault.New(fault.Input, "a beam search cannot be streamed: its rows are others at each step").
			WithHint("Use Run, or one beam."))
	}
	var texts []*text
	g.After(func(s *Step) error {
		if texts == nil {
			var err error
			if texts, err = g.texts(len(s.tokens)); err != nil {
				return err
			}
		}
		d := Drawn{Step: s.Number, Tokens: slices.Clone(s.tokens)}
		for r, t := range texts {
			piece, err := t.add(s.tokens[r], s.done, g.settings.EOS)
			if err != nil {
				return err
			}
			d.Text = append(d.Text, piece)
		}
		select {
		case out <- d:
			return nil
		case <-ctx.Done():
			return fault.New(fault.Cancelled, "the generation was cancelled").WithCause(ctx.Err())
		}
	})
	go func() {
		defer close(out) // after Err is set
		if _, err := g.run(ctx); err != nil {
			g.fail(err)
		}
	}()
	return out
}

// Err is what ended a stream, nil where it came to its end. It is asked for when the channel is closed.
func (g *Generation) Err() error { return g.err }

// text is the text of one row as it grows.
type text struct {
	stream *token.DecodeStream
	ended  bool
}

func (g *Generation) texts(rows int) ([]*text, error) {
	m, here := g.model.(*engine.Model)
	if there, ok := g.model.(*RemoteModel); ok {
		m, here = there.here, there.here != nil
	}
	if !here {
		return make([]*text, rows), nil
	}
	tokenizer, err := m.Tokenizer()
	if err != nil {
		return nil, err
	}
	out := make([]*text, rows)
	for r := range out {
		out[r] = &text{stream: tokenizer.DecodeStream(true)}
	}
	return out, nil
}

// add takes the row's next token. Behind a token that ends the row comes padding, which is no text.
func (t *text) add(token int64, last bool, eos []int64) (string, error) {
	if t == nil || t.ended {
		return "", nil
	}
	piece, err := t.stream.Step(token)
	if t.ended = last || slices.Contains(eos, token); err != nil || !t.ended {
		return piece, err
	}
	rest, err := t.stream.Flush()
	return piece + rest, err
}
