package proxy_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/proxy"
	"github.com/stretchr/testify/require"
)

func blocks(config string) (path string, layers int) {
	if config == enginetest.GPT2 {
		return "transformer.h.", 3
	}
	return "model.layers.", 2
}

// without a cache: each token from a trace of the whole row, whose positions at and after start are edited
// as the steps that they belong to were.
func uncached(t *testing.T, m *engine.Model, path string, row []int64, edited func(step int) bool, steps int) ([]int64, [][]float32) {
	prompt := len(row)
	var hidden [][]float32
	for range steps {
		tr := proxy.New(m)
		in := tr.InvokeIDs(row)
		h := in.Module(path + "0").Output("0")
		for p := range row {
			if step := max(p-prompt+1, 0); edited(step) {
				h.SetIndex(h.Index(proxy.All, p).Mul(0.5), proxy.All, p)
			}
		}
		last := in.Module(path+"1").Output("0").Index(0, -1).Save()
		next := in.Module("lm_head").Output("").Index(0, -1).Argmax(-1).Save()
		run(t, tr)
		hidden = append(hidden, floats(t, last.Tensor()))
		row = append(row[:len(row):len(row)], next.Tensor().Item().(int64))
	}
	return row, hidden
}

func TestGenerateIsThatOfWholeTraces(t *testing.T) {
	for _, config := range []string{enginetest.GPT2, enginetest.Llama} {
		m := open(t, config)
		path, _ := blocks(config)
		for name, edited := range map[string]func(int) bool{
			"plain": func(int) bool { return false },
			"steps": func(step int) bool { return step >= 2 && step < 5 },
			"all":   func(int) bool { return true },
		} {
			prompts := [][]int64{{1, 2, 3, 4}, {5}, {6, 7}}
			g := proxy.GenerateIDs(m, proxy.Settings{MaxNewTokens: 8}, prompts...)
			var saved []*proxy.Value
			g.Each(func(s *proxy.Step) {
				if edited(s.Number) {
					h := s.Module(path + "0").Output("0")
					h.SetIndex(h.Mul(0.5), proxy.All)
				}
				saved = append(saved, s.Module(path+"1").Output("0").Index(proxy.All, -1).Save())
			})
			var drawn [][]int64
			g.After(func(s *proxy.Step) error {
				require.Len(t, saved, s.Number+1)
				require.Equal(t, []int64{3, 16}, saved[s.Number].Tensor().Shape())
				require.Equal(t, s.Number == 7, s.Last())
				drawn = append(drawn, s.Tokens())
				return nil
			})
			rows, err := g.Run(context.Background())
			require.NoError(t, err)
			for r, prompt := range prompts {
				want, hidden := uncached(t, m, path, prompt, edited, 8)
				require.Equal(t, want, rows[r][4-len(prompt):], "%s, row %d", name, r)
				for step := range hidden {
					require.InDeltaSlice(t, hidden[step], floats(t, saved[step].Tensor())[16*r:16*(r+1)], 1e-4)
					require.Equal(t, rows[r][4+step], drawn[step][r])
				}
			}
		}
	}
}

func TestGenerateUsesValuesOfEarlierSteps(t *testing.T) {
	m := open(t, enginetest.GPT2)
	var first *proxy.Value
	g := proxy.Generate(m, proxy.Settings{MaxNewTokens: 3}, "w01 w02")
	var last *proxy.Value
	g.Each(func(s *proxy.Step) {
		logits := s.Module("lm_head").Output("")
		if s.Number == 0 {
			first = logits.Save()
			return
		}
		s.Module("lm_head").SetOutput("", s.Call("clone", first.Tensor()))
		last = s.Module("lm_head").Output("").Save()
	})
	rows, err := g.Run(context.Background())
	require.NoError(t, err)
	require.Equal(t, floats(t, first.Tensor()), floats(t, last.Tensor()))
	require.Equal(t, rows[0][2], rows[0][3], "an edit of the head's output changes what is drawn")
	require.Equal(t, rows[0][3], rows[0][4])
}

func TestGenerateSettings(t *testing.T) {
	dir := enginetest.Directory(t, enginetest.GPT2, 1)
	settings := func(file string) proxy.Settings {
		if file != "" {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "generation_config.json"), []byte(file), 0o644))
		}
		m, err := engine.Open(dir, engine.Options{})
		require.NoError(t, err)
		defer func() { require.NoError(t, m.Close()) }()
		s, err := m.GenerationSettings()
		require.NoError(t, err)
		return s
	}
	require.Equal(t, proxy.Settings{MaxNewTokens: 20, LengthPenalty: 1, EarlyStopping: "false"}, settings(""))
	require.Equal(t, proxy.Settings{MaxNewTokens: 7, EOS: []int64{3}, Pad: 3, Sample: true, Temperature: 0.5, TopK: 50,
		LengthPenalty: 2, EarlyStopping: "true", Beams: 4},
		settings(`{"max_new_tokens": 7, "eos_token_id": 3, "do_sample": true, "temperature": 0.5, "length_penalty": 2,
			"early_stopping": true, "num_beams": 4, "top_p": null, "use_cache": true}`))
	require.Equal(t, proxy.Settings{MaxNewTokens: 20, EOS: []int64{3, 4}, Pad: 9, TopK: 2, LengthPenalty: 1, EarlyStopping: "never"},
		settings(`{"eos_token_id": [3, 4], "pad_token_id": 9, "top_k": 2, "early_stopping": "never"}`))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "generation_config.json"), []byte(`{"temperature": "hot"}`), 0o644))
	m, err := engine.Open(dir, engine.Options{})
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	_, err = m.GenerationSettings()
	require.ErrorContains(t, err, "generation_config.json")
}

func TestGenerateEndsAtAnEnd(t *testing.T) {
	m := open(t, enginetest.GPT2)
	plain, err := proxy.Generate(m, proxy.Settings{MaxNewTokens: 6}, "w01 w02").Run(context.Background())
	require.NoError(t, err)
	end := plain[0][4] // at the third step, or before it
	steps := 0
	g := proxy.Generate(m, proxy.Settings{MaxNewTokens: 6, EOS: []int64{end}}, "w01 w02")
	g.After(func(*proxy.Step) error { steps++; return nil })
	rows, err := g.Run(context.Background())
	require.NoError(t, err)
	require.Equal(t, plain[0][:2+steps], rows[0])
	require.Equal(t, end, rows[0][1+steps])
}

func TestGenerateBeams(t *testing.T) {
	m := open(t, enginetest.GPT2)
	s := proxy.Settings{MaxNewTokens: 4, Beams: 3, Returned: 2, LengthPenalty: 1, EarlyStopping: "false"}
	rows, err := proxy.Generate(m, s, "w01 w02", "w03").Run(context.Background())
	require.NoError(t, err)
	require.Len(t, rows, 4)
	g := proxy.Generate(m, s, "w01")
	for range g.Stream(context.Background()) {
		t.Fatal("a beam search was streamed")
	}
	require.ErrorContains(t, g.Err(), "cannot be streamed")
}

func TestStream(t *testing.T) {
	m := open(t, enginetest.GPT2)
	plain, err := proxy.Generate(m, proxy.Settings{MaxNewTokens: 6}, "w01 w02", "w03").Run(context.Background())
	require.NoError(t, err)
	g := proxy.Generate(m, proxy.Settings{MaxNewTokens: 6, EOS: []int64{plain[0][3]}}, "w01 w02", "w03")
	texts := make([]strings.Builder, 2)
	var tokens []int64
	for d := range g.Stream(context.Background()) {
		require.Len(t, tokens, d.Step)
		tokens = append(tokens, d.Tokens[1])
		for r, piece := range d.Text {
			texts[r].WriteString(piece)
		}
	}
	require.NoError(t, g.Err())
	want := plain[1][2:]
	require.Equal(t, want[:len(tokens)], tokens)
	second, err := m.Decode(tokens)
	require.NoError(t, err)
	require.Equal(t, second, texts[1].String())
	first, err := m.Decode(plain[0][2 : 2+strings.Count(texts[0].String(), "w")])
	require.NoError(t, err)
	require.Equal(t, first, texts[0].String(), "padding behind the end is no text")
}

func TestGenerateCancelled(t *testing.T) {
	m := open(t, enginetest.GPT2)
	require.NoError(t, m.Load())
	live := aten.Live()
	ctx, cancel := context.WithCancel(context.Background())
	g := proxy.Generate(m, proxy.Settings{MaxNewTokens: 20}, "w01")
	g.After(func(s *proxy.Step) error {
		if s.Number == 3 {
			cancel()
		}
		return nil
	})
	_, err := g.Run(ctx)
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, fault.Cancelled, fault.As(err).Code)
	require.Equal(t, 4, fault.As(err).Step)
	require.Equal(t, live, aten.Live(), "a cancelled generation left tensors")

	// a reader that leaves
	ctx, cancel = context.WithCancel(context.Background())
	g = proxy.Generate(m, proxy.Settings{MaxNewTokens: 20}, "w01")
	stream := g.Stream(ctx)
	<-stream
	cancel()
	for range stream { // whatever was on its way
	}
	require.ErrorIs(t, g.Err(), context.Canceled)
	require.Equal(t, live, aten.Live())

	// the model goes on
	_, err = proxy.Generate(m, proxy.Settings{MaxNewTokens: 2}, "w01").Run(context.Background())
	require.NoError(t, err)
}

func TestGenerateMistakes(t *testing.T) {
	m := open(t, enginetest.GPT2)
	require.NoError(t, m.Load())
	live := aten.Live()
	two := proxy.Settings{MaxNewTokens: 2}
	failure := func(g *proxy.Generation) *fault.Error {
		_, err := g.Run(context.Background())
		require.Error(t, err)
		require.Equal(t, live, aten.Live())
		e := fault.As(err)
		require.Contains(t, e.Pos.File, "generate_test.go", e)
		return e
	}

	e := failure(proxy.Generate(m, proxy.Settings{MaxNewTokens: 100}, "w01 w02"))
	require.Contains(t, e.Error(), "2 tokens of prompt and 100 new ones")
	require.Contains(t, failure(proxy.Generate(m, proxy.Settings{}, "w01")).Error(), "0 new tokens")
	failure(proxy.Generate(m, two))

	g := proxy.Generate(m, two, "w01")
	g.Each(func(s *proxy.Step) {
		if s.Number == 1 {
			s.Module("transformer.h.7").Output("0").Save()
		}
	})
	e = failure(g)
	require.Equal(t, fault.ModulePath, e.Code)
	require.Equal(t, 1, e.Step)

	g = proxy.Generate(m, two, "w01")
	var before *proxy.Value
	g.Each(func(s *proxy.Step) {
		if s.Number == 1 {
			s.Call("add", before, 1)
		}
		before = s.Module("lm_head").Output("")
	})
	require.Contains(t, failure(g).Error(), "pass its Tensor")

	g = proxy.Generate(m, two, "w01")
	stop := errors.New("enough")
	g.After(func(*proxy.Step) error { return stop })
	_, err := g.Run(context.Background())
	require.ErrorIs(t, err, stop)
	_, err = g.Run(context.Background())
	require.Error(t, err)
	require.Equal(t, live, aten.Live())

	g = proxy.Generate(m, two, "w01")
	_, err = g.Run(context.Background())
	require.NoError(t, err)
	_, err = g.Run(context.Background())
	require.ErrorContains(t, err, "has run")
}

// Memory comes back at every end, whatever the program of a step did.
func TestGenerateLeavesNothing(t *testing.T) {
	m := open(t, enginetest.Llama)
	require.NoError(t, m.Load())
	live := aten.Live()
	r := rand.New(rand.NewPCG(7, 0))
	for range 60 {
		ctx, cancel := context.WithCancel(context.Background())
		g := proxy.GenerateIDs(m, proxy.Settings{MaxNewTokens: 1 + r.IntN(6)}, []int64{1, 2}, []int64{3})
		bad, leave := r.IntN(12), r.IntN(12)
		g.Each(func(s *proxy.Step) {
			h := s.Module("model.layers.0").Output("0")
			s.Module("model.layers.1").Output("0").Save()
			if s.Number == bad {
				h.MatMul(h)
			}
			if s.Number == leave {
				cancel()
			}
		})
		if r.IntN(2) == 0 {
			for range g.Stream(ctx) {
			}
		} else {
			_, _ = g.Run(ctx)
		}
		cancel()
		require.Equal(t, live, aten.Live())
	}
}
