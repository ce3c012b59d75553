package nn

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// The wanted numbers are transformers' (LlamaRotaryEmbedding, heads of 16, context 512).
func TestInvFreq(t *testing.T) {
	llama3 := Rope{Type: "llama3", Theta: 500000, Factor: 8, LowFreqFactor: 1, HighFreqFactor: 4, OriginalContext: 64}
	yarn := Rope{Type: "yarn", Theta: 10000, Factor: 4, OriginalContext: 150, BetaFast: 32, BetaSlow: 1, TruncateYarnRange: true}
	tuned := yarn
	tuned.MScale, tuned.MScaleAllDim, tuned.TruncateYarnRange, tuned.BetaFast = 0.7, 0.9, false, 16
	plain := []float32{1, 0.316227764, 0.100000001, 0.0316227786, 0.00999999978, 0.00316227786, 0.00100000005, 0.000316227786}
	for _, c := range []struct {
		name    string
		rope    Rope
		want    []float32
		scaling float64
	}{
		{"default", Rope{Type: "default", Theta: 10000}, plain, 1},
		{"dynamic", Rope{Type: "dynamic", Theta: 10000, Factor: 4}, plain, 1},
		{"linear", Rope{Type: "linear", Theta: 10000, Factor: 4},
			[]float32{0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05}, 1},
		{"llama3", llama3,
			[]float32{1, 0.079403013, 0.00470075384, 0.000911583134, 0.000176776681, 3.42810235e-05, 6.64786967e-06, 1.28917316e-06}, 1},
		{"yarn", yarn,
			[]float32{1, 0.237170815, 0.049999997, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05},
			1.138629436111989},
		{"yarn tuned", tuned,
			[]float32{1, 0.251975715, 0.0485386476, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05},
			0.9753496504321066},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := c.rope.InvFreq(16)
			require.Len(t, got, 8)
			for i := range got {
				// one unit in the last place: PyTorch's vectorised power is not always rounded right
				require.InEpsilon(t, c.want[i], got[i], 1.3e-7, "frequency %d", i)
			}
			require.InDelta(t, c.scaling, c.rope.Scaling(), 1e-15)
		})
	}
	given := yarn
	given.AttentionFactor = 1.5
	require.Equal(t, 1.5, given.Scaling())
}
