// Package all registers every architecture: import it for its effect. A new architecture is one
// file and one line here.
package all

import (
	_ "github.com/nnsight-go/nnsight-go/engine/arch/gpt2"  // GPT2LMHeadModel
	_ "github.com/nnsight-go/nnsight-go/engine/arch/llama" // LlamaForCausalLM
)
