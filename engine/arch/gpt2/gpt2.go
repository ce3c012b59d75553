// Package gpt2 is GPT-2 with its language-model head, module by module as in transformers'
// modeling_gpt2.py, whose names it keeps.
package gpt2

import (
	"encoding/json"
	"math"

	"github.com/nnsight-go/nnsight-go/engine/arch"
	"github.com/nnsight-go/nnsight-go/engine/nn"
)

func init() { arch.Register("GPT2LMHeadModel", Open) }

// Config is the part of config.json that shapes the model, with transformers' defaults.
type Config struct {
	VocabSize    int64       `json:"vocab_size"`
	Positions    int64       `json:"n_positions"`
	Embd         int64       `json:"n_embd"`
	Layers       int64       `json:"n_layer"`
	Heads        int64       `json:"n_head"`
	Inner        *int64      `json:"n_inner"` // width of the MLP; nil: four times n_embd
	Activation   string      `json:"activation_function"`
	ResidPdrop   json.Number `json:"resid_pdrop"`
	EmbdPdrop    json.Number `json:"embd_pdrop"`
	AttnPdrop    json.Number `json:"attn_pdrop"`
	Epsilon      float64     `json:"layer_norm_epsilon"`
	Scale        bool        `json:"scale_attn_weights"`
	ScaleByLayer bool        `json:"scale_attn_by_inverse_layer_idx"`
	CrossAttn    bool        `json:"add_cross_attention"`
	Tied         bool        `json:"tie_word_embeddings"`
}

// Open reads a config.json. It does not look at reorder_and_upcast_attn, which transformers heeds
// only where attention is not fused.
func Open(config []byte) (arch.Architecture, error) {
	c := &Config{VocabSize: 50257, Positions: 1024, Embd: 768, Layers: 12, Heads: 12, Activation: "gelu_new",
		ResidPdrop: "0.1", EmbdPdrop: "0.1", AttnPdrop: "0.1", Epsilon: 1e-5, Scale: true, Tied: true}
	if err := arch.Decode(config, c); err != nil {
		return nil, err
	}
	err := arch.Sizes(
		arch.Limit{Name: "vocab_size", Value: c.VocabSize, Max: arch.MaxVocab},
		arch.Limit{Name: "n_positions", Value: c.Positions, Max: arch.MaxTokens},
		arch.Limit{Name: "n_embd", Value: c.Embd, Max: arch.MaxWidth},
		arch.Limit{Name: "n_layer", Value: c.Layers, Max: arch.MaxLayers},
		arch.Limit{Name: "n_head", Value: c.Heads, Max: arch.MaxWidth},
		arch.Limit{Name: "n_inner", Value: c.inner(), Max: arch.MaxWidth})
	if err = arch.First(err,
		arch.Divides("n_embd", c.Embd, "n_head", c.Heads),
		arch.Activation("activation_function", c.Activation)); err != nil {
		return nil, err
	}
	if c.CrossAttn {
		return nil, arch.Unsupported("add_cross_attention", c.CrossAttn)
	}
	return c, nil
}

// Context is the number of positions that have an embedding.
func (c *Config) Context() int { return int(c.Positions) }

// Vocab is the number of token ids.
func (c *Config) Vocab() int { return int(c.VocabSize) }

// BasePrefix is the module that checkpoints of the bare GPT2Model leave out, OpenAI's among them.
func (c *Config) BasePrefix() string { return "transformer" }

// IgnoreSurplus names the causal masks that old checkpoints hold.
func (c *Config) IgnoreSurplus() []string { return []string{"*.attn.bias", "*.attn.masked_bias"} }

func (c *Config) inner() int64 {
	if c.Inner != nil {
		return *c.Inner
	}
	return 4 * c.Embd
}

// Build lays GPT2LMHeadModel down.
func (c *Config) Build(b *nn.Builder) {
	m := b.Model("GPT2LMHeadModel")
	transformer := newTransformer(m, c)
	var head *nn.Linear
	if c.Tied {
		head = nn.NewTiedLinear(m, "lm_head", c.Embd, c.VocabSize, transformer.wte.Weight)
	} else {
		head = nn.NewLinear(m, "lm_head", c.Embd, c.VocabSize, false)
	}

	ids := b.InputIDs()
	m.Enter(nn.Kwarg("input_ids", &ids), nn.Kwarg("attention_mask", nil))
	logits := head.Forward(transformer.forward(ids, b.PositionIDs(), b.AttentionMask()).LastToken())
	m.LeaveObject("CausalLMOutputWithCrossAttentions", nn.Field("logits", &logits), nn.Field("past_key_values", nil))
}

// transformer is GPT2Model.
type transformer struct {
	*nn.Module
	wte, wpe *nn.Embedding
	drop     *nn.Dropout
	h        []*block
	lnF      *nn.LayerNorm
}

func newTransformer(parent *nn.Module, c *Config) *transformer {
	m := parent.Child("transformer", "GPT2Model", "")
	return &transformer{
		Module: m,
		wte:    nn.NewEmbedding(m, "wte", c.VocabSize, c.Embd, nil),
		wpe:    nn.NewEmbedding(m, "wpe", c.Positions, c.Embd, nil),
		drop:   nn.NewDropout(m, "drop", c.EmbdPdrop),
		h: nn.List(m, "h", int(c.Layers), func(list *nn.Module, name string, layer int) *block {
			return newBlock(list, name, c, layer)
		}),
		lnF: nn.NewLayerNorm(m, "ln_f", c.Embd, c.Epsilon),
	}
}

func (m *transformer) forward(ids, positions, mask nn.Value) nn.Value {
	m.Enter(nn.Arg(&ids), nn.Kwarg("past_key_values", nil), nn.Kwarg("attention_mask", nil),
		nn.Kwarg("token_type_ids", nil), nn.Kwarg("position_ids", nil), nn.Kwarg("inputs_embeds", nil),
		nn.Kwarg("encoder_hidden_states", nil), nn.Kwarg("encoder_attention_mask", nil), nn.Kwarg("use_cache", nil))
	x := m.drop.Forward(m.wte.Forward(ids).Add(m.wpe.Forward(positions)))
	for _, block := range m.h {
		x = block.forward(x, mask, positions)
	}
	x = m.lnF.Forward(x)
	m.LeaveObject("BaseModelOutputWithPastAndCrossAttentions", nn.Field("last_hidden_state", &x),
		nn.Field("past_key_values", nil))
	return x
}

// block is GPT2Block: attention and MLP, each added to the residual stream.
type block struct {
	*nn.Module
	ln1  *nn.LayerNorm
	attn *attention
	ln2  *nn.LayerNorm
	mlp  *mlp
}

func newBlock(parent *nn.Module, name string, c *Config, layer int) *block {
	m := parent.Child(name, "GPT2Block", "")
	return &block{
		Module: m,
		ln1:    nn.NewLayerNorm(m, "ln_1", c.Embd, c.Epsilon),
		attn:   newAttention(m, c, layer),
		ln2:    nn.NewLayerNorm(m, "ln_2", c.Embd, c.Epsilon),
		mlp:    newMLP(m, c),
	}
}

func (m *block) forward(x, mask, positions nn.Value) nn.Value {
	m.Enter(nn.Arg(&x), nn.Arg(nil), nn.Arg(&mask), nn.Arg(nil), nn.Kwarg("encoder_attention_mask", nil),
		nn.Kwarg("use_cache", nil), nn.Kwarg("position_ids", &positions))
	x = m.attn.forward(m.ln1.Forward(x), mask, positions).Add(x)
	x = x.Add(m.mlp.forward(m.ln2.Forward(x)))
	m.LeaveTuple(&x)
	return x
}

// attention is GPT2Attention: queries, keys and values come out of one layer.
type attention struct {
	*nn.Module
	cAttn, cProj *nn.Conv1D
	residDropout *nn.Dropout
	headDim      int64
	scale        float64
	dropout      float64
}

func newAttention(parent *nn.Module, c *Config, layer int) *attention {
	m := parent.Child("attn", "GPT2Attention", "")
	a := &attention{Module: m, headDim: c.Embd / c.Heads, scale: 1}
	if c.Scale {
		a.scale = math.Pow(float64(a.headDim), -0.5)
	}
	if c.ScaleByLayer {
		a.scale /= float64(layer + 1)
	}
	a.cAttn = nn.NewConv1D(m, "c_attn", c.Embd, 3*c.Embd)
	a.cProj = nn.NewConv1D(m, "c_proj", c.Embd, c.Embd)
	// inside the fused attention: it has no access points
	a.dropout = nn.NewDropout(m, "attn_dropout", c.AttnPdrop).P()
	a.residDropout = nn.NewDropout(m, "resid_dropout", c.ResidPdrop)
	return a
}

func (m *attention) forward(x, mask, positions nn.Value) nn.Value {
	m.Enter(nn.Arg(&x), nn.Kwarg("past_key_values", nil), nn.Kwarg("attention_mask", &mask),
		nn.Kwarg("use_cache", nil), nn.Kwarg("position_ids", &positions))
	qkv := m.cAttn.Forward(x)
	parts := qkv.Split(qkv.Size(-1)/3, -1)
	heads := func(x nn.Value) nn.Value { return x.Unflatten(-1, -1, m.headDim).Transpose(1, 2) }
	x = m.Attention(heads(parts[0]), heads(parts[1]), heads(parts[2]), mask, m.scale, m.dropout)
	x = m.residDropout.Forward(m.cProj.Forward(x.Transpose(1, 2).Flatten(-2, -1)))
	m.LeaveTuple(&x, nil) // the fused attention has no weights to show
	return x
}

// mlp is GPT2MLP.
type mlp struct {
	*nn.Module
	cFC, cProj *nn.Conv1D
	act        *nn.Activation
	dropout    *nn.Dropout
}

func newMLP(parent *nn.Module, c *Config) *mlp {
	m := parent.Child("mlp", "GPT2MLP", "")
	return &mlp{
		Module:  m,
		cFC:     nn.NewConv1D(m, "c_fc", c.Embd, c.inner()),
		cProj:   nn.NewConv1D(m, "c_proj", c.inner(), c.Embd),
		act:     nn.NewActivation(m, "act", c.Activation),
		dropout: nn.NewDropout(m, "dropout", c.ResidPdrop),
	}
}

func (m *mlp) forward(x nn.Value) nn.Value {
	m.Enter(nn.Arg(&x))
	x = m.dropout.Forward(m.cProj.Forward(m.act.Forward(m.cFC.Forward(x))))
	m.Leave(&x)
	return x
}
