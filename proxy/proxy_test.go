package proxy_test

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/proxy"
	"github.com/stretchr/testify/require"
	torch "github.com/wangkuiyi/gotorch"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if n := aten.Live(); n != 0 && code == 0 {
		println("tensors left at the end:", n)
		code = 1
	}
	os.Exit(code)
}

func open(t testing.TB, config string) *engine.Model {
	m, err := engine.Open(enginetest.Directory(t, config, 1), engine.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

func run(t testing.TB, tr *proxy.Trace) {
	t.Helper()
	require.NoError(t, tr.Run(context.Background()))
}

func floats(t testing.TB, x torch.Tensor) []float32 {
	h, err := aten.FromGotorch(x)
	require.NoError(t, err)
	defer h.Free()
	out, err := h.Float32s()
	require.NoError(t, err)
	return out
}

func TestSaveAndEdit(t *testing.T) {
	m := open(t, enginetest.GPT2)
	tr := proxy.New(m)
	in := tr.Invoke("w01 w02 w03")
	hidden := in.Module("transformer.h.1").Output("0").Save()
	logits := in.Module("lm_head").Output("").Save()
	lens := in.Module("lm_head").Call(in.Module("transformer.ln_f").Output("")).Save()
	run(t, tr)
	require.Equal(t, []int64{1, 3, 16}, hidden.Tensor().Shape())
	require.Equal(t, []int64{1, 3, 24}, logits.Tensor().Shape())
	require.Equal(t, floats(t, logits.Tensor()), floats(t, lens.Tensor()))

	// doubling a hidden state in place and by replacement is the same edit
	edited := func(edit func(in *proxy.Invoke)) []float32 {
		tr := proxy.New(m)
		in := tr.Invoke("w01 w02 w03")
		edit(in)
		out := in.Module("lm_head").Output("").Save()
		run(t, tr)
		return floats(t, out.Tensor())
	}
	inPlace := edited(func(in *proxy.Invoke) {
		h := in.Module("transformer.h.1").Output("0")
		h.SetIndex(h.Mul(2), proxy.All)
	})
	replaced := edited(func(in *proxy.Invoke) {
		block := in.Module("transformer.h.1")
		block.SetOutput("0", block.Output("0").Add(block.Output("0")))
	})
	require.Equal(t, inPlace, replaced)
	require.NotEqual(t, floats(t, logits.Tensor()), inPlace)
}

func TestInvokesEqualAlone(t *testing.T) {
	for _, config := range []string{enginetest.GPT2, enginetest.Llama} {
		m := open(t, config)
		prompts := []string{"w01 w02 w03 w04", "w05", "w06 w07"}
		alone := make([][]float32, len(prompts))
		for i, p := range prompts {
			tr := proxy.New(m)
			out := tr.Invoke(p).Module("lm_head").Output("").Save()
			run(t, tr)
			alone[i] = floats(t, out.Tensor())
		}
		tr := proxy.New(m)
		var saved []*proxy.Value
		for _, p := range prompts {
			saved = append(saved, tr.Invoke(p).Module("lm_head").Output("").Save())
		}
		batch := tr.Invoke().Module("lm_head").Output("").Save()
		run(t, tr)
		for i := range prompts {
			require.InDeltaSlice(t, alone[i], floats(t, saved[i].Tensor()), 1e-5)
		}
		require.Equal(t, []int64{3, 4, 24}, batch.Tensor().Shape())
	}
}

func TestConstants(t *testing.T) {
	m := open(t, enginetest.GPT2)
	direction := torch.Full([]int64{16}, 0.5, false)
	tr := proxy.New(m)
	in := tr.InvokeIDs([]int64{1, 2, 3})
	h := in.Module("transformer.h.0").Output("0")
	before := h.Clone().Save()
	h.SetIndex(h.Index(proxy.All, -1).Add(direction), proxy.All, -1)
	after := h.Save()
	top := in.Call("topk", in.Module("lm_head").Output("").Index(0, -1), 3)
	values, ids := top.Item(0).Save(), top.Item(1).Save()
	run(t, tr)
	a, b := floats(t, before.Tensor()), floats(t, after.Tensor())
	for i := range a {
		want := a[i]
		if i >= 32 {
			want += 0.5
		}
		require.InDelta(t, want, b[i], 1e-6)
	}
	require.Equal(t, []int64{3}, values.Tensor().Shape())
	require.Equal(t, []int64{3}, ids.Tensor().Shape())
}

func TestErrors(t *testing.T) {
	m := open(t, enginetest.GPT2)
	for name, c := range map[string]struct {
		record func(tr *proxy.Trace)
		code   fault.Code
		says   string
	}{
		"module": {func(tr *proxy.Trace) { tr.Invoke("w01").Module("transformer.h.9.mlp").Output("").Save() },
			fault.ModulePath, "transformer.h.0.mlp"},
		"leaf": {func(tr *proxy.Trace) { tr.Invoke("w01").Module("transformer.h.1").Output("").Save() },
			fault.ModulePath, "It has: 0"},
		"ids": {func(tr *proxy.Trace) { tr.InvokeIDs([]int64{99}).Module("lm_head").Output("").Save() },
			fault.Input, "vocabulary has ids 0 to 23"},
		"context": {func(tr *proxy.Trace) { tr.InvokeIDs(make([]int64, 33)).Module("lm_head").Output("").Save() },
			fault.Input, "33 tokens; the model's context holds 32"},
		"empty": {func(tr *proxy.Trace) { tr.Invoke("").Module("lm_head").Output("").Save() }, fault.Input, "no tokens"},
		"shapes": {func(tr *proxy.Trace) {
			in := tr.Invoke("w01 w02")
			in.Module("lm_head").Output("").Add(in.Module("transformer.wte").Output("")).Save()
		}, fault.Op, "proxy_test.go"},
		"argument": {func(tr *proxy.Trace) { tr.Invoke("w01").Module("lm_head").Output("").Add(struct{}{}).Save() },
			fault.Graph, "cannot be an argument"},
		"backwards": {func(tr *proxy.Trace) {
			first, second := tr.Invoke("w01"), tr.Invoke("w02")
			v := second.Module("lm_head").Output("")
			first.Call("mul", v, 2).Save()
		}, fault.Graph, "to later ones only"},
		"nothing": {func(tr *proxy.Trace) {
			var v *proxy.Value
			tr.Invoke("w01").Module("lm_head").Output("").Add(v).Save()
		}, fault.Graph, "cannot be an argument"},
		"empty tensor": {func(tr *proxy.Trace) {
			tr.Invoke("w01").Module("lm_head").Output("").Add(torch.Tensor{}).Save()
		}, fault.Graph, "empty gotorch tensor"},
		"no tensor": {func(tr *proxy.Trace) {
			in := tr.Invoke("w01")
			in.Call("topk", in.Module("lm_head").Output(""), 2).Save()
		}, fault.Op, "Of several results, save each"},
		"other trace": {func(tr *proxy.Trace) {
			v := proxy.New(m).Invoke("w01").Module("lm_head").Output("")
			tr.Invoke("w01").Module("lm_head").Output("").Add(v).Save()
		}, fault.Graph, "used in another"},
	} {
		t.Run(name, func(t *testing.T) {
			tr := proxy.New(m)
			c.record(tr)
			live := aten.Live()
			err := tr.Run(context.Background())
			require.Error(t, err)
			require.Equal(t, c.code, fault.As(err).Code, err)
			require.Contains(t, err.Error(), c.says)
			require.Contains(t, fault.As(err).Pos.File, "proxy_test.go", "the error names the user's line: %v", err)
			require.LessOrEqual(t, aten.Live()-live, int64(60), "only the model's parameters may have been loaded")
		})
	}
	tr := proxy.New(m)
	h := tr.Invoke("w01").Module("lm_head").Output("")
	require.Panics(t, func() { h.Tensor() })
	run(t, tr)
	require.ErrorContains(t, tr.Run(context.Background()), "has run")
}

func TestCancel(t *testing.T) {
	m := open(t, enginetest.GPT2)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	tr := proxy.New(m)
	tr.Invoke("w01").Module("lm_head").Output("").Save()
	require.Equal(t, fault.Cancelled, fault.As(tr.Run(ctx)).Code)
}

// A trace that is never run, or that fails, holds nothing of the engine's.
func TestConstantsAreLent(t *testing.T) {
	m := open(t, enginetest.GPT2)
	live := aten.Live()
	record := func() *proxy.Trace {
		tr := proxy.New(m)
		in := tr.Invoke("w01")
		in.Module("lm_head").Output("").Add(torch.Full([]int64{24}, 1, false)).Save()
		return tr
	}
	record()
	require.Equal(t, live, aten.Live())
	tr := record()
	tr.Invoke("w99 w99").Module("no.such").Output("").Save()
	require.Error(t, tr.Run(context.Background()))
	require.Equal(t, live, aten.Live())
}

func TestManyTracesLeakNothing(t *testing.T) {
	m := open(t, enginetest.GPT2)
	var base int64
	for i := range 2000 {
		tr := proxy.New(m)
		in := tr.Invoke("w01 w02")
		in.Module("transformer.h.0").Output("0").SetIndex(0, proxy.All)
		in.Module("lm_head").Output("").Save()
		tr.Invoke("w03").Module("lm_head").Output("").Save()
		run(t, tr)
		if i%500 == 0 {
			settle()
			if i == 500 {
				base = aten.Live()
			} else if i > 500 {
				require.LessOrEqual(t, aten.Live(), base)
			}
		}
	}
}

// settle lets gotorch's finalizers run.
func settle() {
	for range 3 {
		runtime.GC()
		debug.FreeOSMemory()
		time.Sleep(time.Millisecond)
	}
}
