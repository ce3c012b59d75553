// Quickstart traces the built-in model from Go: no Python in the process.
//
//	eval "$(tools/build/env.sh)"
//	go run ./examples/go/quickstart
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

const (
	eiffel    = "The Eiffel Tower is in the city of"
	colosseum = "The Colosseum is in the city of"
)

func main() {
	name := engine.BuiltIn
	if len(os.Args) > 1 {
		name = os.Args[1] // the directory of a GPT-2, say
	}
	if err := run(name, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(name string, out io.Writer) error {
	model, err := engine.Open(name, engine.Options{})
	if err != nil {
		return err
	}
	defer model.Close()

	// Four prompts in one trace; nothing is computed before Run.
	tr := proxy.New(model)

	// A prompt as it is: look at a hidden state and at the likeliest next tokens.
	in := tr.Invoke(eiffel)
	state := in.Module("transformer.h.3").Output("0").Save()
	logits := in.Module("lm_head").Output("").Index(0, -1)
	top := logits.Softmax(-1).Call("topk", 3)
	chances, tokens := top.Item(0).Save(), top.Item(1).Save()

	// The same prompt with the first MLP silenced.
	in = tr.Invoke(eiffel)
	in.Module("transformer.h.0.mlp").Output("").SetIndex(0.0, proxy.All)
	silenced := answer(in)

	// Another prompt, as it is and with the first one's last hidden state put in its place.
	plain := answer(tr.Invoke(colosseum))
	in = tr.Invoke(colosseum)
	in.Module("transformer.h.3").Output("0").SetIndex(state.Index(proxy.All, -1), proxy.All, -1)
	patched := answer(in)

	if err := tr.Run(context.Background()); err != nil {
		return err
	}

	// What was saved holds gotorch tensors now.
	fmt.Fprintf(out, "hidden states of layer 3: %v\n", state.Tensor().Shape())
	fmt.Fprintf(out, "%q continues with\n", eiffel)
	for i := range int64(3) {
		text, err := model.Decode([]int64{tokens.Tensor().Index(i).Item().(int64)})
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%12q  %5.1f %%\n", text, 100*chances.Tensor().Index(i).Item().(float32))
	}
	for _, line := range []struct {
		about string
		token *proxy.Value
	}{
		{"with the first MLP silenced", silenced},
		{fmt.Sprintf("%q", colosseum), plain},
		{"the same with layer 3's last state of the other prompt", patched},
	} {
		text, err := model.Decode([]int64{line.token.Tensor().Item().(int64)})
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%s -> %q\n", line.about, text)
	}
	return nil
}

// answer saves the likeliest next token of a prompt.
func answer(in *proxy.Invoke) *proxy.Value {
	return in.Module("lm_head").Output("").Index(0, -1).Argmax(-1).Save()
}
