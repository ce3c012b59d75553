// Package llama is Llama with its language-model head, module by module as in transformers'
// modeling_llama.py, whose names it keeps: RMSNorm, rotary positions, grouped-query attention,
// SwiGLU.
package llama

import (
	"math"

	"github.com/nnsight-go/nnsight-go/engine/arch"
	"github.com/nnsight-go/nnsight-go/engine/nn"
)

func init() { arch.Register("LlamaForCausalLM", Open) }

// Config is the part of config.json that shapes the model, with transformers' defaults.
type Config struct {
	VocabSize    int64   `json:"vocab_size"`
	Hidden       int64   `json:"hidden_size"`
	Intermediate int64   `json:"intermediate_size"`
	Layers       int64   `json:"num_hidden_layers"`
	Heads        int64   `json:"num_attention_heads"`
	KVHeads      *int64  `json:"num_key_value_heads"` // nil: as many as heads
	HeadDim      *int64  `json:"head_dim"`            // nil: hidden_size / num_attention_heads
	Activation   string  `json:"hidden_act"`
	Positions    int64   `json:"max_position_embeddings"`
	Epsilon      float64 `json:"rms_norm_eps"`
	Padding      *int64  `json:"pad_token_id"`
	AttnDropout  float64 `json:"attention_dropout"`
	AttnBias     bool    `json:"attention_bias"`
	MLPBias      bool    `json:"mlp_bias"`
	Tied         bool    `json:"tie_word_embeddings"`
	arch.RopeConfig
	rope nn.Rope
}

// Open reads a config.json.
func Open(config []byte) (arch.Architecture, error) {
	c := &Config{VocabSize: 32000, Hidden: 4096, Intermediate: 11008, Layers: 32, Heads: 32, Activation: "silu",
		Positions: 2048, Epsilon: 1e-6}
	if err := arch.Decode(config, c); err != nil {
		return nil, err
	}
	if c.KVHeads == nil {
		c.KVHeads = &c.Heads
	}
	if c.HeadDim == nil {
		dim := c.Hidden / max(c.Heads, 1)
		c.HeadDim = &dim
	}
	err := arch.Sizes(
		arch.Limit{Name: "vocab_size", Value: c.VocabSize, Max: arch.MaxVocab},
		arch.Limit{Name: "hidden_size", Value: c.Hidden, Max: arch.MaxWidth},
		arch.Limit{Name: "intermediate_size", Value: c.Intermediate, Max: arch.MaxWidth},
		arch.Limit{Name: "num_hidden_layers", Value: c.Layers, Max: arch.MaxLayers},
		arch.Limit{Name: "num_attention_heads", Value: c.Heads, Max: arch.MaxWidth},
		arch.Limit{Name: "num_key_value_heads", Value: *c.KVHeads, Max: arch.MaxWidth},
		arch.Limit{Name: "head_dim", Value: *c.HeadDim, Max: arch.MaxWidth},
		arch.Limit{Name: "max_position_embeddings", Value: c.Positions, Max: arch.MaxTokens})
	if err = arch.First(err,
		arch.Divides("hidden_size", c.Hidden, "num_attention_heads", c.Heads),
		arch.Divides("num_attention_heads", c.Heads, "num_key_value_heads", *c.KVHeads),
		arch.Activation("hidden_act", c.Activation)); err != nil {
		return nil, err
	}
	if c.rope, err = c.Rope(*c.HeadDim, c.Positions); err != nil {
		return nil, err
	}
	return c, nil
}

// Context is the number of positions the model was trained for.
func (c *Config) Context() int { return int(c.Positions) }

// Vocab is the number of token ids.
func (c *Config) Vocab() int { return int(c.VocabSize) }

// BasePrefix is the module that checkpoints of the bare LlamaModel leave out.
func (c *Config) BasePrefix() string { return "model" }

// IgnoreSurplus names the rotary frequencies that old checkpoints hold.
func (c *Config) IgnoreSurplus() []string { return []string{"*.rotary_emb.inv_freq"} }

// Build lays LlamaForCausalLM down.
func (c *Config) Build(b *nn.Builder) {
	m := b.Model("LlamaForCausalLM")
	base := newModel(m, c)
	var head *nn.Linear
	if c.Tied {
		head = nn.NewTiedLinear(m, "lm_head", c.Hidden, c.VocabSize, base.embedTokens.Weight)
	} else {
		head = nn.NewLinear(m, "lm_head", c.Hidden, c.VocabSize, false)
	}

	ids := b.InputIDs()
	m.Enter(nn.Kwarg("input_ids", &ids), nn.Kwarg("attention_mask", nil))
	logits := head.Forward(base.forward(ids, b.PositionIDs(), b.AttentionMask()).LastToken())
	m.LeaveObject("CausalLMOutputWithPast", nn.Field("logits", &logits), nn.Field("past_key_values", nil))
}

// model is LlamaModel.
type model struct {
	*nn.Module
	embedTokens *nn.Embedding
	layers      []*layer
	norm        *nn.RMSNorm
	rotaryEmb   *nn.RotaryEmbedding
}

func newModel(parent *nn.Module, c *Config) *model {
	m := parent.Child("model", "LlamaModel", "")
	return &model{
		Module:      m,
		embedTokens: nn.NewEmbedding(m, "embed_tokens", c.VocabSize, c.Hidden, c.Padding),
		layers: nn.List(m, "layers", int(c.Layers), func(list *nn.Module, name string, _ int) *layer {
			return newLayer(list, name, c)
		}),
		norm:      nn.NewRMSNorm(m, "norm", "LlamaRMSNorm", c.Hidden, c.Epsilon),
		rotaryEmb: nn.NewRotaryEmbedding(m, "rotary_emb", "LlamaRotaryEmbedding", *c.HeadDim, c.rope),
	}
}

func (m *model) forward(ids, positions, mask nn.Value) nn.Value {
	m.Enter(nn.Kwarg("input_ids", &ids), nn.Kwarg("attention_mask", nil), nn.Kwarg("position_ids", nil),
		nn.Kwarg("past_key_values", nil), nn.Kwarg("inputs_embeds", nil), nn.Kwarg("use_cache", nil))
	x := m.embedTokens.Forward(ids)
	cos, sin := m.rotaryEmb.Forward(x, positions)
	for _, layer := range m.layers {
		x = layer.forward(x, mask, positions, cos, sin)
	}
	x = m.norm.Forward(x)
	m.LeaveObject("BaseModelOutputWithPast", nn.Field("last_hidden_state", &x), nn.Field("past_key_values", nil))
	return x
}

// layer is LlamaDecoderLayer: attention and MLP, each added to the residual stream.
type layer struct {
	*nn.Module
	selfAttn               *attention
	mlp                    *mlp
	inputLayernorm         *nn.RMSNorm
	postAttentionLayernorm *nn.RMSNorm
}

func newLayer(parent *nn.Module, name string, c *Config) *layer {
	m := parent.Child(name, "LlamaDecoderLayer", "")
	return &layer{
		Module:                 m,
		selfAttn:               newAttention(m, c),
		mlp:                    newMLP(m, c),
		inputLayernorm:         nn.NewRMSNorm(m, "input_layernorm", "LlamaRMSNorm", c.Hidden, c.Epsilon),
		postAttentionLayernorm: nn.NewRMSNorm(m, "post_attention_layernorm", "LlamaRMSNorm", c.Hidden, c.Epsilon),
	}
}

func (m *layer) forward(x, mask, positions, cos, sin nn.Value) nn.Value {
	m.Enter(nn.Arg(&x), nn.Kwarg("attention_mask", &mask), nn.KwargTuple("position_embeddings", &cos, &sin),
		nn.Kwarg("position_ids", &positions), nn.Kwarg("past_key_values", nil), nn.Kwarg("use_cache", nil))
	x = x.Add(m.selfAttn.forward(m.inputLayernorm.Forward(x), mask, positions, cos, sin))
	x = x.Add(m.mlp.forward(m.postAttentionLayernorm.Forward(x)))
	m.LeaveTuple(&x)
	return x
}

// attention is LlamaAttention: several query heads share a head of keys and values.
type attention struct {
	*nn.Module
	qProj, kProj, vProj, oProj *nn.Linear
	headDim                    int64
	dropout                    float64
}

func newAttention(parent *nn.Module, c *Config) *attention {
	m := parent.Child("self_attn", "LlamaAttention", "")
	queries, keys := c.Heads**c.HeadDim, *c.KVHeads**c.HeadDim
	return &attention{
		Module:  m,
		qProj:   nn.NewLinear(m, "q_proj", c.Hidden, queries, c.AttnBias),
		kProj:   nn.NewLinear(m, "k_proj", c.Hidden, keys, c.AttnBias),
		vProj:   nn.NewLinear(m, "v_proj", c.Hidden, keys, c.AttnBias),
		oProj:   nn.NewLinear(m, "o_proj", queries, c.Hidden, c.AttnBias),
		headDim: *c.HeadDim,
		dropout: c.AttnDropout,
	}
}

func (m *attention) forward(x, mask, positions, cos, sin nn.Value) nn.Value {
	m.Enter(nn.Kwarg("hidden_states", &x), nn.Kwarg("attention_mask", &mask), nn.Kwarg("position_ids", &positions),
		nn.Kwarg("past_key_values", nil), nn.Kwarg("use_cache", nil), nn.KwargTuple("position_embeddings", &cos, &sin))
	heads := func(x nn.Value) nn.Value { return x.Unflatten(-1, -1, m.headDim).Transpose(1, 2) }
	q, k, v := heads(m.qProj.Forward(x)), heads(m.kProj.Forward(x)), heads(m.vProj.Forward(x))
	cos, sin = cos.Unsqueeze(1), sin.Unsqueeze(1)
	q, k = nn.Rotate(q, cos, sin), nn.Rotate(k, cos, sin)
	x = m.Attention(q, k, v, mask, math.Pow(float64(m.headDim), -0.5), m.dropout)
	x = m.oProj.Forward(x.Transpose(1, 2).Flatten(-2, -1))
	m.LeaveTuple(&x, nil) // the fused attention has no weights to show
	return x
}

// mlp is LlamaMLP: SwiGLU.
type mlp struct {
	*nn.Module
	gateProj, upProj, downProj *nn.Linear
	actFn                      *nn.Activation
}

func newMLP(parent *nn.Module, c *Config) *mlp {
	m := parent.Child("mlp", "LlamaMLP", "")
	return &mlp{
		Module:   m,
		gateProj: nn.NewLinear(m, "gate_proj", c.Hidden, c.Intermediate, c.MLPBias),
		upProj:   nn.NewLinear(m, "up_proj", c.Hidden, c.Intermediate, c.MLPBias),
		downProj: nn.NewLinear(m, "down_proj", c.Intermediate, c.Hidden, c.MLPBias),
		actFn:    nn.NewActivation(m, "act_fn", c.Activation),
	}
}

func (m *mlp) forward(x nn.Value) nn.Value {
	m.Enter(nn.Arg(&x))
	x = m.downProj.Forward(m.actFn.Forward(m.gateProj.Forward(x)).Mul(m.upProj.Forward(x)))
	m.Leave(&x)
	return x
}
