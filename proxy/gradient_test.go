package proxy_test

import (
	"context"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/proxy"
	"github.com/stretchr/testify/require"
	torch "github.com/wangkuiyi/gotorch"
)

// loss is a number that a prompt gives, with one hidden state moved a little along one axis.
func loss(t *testing.T, m *engine.Model, path string, token, axis int, by float64) float64 {
	tr := proxy.New(m)
	in := tr.InvokeIDs([]int64{1, 2, 3, 4})
	h := in.Module(path).Output("0")
	h.SetIndex(h.Index(0, token, axis).Add(by), 0, token, axis)
	out := in.Module("lm_head").Output("").Index(0, -1).Call("logsumexp", []int64{-1}).Save()
	run(t, tr)
	return float64(floats(t, out.Tensor())[0])
}

func TestGradientsAreThoseOfDifferences(t *testing.T) {
	for _, config := range []string{enginetest.GPT2, enginetest.Llama} {
		m := open(t, config)
		blocks, layers := blocks(config)
		tr := proxy.New(m)
		in := tr.InvokeIDs([]int64{1, 2, 3, 4})
		var states, grads []*proxy.Value
		for layer := range layers {
			states = append(states, in.Module(blocks+string(rune('0'+layer))).Output("0"))
		}
		b := in.Module("lm_head").Output("").Index(0, -1).Call("logsumexp", []int64{-1}).Backward(proxy.BackwardOptions{})
		for _, h := range states {
			grads = append(grads, b.Grad(h).Save())
		}
		run(t, tr)
		for layer := range layers {
			require.Equal(t, []int64{1, 4, 16}, grads[layer].Tensor().Shape())
			got := floats(t, grads[layer].Tensor())
			for _, place := range [][2]int{{0, 3}, {2, 7}, {3, 15}} {
				path, eps := blocks+string(rune('0'+layer)), 1e-2
				want := (loss(t, m, path, place[0], place[1], eps) - loss(t, m, path, place[0], place[1], -eps)) / (2 * eps)
				require.InDelta(t, want, got[16*place[0]+place[1]], 2e-3)
			}
		}
	}
}

func TestGradientsThatAreChanged(t *testing.T) {
	m := open(t, enginetest.GPT2)
	record := func(change func(b *proxy.Backward, last *proxy.Value)) []float32 {
		tr := proxy.New(m)
		in := tr.InvokeIDs([]int64{1, 2, 3})
		first, last := in.Module("transformer.h.0").Output("0"), in.Module("transformer.h.2").Output("0")
		b := in.Module("lm_head").Output("").Call("sum").Backward(proxy.BackwardOptions{})
		change(b, last)
		grad := b.Grad(first).Save()
		b.End()
		b.End()
		run(t, tr)
		return floats(t, grad.Tensor())
	}
	plain := record(func(*proxy.Backward, *proxy.Value) {})
	doubled := record(func(b *proxy.Backward, last *proxy.Value) { b.SetGrad(last, b.Grad(last).Mul(2)) })
	inPlace := record(func(b *proxy.Backward, last *proxy.Value) { b.Grad(last).Call("mul_", 2) })
	zero := record(func(b *proxy.Backward, last *proxy.Value) { b.Grad(last).SetIndex(0.0, proxy.All) })
	for i := range plain {
		require.InDelta(t, 2*plain[i], doubled[i], 1e-4)
		require.InDelta(t, doubled[i], inPlace[i], 1e-6)
		require.Zero(t, zero[i])
	}
}

func TestGradientsOfTensorsFromOutside(t *testing.T) {
	m := open(t, enginetest.GPT2)
	live := aten.Live()
	steering := torch.Full([]int64{16}, 0, true)
	tr := proxy.New(m)
	in := tr.InvokeIDs([]int64{1, 2, 3})
	h := in.Module("transformer.h.1").Output("0").Save().RetainGrad()
	h.SetIndex(h.Add(steering), proxy.All)
	in.Module("lm_head").Output("").Call("sum").Backward(proxy.BackwardOptions{})
	run(t, tr)
	of, through := floats(t, steering.Grad()), floats(t, h.Tensor().Grad())
	for axis := range 16 {
		require.InDelta(t, through[axis]+through[16+axis]+through[32+axis], of[axis], 1e-4)
	}
	require.NoError(t, m.Load())
	require.GreaterOrEqual(t, aten.Live(), live)
}

func TestGradientMistakes(t *testing.T) {
	m := open(t, enginetest.GPT2)
	require.NoError(t, m.Load())
	live := aten.Live()
	for name, c := range map[string]struct {
		record func(in *proxy.Invoke)
		code   fault.Code
		says   string
	}{
		"indices": {func(in *proxy.Invoke) {
			h := in.Module("transformer.h.1").Output("0")
			in.Module("lm_head").Output("").Argmax(-1).Backward(proxy.BackwardOptions{}).Grad(h).Save()
		}, fault.Gradient, "int64"},
		"ids": {func(in *proxy.Invoke) {
			ids := in.Module("transformer.wte").Input("args.0")
			in.Module("lm_head").Output("").Call("sum").Backward(proxy.BackwardOptions{}).Grad(ids).Save()
		}, fault.Gradient, "has no gradient"},
		"too late": {func(in *proxy.Invoke) {
			first, last := in.Module("transformer.h.0").Output("0"), in.Module("transformer.h.2").Output("0")
			b := in.Module("lm_head").Output("").Call("sum").Backward(proxy.BackwardOptions{})
			b.Grad(first).Save()
			b.SetGrad(last, b.Grad(last).Mul(0))
		}, fault.OutOfOrder, "after one was read that depends on it"},
		"no part": {func(in *proxy.Invoke) {
			first, last := in.Module("transformer.h.0").Output("0"), in.Module("transformer.h.2").Output("0")
			first.Call("sum").Backward(proxy.BackwardOptions{}).Grad(last).Save()
		}, fault.Gradient, "takes part in autograd"},
		"ended": {func(in *proxy.Invoke) {
			h := in.Module("transformer.h.0").Output("0")
			b := in.Module("lm_head").Output("").Call("sum").Backward(proxy.BackwardOptions{})
			b.End()
			b.Grad(h).Save()
		}, fault.OutOfOrder, "when its backward pass has ended"},
	} {
		tr := proxy.New(m)
		c.record(tr.InvokeIDs([]int64{1, 2, 3}))
		err := tr.Run(context.Background())
		require.Error(t, err, name)
		e := fault.As(err)
		require.Equal(t, c.code, e.Code, "%s: %v", name, err)
		require.Contains(t, e.Message, c.says, name)
		require.Contains(t, e.Pos.File, "gradient_test.go", "%s: %v", name, err)
		require.Equal(t, live, aten.Live(), name)
	}
}
