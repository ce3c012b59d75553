// Package enginetest makes small model directories for tests: random weights, a tokenizer of a few
// words, no file from anywhere.
package enginetest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/arch"
	_ "github.com/nnsight-go/nnsight-go/engine/arch/all"
	"github.com/stretchr/testify/require"
)

// GPT2 is the config of a small GPT-2; Llama that of a small Llama with grouped-query attention.
const (
	GPT2 = `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 16,
		"n_positions": 32, "vocab_size": 24}`
	Llama = `{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16,
		"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32, "vocab_size": 24}`
)

// Directory writes a model directory of a config, with weights drawn from a seed and a tokenizer
// whose words are "w0" to "w23".
func Directory(t testing.TB, config string, seed uint64) string {
	dir := t.TempDir()
	a, err := arch.Open([]byte(config))
	require.NoError(t, err)
	graphs, err := arch.Build(a)
	require.NoError(t, err)
	r := rand.New(rand.NewPCG(seed, 0))
	header := map[string]any{}
	var data bytes.Buffer
	for _, p := range graphs.Params {
		if p.Compute != nil || p.Tied != "" {
			continue
		}
		start, n := data.Len(), int64(1)
		for _, s := range p.Shape {
			n *= s
		}
		for range n {
			data.Write(binary.LittleEndian.AppendUint32(data.AvailableBuffer(), math.Float32bits(float32(r.NormFloat64()*0.2))))
		}
		header[p.Name] = map[string]any{"dtype": "F32", "shape": p.Shape, "data_offsets": []int{start, data.Len()}}
	}
	text, err := json.Marshal(header)
	require.NoError(t, err)
	text = append(text, bytes.Repeat([]byte(" "), -len(text)&7)...) // as writers do, so that numbers are aligned
	file := binary.LittleEndian.AppendUint64(nil, uint64(len(text)))
	file = append(append(file, text...), data.Bytes()...)
	write := func(name string, content []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), content, 0o644))
	}
	write("model.safetensors", file)
	write("config.json", []byte(config))
	vocab := map[string]int{}
	for i := range a.Vocab() {
		vocab["w"+string(rune('0'+i/10))+string(rune('0'+i%10))] = i
	}
	tokenizer, err := json.Marshal(map[string]any{
		"version": "1.0", "added_tokens": []any{}, "pre_tokenizer": map[string]any{"type": "Whitespace"},
		"model": map[string]any{"type": "WordLevel", "vocab": vocab, "unk_token": "w00"},
	})
	require.NoError(t, err)
	write("tokenizer.json", tokenizer)
	write("tokenizer_config.json", []byte(`{"tokenizer_class": "PreTrainedTokenizerFast"}`))
	return dir
}
