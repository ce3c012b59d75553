// Generate writes text from Go, looks at every step of it and changes some.
//
//	eval "$(tools/build/env.sh)"
//	go run ./examples/go/generate
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/proxy"
)

const prompt = "The Eiffel Tower is in the city of"

func main() {
	name := engine.BuiltIn
	if len(os.Args) > 1 {
		name = os.Args[1] // the directory of a GPT-2, say
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, name, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, name string, out io.Writer) error {
	model, err := engine.Open(name, engine.Options{})
	if err != nil {
		return err
	}
	defer model.Close()
	settings, err := model.GenerationSettings()
	if err != nil {
		return err
	}
	settings.MaxNewTokens = 4

	// Text as it is written. A reader that leaves early cancels the context.
	fmt.Fprint(out, prompt)
	g := proxy.Generate(model, settings, prompt)
	for step := range g.Stream(ctx) {
		fmt.Fprint(out, step.Text[0])
	}
	fmt.Fprintln(out)
	if err := g.Err(); err != nil {
		return err
	}

	// Lines of every step: what it draws from, and an edit of the first.
	var chance *proxy.Value
	g = proxy.Generate(model, settings, prompt)
	g.Each(func(s *proxy.Step) {
		if s.Number == 0 {
			s.Module("transformer.h.0.mlp").Output("").SetIndex(0.0, proxy.All)
		}
		chance = s.Module("lm_head").Output("").Index(0, -1).Softmax(-1).Call("amax").Save()
	})
	g.After(func(s *proxy.Step) error {
		text, err := model.Decode(s.Tokens())
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(out, "step %d: %q  %5.1f %%\n", s.Number, text, 100*chance.Tensor().Item().(float32))
		return err
	})
	_, err = g.Run(ctx)
	return err
}
