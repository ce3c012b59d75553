// Remote traces a model of a server from Go, here the built-in one:
//
//	nnsight-go serve --model nnsight-go/landmarks
//
//	eval "$(tools/build/env.sh)"
//	go run ./examples/go/remote http://127.0.0.1:8418
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/proxy"
)

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: remote ADDRESS")
	}
	if err := run(context.Background(), os.Args[1], os.Getenv("NNSIGHT_GO_API_KEY"), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, address, key string, out io.Writer) error {
	server, err := proxy.Dial(address, key)
	if err != nil {
		return err
	}
	models, err := server.Models(ctx)
	if err != nil {
		return err
	}
	for _, m := range models {
		fmt.Fprintf(out, "%s: %s, %s\n", m.Name, m.Architecture, m.DType)
	}

	// The tokenizer is used here; no weight is read.
	here, err := engine.Open(engine.BuiltIn, engine.Options{})
	if err != nil {
		return err
	}
	defer here.Close()
	model := server.Model(engine.BuiltIn, here)

	tr := proxy.New(model)
	in := tr.Invoke("The Eiffel Tower is in the city of")
	hidden := in.Module("transformer.h.3").Output("0")
	in = tr.Invoke("The Colosseum is in the city of")
	in.Module("transformer.h.3").Output("0").SetIndex(hidden.Index(proxy.All, -1), proxy.All, -1)
	token := in.Module("lm_head").Output("").Index(0, -1).Argmax(-1).Save()
	if err := tr.Run(ctx); err != nil {
		return err
	}
	city, err := here.Decode([]int64{token.Tensor().Item().(int64)})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "with the Eiffel Tower's last hidden state:%s\n", city)

	settings, err := here.GenerationSettings()
	if err != nil {
		return err
	}
	settings.MaxNewTokens = 4
	g := proxy.Generate(model, settings, "The Colosseum is in the city of")
	for step := range g.Stream(ctx) {
		fmt.Fprint(out, step.Text[0])
	}
	fmt.Fprintln(out)
	return g.Err()
}
