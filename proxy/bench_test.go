package proxy_test

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/proxy"
	"github.com/stretchr/testify/require"
)

// gpt2Small has the sizes of GPT-2 small but for the vocabulary, whose words need two digits.
const gpt2Small = `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768,
	"n_positions": 1024, "vocab_size": 24}`

// BenchmarkTrace measures one trace with one save. The small model's time is what a trace costs
// beside its operators' work: planning, and calling some 200 of them.
func BenchmarkTrace(b *testing.B) {
	small := `{"architectures": ["GPT2LMHeadModel"], "n_layer": 12, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": 24}`
	ids := make([]int64, 10)
	for _, c := range []struct{ name, config string }{{"small", small}, {"gpt2", gpt2Small}} {
		if c.config == gpt2Small && os.Getenv("NNSIGHT_GO_BENCH_LARGE") == "" {
			continue // its random weights take a while to draw
		}
		m, err := engine.Open(enginetest.Directory(b, c.config, 1), engine.Options{Load: true})
		require.NoError(b, err)
		for _, invokes := range []int{1, 12} {
			b.Run(fmt.Sprintf("%s/%d", c.name, invokes), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					tr := proxy.New(m)
					for i := range invokes {
						in := tr.InvokeIDs(ids)
						if i > 0 {
							block := in.Module(fmt.Sprintf("transformer.h.%d", i%12))
							block.SetOutput("0", block.Output("0").Mul(0.5))
						}
						in.Module("lm_head").Output("").Save()
					}
					if err := tr.Run(context.Background()); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		require.NoError(b, m.Close())
	}
}
