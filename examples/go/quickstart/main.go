// Quickstart traces the built-in model from Go: no Python in the process.
//
//	eval "$(tools/build/env.sh)"
//	go run ./examples/go/quickstart
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/proxy"
)

func main() {
	name := engine.BuiltIn
	if len(os.Args) > 1 {
		name = os.Args[1]
	}
	model, err := engine.Open(name, engine.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()

	tr := proxy.New(model)

	// One prompt as it is.
	in := tr.Invoke("The Eiffel Tower is in the city of")
	hidden := in.Module("transformer.h.5").Output("0").Save()
	plain := in.Module("lm_head").Output("").Index(0, -1).Argmax(-1).Save()

	// The same prompt with the first MLP silenced, in the same forward pass.
	in = tr.Invoke("The Eiffel Tower is in the city of")
	in.Module("transformer.h.0.mlp").Output("").SetIndex(0.0, proxy.All)
	silenced := in.Module("lm_head").Output("").Index(0, -1).Argmax(-1).Save()

	if err := tr.Run(context.Background()); err != nil {
		log.Fatal(err)
	}
	fmt.Println("hidden states of layer 5:", hidden.Tensor().Shape())
	for _, answer := range []struct {
		what  string
		token *proxy.Value
	}{{"the model says", plain}, {"with the first MLP silenced it says", silenced}} {
		id := answer.token.Tensor().Item().(int64)
		text, err := model.Decode([]int64{id})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s %q\n", answer.what, text)
	}
}
