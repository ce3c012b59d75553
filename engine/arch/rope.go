package arch

import (
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/nn"
)

// RopeConfig is how config.json tells rotary positions: in rope_parameters, or, in older configs,
// in rope_theta and rope_scaling. Architectures embed it in their config.
type RopeConfig struct {
	Parameters      *ropeParameters `json:"rope_parameters"`
	Scaling         *ropeParameters `json:"rope_scaling"`
	Theta           *float64        `json:"rope_theta"`
	PartialRotary   *float64        `json:"partial_rotary_factor"`
	OriginalContext *float64        `json:"original_max_position_embeddings"`
}

type ropeParameters struct {
	Type            string   `json:"rope_type"`
	OldType         string   `json:"type"`
	Theta           *float64 `json:"rope_theta"`
	PartialRotary   *float64 `json:"partial_rotary_factor"`
	Factor          *float64 `json:"factor"`
	LowFreqFactor   *float64 `json:"low_freq_factor"`
	HighFreqFactor  *float64 `json:"high_freq_factor"`
	OriginalContext *float64 `json:"original_max_position_embeddings"`
	AttentionFactor float64  `json:"attention_factor"`
	BetaFast        float64  `json:"beta_fast"`
	BetaSlow        float64  `json:"beta_slow"`
	MScale          float64  `json:"mscale"`
	MScaleAllDim    float64  `json:"mscale_all_dim"`
	Truncate        *bool    `json:"truncate"`
}

// Rope gives the rotary positions of a model with heads of headDim sizes and the given context. A
// kind that is not known is an error that lists those that are.
func (c *RopeConfig) Rope(headDim, context int64) (nn.Rope, error) {
	p := ropeParameters{}
	if c.Parameters != nil {
		p = *c.Parameters
	}
	if c.Scaling != nil && *c.Scaling != (ropeParameters{}) {
		p = *c.Scaling // what transformers prefers where a config has both
	}
	r := nn.Rope{Type: p.Type, Theta: 10000, AttentionFactor: p.AttentionFactor, BetaFast: p.BetaFast,
		BetaSlow: p.BetaSlow, MScale: p.MScale, MScaleAllDim: p.MScaleAllDim, OriginalContext: float64(context),
		TruncateYarnRange: p.Truncate == nil || *p.Truncate}
	if r.Type == "" {
		r.Type = p.OldType
	}
	if r.Type == "" {
		r.Type = "default"
	}
	if r.BetaFast == 0 {
		r.BetaFast = 32
	}
	if r.BetaSlow == 0 {
		r.BetaSlow = 1
	}
	pick(&r.Theta, c.Theta, p.Theta)
	pick(&r.OriginalContext, p.OriginalContext, c.OriginalContext)
	if !slices.Contains(nn.RopeTypes(), r.Type) {
		return r, fault.New(fault.ModelLoad, "config.json: rotary positions of type %q are not supported", r.Type).
			WithHint("Supported are %s.", strings.Join(nn.RopeTypes(), ", "))
	}
	if headDim%2 != 0 {
		return r, Invalid("heads of %d sizes cannot be rotated: the number must be even", headDim)
	}
	partial := 1.0
	pick(&partial, c.PartialRotary, p.PartialRotary)
	if partial != 1 {
		return r, Unsupported("partial_rotary_factor", partial)
	}
	if !(r.Theta > 0) {
		return r, Invalid("rope_theta is %v, which is not above 0", r.Theta)
	}
	needs := map[string][]string{
		"linear":  {"factor"},
		"dynamic": {"factor"},
		"yarn":    {"factor"},
		"llama3":  {"factor", "low_freq_factor", "high_freq_factor"},
	}
	given := map[string]*float64{"factor": p.Factor, "low_freq_factor": p.LowFreqFactor, "high_freq_factor": p.HighFreqFactor}
	for _, name := range needs[r.Type] {
		switch v := given[name]; {
		case v == nil:
			return r, Invalid("rotary positions of type %s need %s", r.Type, name)
		case !(*v > 0):
			return r, Invalid("%s of the rotary positions is %v, which is not above 0", name, *v)
		}
	}
	pick(&r.Factor, p.Factor)
	pick(&r.LowFreqFactor, p.LowFreqFactor)
	pick(&r.HighFreqFactor, p.HighFreqFactor)
	if r.Type == "llama3" && r.HighFreqFactor <= r.LowFreqFactor {
		return r, Invalid("high_freq_factor (%v) is not above low_freq_factor (%v)", r.HighFreqFactor, r.LowFreqFactor)
	}
	return r, nil
}

// pick sets a number to the last of those that are given.
func pick(to *float64, from ...*float64) {
	for _, f := range from {
		if f != nil {
			*to = *f
		}
	}
}
