package arch_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/arch"
	_ "github.com/nnsight-go/nnsight-go/engine/arch/all"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/nn"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "rewrite the golden files in testdata")

const (
	tinyGPT2 = `{"architectures": ["GPT2LMHeadModel"], "n_embd": 12, "n_head": 3, "n_layer": 2, "n_positions": 16,
		"vocab_size": 7, "resid_pdrop": 0, "attn_pdrop": 0.0, "n_inner": null}`
	tinyLlama = `{"architectures": ["LlamaForCausalLM"], "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
		"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 7, "max_position_embeddings": 32,
		"rms_norm_eps": 1e-05, "attention_bias": true, "pad_token_id": 0, "tie_word_embeddings": true,
		"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
		"high_freq_factor": 4.0, "original_max_position_embeddings": 16}}`
)

var tiny = map[string]string{"gpt2": tinyGPT2, "llama": tinyLlama}

func build(t *testing.T, config string) (arch.Architecture, *arch.Graphs) {
	a, err := arch.Open([]byte(config))
	require.NoError(t, err)
	g, err := arch.Build(a)
	require.NoError(t, err)
	return a, g
}

// The golden files show a whole model: what a change to one of them changes is what users see.
func TestGolden(t *testing.T) {
	for name, config := range tiny {
		t.Run(name, func(t *testing.T) {
			_, g := build(t, config)
			file := filepath.Join("testdata", name+".txt")
			got := print(g)
			if *update {
				require.NoError(t, os.WriteFile(file, []byte(got), 0o644))
			}
			want, err := os.ReadFile(file)
			require.NoError(t, err)
			require.Equal(t, string(want), got)
		})
	}
}

func print(g *arch.Graphs) string {
	var b strings.Builder
	b.WriteString("modules\n")
	for _, m := range g.Causal.Modules {
		fmt.Fprintf(&b, "  %s: %s(%s) %s\n", m.Path, m.Class, m.Extra, strings.Join(m.Params, " "))
	}
	b.WriteString("params\n")
	for _, p := range g.Params {
		fmt.Fprintf(&b, "  %s %v", p.Name, p.Shape)
		if p.Tied != "" {
			fmt.Fprintf(&b, " tied to %s", p.Tied)
		}
		if !p.Persistent {
			fmt.Fprintf(&b, " computed %s", p.DType)
		}
		b.WriteString("\n")
	}
	printGraph(&b, "causal", g.Causal)
	printGraph(&b, "masked", g.Masked)
	return b.String()
}

func printGraph(b *strings.Builder, name string, m *graph.Model) {
	fmt.Fprintf(b, "%s points\n", name)
	for _, p := range m.Points {
		fmt.Fprintf(b, "  %s.%s = %s\n", p.Path, port(p.Port), text(&p.Tree))
	}
	fmt.Fprintf(b, "%s nodes\n", name)
	for i := range m.Nodes {
		n := &m.Nodes[i]
		var args []string
		for k := range n.Args {
			args = append(args, text(&n.Args[k]))
		}
		for k := range n.Kwargs {
			args = append(args, n.Kwargs[k].Name+"="+text(&n.Kwargs[k].Arg))
		}
		what := n.Op
		switch n.Kind {
		case graph.KindParam:
			what = "param " + n.Op
		case graph.KindInput:
			what = "input " + n.Op
		case graph.KindItem:
			what = "item"
		case graph.KindMark:
			what = fmt.Sprintf("mark %s.%s %q", n.Path, port(n.Port), n.Leaf)
		}
		fmt.Fprintf(b, "  %%%d = %s(%s) %s %s\n", i, what, strings.Join(args, ", "), sizes(n.Shape), n.DType)
	}
}

func port(p graph.Port) string { return [...]string{"input", "output"}[p] }

func sizes(s graph.Shape) string {
	return strings.NewReplacer("-1", "B", "-2", "S").Replace(fmt.Sprint([]graph.Dim(s)))
}

func text(a *graph.Arg) string {
	var items []string
	for i := range a.L {
		item := text(&a.L[i])
		if i < len(a.Keys) {
			item = a.Keys[i] + ": " + item
		}
		items = append(items, item)
	}
	l := strings.Join(items, ", ")
	switch a.Kind {
	case graph.ArgNone:
		return "None"
	case graph.ArgBool:
		return fmt.Sprint(a.I != 0)
	case graph.ArgInt:
		return fmt.Sprint(a.I)
	case graph.ArgFloat:
		return fmt.Sprint(a.F)
	case graph.ArgRef:
		return fmt.Sprintf("%%%d", a.Ref)
	case graph.ArgList:
		return "[" + l + "]"
	case graph.ArgTuple:
		return "(" + l + ")"
	case graph.ArgDict:
		return a.S + "{" + l + "}"
	}
	return a.S
}

// Both variants of every model keep the rules that plan relies on.
func TestGraphsAreWellFormed(t *testing.T) {
	for name, config := range tiny {
		_, g := build(t, config)
		for variant, m := range map[string]*graph.Model{"causal": g.Causal, "masked": g.Masked} {
			t.Run(name+"/"+variant, func(t *testing.T) { wellFormed(t, m, g) })
		}
		require.Len(t, g.Masked.Points, len(g.Causal.Points))
		for i, p := range g.Causal.Points {
			require.Equal(t, p.Path, g.Masked.Points[i].Path, "the variants have the same points in the same order")
			require.Equal(t, p.Port, g.Masked.Points[i].Port)
		}
		require.Equal(t, g.Causal.Modules, g.Masked.Modules)

		causal, err := g.Of(nn.Variant{Explicit: true})
		require.NoError(t, err)
		masked, err := g.Of(nn.Variant{Explicit: true, Masked: true})
		require.NoError(t, err)
		for variant, m := range map[string]*graph.Model{"explicit, causal": causal, "explicit, masked": masked} {
			t.Run(name+"/"+variant, func(t *testing.T) { wellFormed(t, m, g) })
		}
		explicit := paths(causal)
		require.Equal(t, explicit, paths(masked))
		var hidden []string
		for _, h := range g.Causal.Hidden {
			require.True(t, g.Causal.Hides(h.Path))
			hidden = append(hidden, h.Path)
		}
		require.NotEmpty(t, hidden)
		common := slices.DeleteFunc(slices.Clone(explicit), func(p string) bool { return slices.Contains(hidden, p) })
		fused := slices.DeleteFunc(paths(g.Causal), func(p string) bool {
			return strings.HasSuffix(p, ".source.scaled_dot_product_attention_0")
		})
		require.Equal(t, fused, common, "but for what is computed another way, the variants have the same points")
	}
}

func paths(m *graph.Model) []string {
	out := make([]string, len(m.Points))
	for i := range m.Points {
		out[i] = m.Points[i].Path
	}
	return out
}

func wellFormed(t *testing.T, m *graph.Model, g *arch.Graphs) {
	params := map[string]bool{}
	for _, p := range g.Params {
		params[p.Name] = true
	}
	used := map[string]bool{}
	marks := map[graph.ID]bool{}
	for i := range m.Nodes {
		n := &m.Nodes[i]
		n.Refs(func(id graph.ID) { require.Less(t, id, graph.ID(i)) })
		switch n.Kind {
		case graph.KindParam:
			require.True(t, params[n.Op], n.Op)
			used[n.Op] = true
		case graph.KindMark:
			marks[graph.ID(i)] = true
			require.NotNil(t, n.Shape)
		case graph.KindCall:
			require.True(t, strings.HasPrefix(n.Op, "aten::") || n.Op == nn.LinearOp, n.Op)
			for _, word := range []string{"view", "reshape"} { // they would pin sizes of the batch
				require.NotContains(t, n.Op, word)
			}
			require.True(t, n.Path == "" || m.HasModule(n.Path), n.Path)
		}
	}
	for name := range params {
		if !strings.HasSuffix(name, "original_inv_freq") { // registered in PyTorch, used only beyond the context
			require.True(t, used[name], "%s is used", name)
		}
	}
	last := graph.ID(0)
	for _, p := range m.Points {
		inside, _, source := strings.Cut(p.Path, ".source.")
		inside, _, heads := strings.Cut(inside, ".heads.")
		require.Equal(t, source || heads, p.Internal, p.Path)
		require.True(t, m.HasModule(inside), p.Path)
		require.GreaterOrEqual(t, p.At, last, "points stand in the order of the forward pass")
		last = p.At
		first := graph.NoID
		p.Tree.Refs(func(id graph.ID) {
			if first == graph.NoID {
				first = id
			}
			n := &m.Nodes[id]
			if source {
				require.Equal(t, []any{graph.KindCall, inside, graph.PortOutput}, []any{n.Kind, n.Path, p.Port})
				require.NotNil(t, n.Shape)
				return
			}
			require.Equal(t, []any{graph.KindMark, p.Path, p.Port}, []any{n.Kind, n.Path, n.Port})
			require.True(t, marks[id], "a mark belongs to one point")
			delete(marks, id)
		})
		require.Equal(t, p.At, first)
	}
	require.Empty(t, marks)
	for _, module := range m.Modules {
		in, okIn := m.Point(module.Path, graph.PortInput)
		out, okOut := m.Point(module.Path, graph.PortOutput)
		require.Equal(t, okIn, okOut, module.Path)
		require.True(t, !okIn || in < out)
		never := module.Class == "ModuleList" || strings.HasSuffix(module.Path, "attn_dropout")
		require.Equal(t, never, !okIn, module.Path)
	}
}

func TestFacts(t *testing.T) {
	for name, want := range map[string]struct {
		context, vocab int
		prefix         string
	}{"gpt2": {16, 7, "transformer"}, "llama": {32, 7, "model"}} {
		a, _ := build(t, tiny[name])
		require.Equal(t, want.context, a.Context())
		require.Equal(t, want.vocab, a.Vocab())
		require.Equal(t, want.prefix, a.(arch.Checkpoint).BasePrefix())
		require.NotEmpty(t, a.(arch.Checkpoint).IgnoreSurplus())
	}
	a, err := arch.Open([]byte(`{"architectures": ["GPT2LMHeadModel"]}`))
	require.NoError(t, err)
	require.Equal(t, 1024, a.Context())
	require.Equal(t, 50257, a.Vocab())
}

// Old and new ways to write rotary positions into a config give the same numbers.
func TestRopeConfigs(t *testing.T) {
	freqs := func(rope string) []float32 {
		config := strings.Replace(`{"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_attention_heads": 1,
			"num_hidden_layers": 1, "max_position_embeddings": 64, ROPE}`, "ROPE", rope, 1)
		_, g := build(t, config)
		for _, p := range g.Params {
			if strings.HasSuffix(p.Name, "rotary_emb.inv_freq") {
				return p.Compute()
			}
		}
		return nil
	}
	plain := freqs(`"rope_theta": 10000.0, "rope_scaling": null`)
	require.Len(t, plain, 8)
	require.Equal(t, plain, freqs(`"rope_parameters": null`), "the default base is 10000")
	require.Equal(t, plain, freqs(`"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}`))
	require.NotEqual(t, plain, freqs(`"rope_theta": 500000.0`))
	require.Equal(t, freqs(`"rope_theta": 500000.0`), freqs(`"rope_theta": 1.0, "rope_parameters": {"rope_theta": 500000.0}`))
	linear := freqs(`"rope_scaling": {"type": "linear", "factor": 2.0}`)
	require.Equal(t, plain[3]/2, linear[3])
	require.Equal(t, linear, freqs(`"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}`))
	llama3 := `{"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4ORIGINAL}`
	require.Equal(t,
		freqs(`"rope_scaling": `+strings.Replace(llama3, "ORIGINAL", `, "original_max_position_embeddings": 64`, 1)),
		freqs(`"rope_scaling": `+strings.Replace(llama3, "ORIGINAL", "", 1)), "the original context is the context by default")
}

func TestBadConfigs(t *testing.T) {
	gpt2 := func(s string) string { return `{"architectures": ["GPT2LMHeadModel"], ` + s + `}` }
	llama := func(s string) string { return `{"architectures": ["LlamaForCausalLM"], ` + s + `}` }
	for config, want := range map[string]string{
		`{"architectures": ["MambaForCausalLM"]}`:          "architecture MambaForCausalLM is not supported\n  Supported are GPT2LMHeadModel, LlamaForCausalLM",
		`{"model_type": "gpt2"}`:                           "does not name an architecture",
		`{"architectures": []}`:                            "does not name an architecture",
		`{"architectures": "GPT2LMHeadModel"}`:             "architectures cannot be string",
		`[]`:                                               "cannot be read",
		``:                                                 "is not JSON",
		"{\n\"architectures\": [\n}":                       "is not JSON: invalid character '}' looking for beginning of value in line 3",
		`{} {}`:                                            "is not JSON",
		gpt2(`"n_embd": 50, "n_head": 3`):                  "n_embd (50) is not a multiple of n_head (3)",
		gpt2(`"n_head": 0`):                                "n_head is 0, which is not between 1",
		gpt2(`"n_layer": 1000000000`):                      "n_layer is 1000000000, which is not between 1 and",
		gpt2(`"n_layer": -1`):                              "n_layer is -1",
		gpt2(`"n_inner": 0`):                               "n_inner is 0",
		gpt2(`"n_embd": 9223372036854775807`):              "n_embd is 9223372036854775807",
		gpt2(`"n_embd": 768.5`):                            "n_embd cannot be number 768.5",
		gpt2(`"n_embd": "768"`):                            "n_embd cannot be string",
		gpt2(`"resid_pdrop": "much"`):                      "cannot be read",
		gpt2(`"activation_function": "gelou"`):             `activation_function "gelou" is not a known activation function`,
		gpt2(`"add_cross_attention": true`):                "add_cross_attention = true is not supported",
		gpt2(`"quantization_config": {"bits": 4}`):         "the checkpoint is quantized",
		llama(`"hidden_size": 100`):                        "hidden_size (100) is not a multiple of num_attention_heads (32)",
		llama(`"num_attention_heads": 0`):                  "num_attention_heads is 0",
		llama(`"num_key_value_heads": 5`):                  "num_attention_heads (32) is not a multiple of num_key_value_heads (5)",
		llama(`"num_key_value_heads": 0`):                  "num_key_value_heads is 0",
		llama(`"head_dim": 7`):                             "heads of 7 sizes cannot be rotated",
		llama(`"hidden_act": "swiglu"`):                    `hidden_act "swiglu" is not a known activation function`,
		llama(`"rope_theta": 0`):                           "rope_theta is 0",
		llama(`"partial_rotary_factor": 0.5`):              "partial_rotary_factor = 0.5 is not supported",
		llama(`"rope_scaling": {"rope_type": "longrope"}`): `type "longrope" are not supported`,
		llama(`"rope_scaling": {"type": "linear"}`):        "rotary positions of type linear need factor",
		llama(`"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}`):                        "type llama3 need high_freq_factor",
		llama(`"rope_parameters": {"rope_type": "linear", "factor": 0}`):                                              "factor of the rotary positions is 0",
		llama(`"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}`): "high_freq_factor (4) is not above low_freq_factor (4)",
	} {
		a, err := arch.Open([]byte(config))
		require.ErrorContains(t, err, want, config)
		require.Equal(t, fault.ModelLoad, fault.As(err).Code)
		require.Nil(t, a, config)
	}
	a, err := arch.Open([]byte(llama(`"pad_token_id": 32000`)))
	require.NoError(t, err)
	_, err = arch.Build(a)
	require.ErrorContains(t, err, "padding token 32000 is not among the 32000 rows of model.embed_tokens")
}

func TestRegisterTwicePanics(t *testing.T) {
	require.Panics(t, func() { arch.Register("GPT2LMHeadModel", nil) })
	require.Subset(t, arch.Names(), []string{"GPT2LMHeadModel", "LlamaForCausalLM"})
}

// A config comes from a stranger's directory: whatever it says, there is an error or a model.
func FuzzOpen(f *testing.F) {
	f.Add([]byte(tinyGPT2))
	f.Add([]byte(tinyLlama))
	f.Add([]byte(`{"architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_type": "yarn", "factor": 4}}`))
	f.Fuzz(func(t *testing.T, config []byte) {
		a, err := arch.Open(config)
		if err != nil {
			require.Equal(t, fault.ModelLoad, fault.As(err).Code)
			return
		}
		require.Positive(t, a.Context())
		g, err := arch.Build(a)
		if err != nil {
			require.Equal(t, fault.ModelLoad, fault.As(err).Code)
			return
		}
		wellFormed(t, g.Causal, g)
		wellFormed(t, g.Masked, g)
	})
}
