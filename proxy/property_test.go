package proxy_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
	"github.com/nnsight-go/nnsight-go/proxy"
	"github.com/stretchr/testify/require"
)

// both is a value of a trace and what it must be, computed line by line.
type both struct {
	traced *proxy.Value
	real   aten.Tensor
	by     int // the invoke whose line it comes from
	owner  int // the invoke whose activation it may be a view of
	saved  bool
}

// twin records a program and does the same with tensors as it goes.
type twin struct {
	t       *testing.T
	r       *rand.Rand
	invokes []*proxy.Invoke
	values  []both
	lines   []string
}

func (w *twin) line(format string, args ...any) {
	w.lines = append(w.lines, fmt.Sprintf(format, args...))
}

func (w *twin) call(op string, args ...aten.Value) (aten.Tensor, error) {
	found, err := aten.Find("aten::" + op)
	require.NoError(w.t, err)
	v, err := found.Call(args)
	if err == nil {
		require.Equal(w.t, graph.ArgRef, v.Kind)
		w.t.Cleanup(v.Free)
	}
	return v.T, err
}

// step adds one random line to the program of an invoke.
func (w *twin) step(invoke int) {
	pick := func() int { // a value of this invoke or an earlier one
		for {
			if i := w.r.IntN(len(w.values)); w.values[i].by <= invoke {
				return i
			}
		}
	}
	at := pick()
	x := w.values[at]
	in := w.invokes[invoke]
	whole := aten.Value{Kind: graph.ArgEllipsis}
	keep := func(name string, traced *proxy.Value, real aten.Tensor, err error, owner int) {
		require.NoError(w.t, err)
		w.line("v%d = %s  # invoke %d", len(w.values), name, invoke)
		w.values = append(w.values, both{traced: traced, real: real, by: invoke, owner: owner})
	}
	same := func() int { // a value of the same sizes
		for {
			if i := pick(); slices.Equal(w.values[i].real.Shape(), x.real.Shape()) {
				return i
			}
		}
	}
	shape := x.real.Shape()
	switch kind := w.r.IntN(10); kind {
	case 0:
		i := same()
		real, err := w.call("add", aten.TensorValue(x.real), aten.TensorValue(w.values[i].real))
		keep(fmt.Sprintf("v%d + v%d", at, i), in.Call("add", x.traced, w.values[i].traced), real, err, invoke)
	case 1:
		real, err := w.call("mul", aten.TensorValue(x.real), aten.FloatValue(0.75))
		keep(fmt.Sprintf("v%d * 0.75", at), in.Call("mul", x.traced, 0.75), real, err, invoke)
	case 2:
		real, err := w.call("clone", aten.TensorValue(x.real))
		keep(fmt.Sprintf("v%d.clone()", at), in.Call("clone", x.traced), real, err, invoke)
	case 3:
		real, err := w.call("softmax", aten.TensorValue(x.real), aten.IntValue(-1))
		keep(fmt.Sprintf("softmax(v%d)", at), in.Call("softmax", x.traced, -1), real, err, invoke)
	case 4: // a view
		real, err := w.call("transpose", aten.TensorValue(x.real), aten.IntValue(-1), aten.IntValue(-2))
		keep(fmt.Sprintf("v%d.mT", at), in.Call("transpose", x.traced, -1, -2), real, err, x.owner)
	case 5: // a view of a part
		n := shape[1]
		from := w.r.Int64N(n)
		to := from + 1 + w.r.Int64N(n-from)
		slice := aten.Value{Kind: graph.ArgSlice, L: []aten.Value{aten.IntValue(from), aten.IntValue(to), {}}}
		real, err := aten.IndexGet(x.real, aten.Value{Kind: graph.ArgTuple, L: []aten.Value{whole, slice, {Kind: graph.ArgSlice, L: make([]aten.Value, 3)}}})
		require.NoError(w.t, err)
		w.t.Cleanup(real.Free)
		keep(fmt.Sprintf("v%d[..., %d:%d, :]", at, from, to), x.traced.Index(proxy.Ellipsis, proxy.Slice(from, to, nil), proxy.All), real, err, x.owner)
	case 6, 7: // changes in place
		if x.owner != invoke {
			return
		}
		if kind == 6 {
			i := w.r.Int64N(shape[2])
			index := aten.Value{Kind: graph.ArgTuple, L: []aten.Value{whole, aten.IntValue(i)}}
			require.NoError(w.t, aten.IndexSet(x.real, index, aten.FloatValue(float64(len(w.lines)))))
			x.traced.SetIndex(float64(len(w.lines)), proxy.Ellipsis, i)
			w.line("v%d[..., %d] = %d  # invoke %d", at, i, len(w.lines), invoke)
			return
		}
		_, err := w.call("mul_", aten.TensorValue(x.real), aten.FloatValue(1.5))
		require.NoError(w.t, err)
		in.Call("mul_", x.traced, 1.5)
		w.line("v%d *= 1.5  # invoke %d", at, invoke)
	case 8: // a copy into a place
		i := same()
		if x.owner != invoke || aten.CopyInto(x.real, w.values[i].real) != nil { // torch refuses some overlaps
			return
		}
		x.traced.SetIndex(w.values[i].traced, proxy.Ellipsis)
		w.line("v%d[...] = v%d  # invoke %d", at, i, invoke)
	default:
		w.save(at)
	}
}

func (w *twin) save(i int) {
	w.values[i].traced.Save()
	w.values[i].saved = true
	w.line("v%d.save()", i)
}

// A trace gives what the same lines give when they are run one by one: views show changes, copies do
// not, and nothing is dropped that somebody can see.
func TestRandomPrograms(t *testing.T) {
	m := open(t, enginetest.GPT2)
	base := activation(t, m, "w01 w02 w03", "w04 w05 w06")
	for seed := range uint64(600) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			tr := proxy.New(m)
			w := &twin{t: t, r: rand.New(rand.NewPCG(seed, 1))}
			prompts := []string{"w01 w02 w03", "w04 w05 w06"}[:1+w.r.IntN(2)]
			for _, p := range prompts {
				w.invokes = append(w.invokes, tr.Invoke(p))
			}
			for i := range prompts {
				own, err := aten.Clone(base[i])
				require.NoError(t, err)
				t.Cleanup(own.Free)
				w.values = append(w.values, both{traced: w.invokes[i].Module("transformer.h.1").Output("0"), real: own, by: i, owner: i})
			}
			for range 30 {
				w.step(w.r.IntN(len(prompts)))
			}
			for i := range w.values {
				if w.r.IntN(3) == 0 {
					w.save(i)
				}
			}
			var logits []*proxy.Value
			for _, in := range w.invokes {
				logits = append(logits, in.Module("lm_head").Output("").Save())
			}
			estimated(t, m, tr.Graph())
			err := tr.Run(context.Background())
			require.NoError(t, err, strings.Join(w.lines, "\n"))
			for i, v := range w.values {
				if !v.saved {
					continue
				}
				want, err := v.real.Float32s()
				require.NoError(t, err)
				require.Equal(t, v.real.Shape(), v.traced.Tensor().Shape())
				require.InDeltaSlice(t, want, floats(t, v.traced.Tensor()), 1e-3, "v%d of\n%s", i, strings.Join(w.lines, "\n"))
			}
			for i, p := range prompts { // what the model makes of the activation as it was left
				shared, err := w.values[i].real.Share()
				require.NoError(t, err)
				alone := proxy.New(m)
				in := alone.Invoke(p)
				in.Module("transformer.h.1").SetOutput("0", in.Call("clone", shared.Gotorch()))
				want := in.Module("lm_head").Output("").Save()
				run(t, alone)
				require.InDeltaSlice(t, floats(t, want.Tensor()), floats(t, logits[i].Tensor()), 1e-3, strings.Join(w.lines, "\n"))
			}
		})
	}
}

// estimated runs a program, and compares what it takes with what that was estimated to be.
func estimated(t *testing.T, m *engine.Model, g *graph.Graph) {
	m.Protect(true)
	m.LimitWork(1e15)
	defer m.Protect(false)
	var cost *host.Cost
	own := &graph.Graph{Nodes: slices.Clone(g.Nodes), Invokes: slices.Clone(g.Invokes), Positions: g.Positions}
	run, err := m.Begin(own, nil, true, func(c *host.Cost) error { cost = c; return nil })
	require.NoError(t, err)
	defer run.Free()
	_, err = run.Step(0)
	require.NoError(t, err)
	spent := run.Spent()
	_, tensors, err := run.Results()
	require.NoError(t, err)
	bytes := int64(0)
	for _, x := range tensors {
		bytes += x.Bytes()
	}
	aten.FreeAll(tensors)
	require.True(t, cost.Exact)
	require.Equal(t, bytes, cost.Output)
	require.InEpsilon(t, spent, cost.Work, 1e-9)
	require.GreaterOrEqual(t, cost.Peak, bytes/4, "what is saved is there at the end, but for views")
}

// activation gives an activation of each prompt, traced alone.
func activation(t *testing.T, m *engine.Model, prompts ...string) []aten.Tensor {
	var out []aten.Tensor
	for _, p := range prompts {
		tr := proxy.New(m)
		h := tr.Invoke(p).Module("transformer.h.1").Output("0").Save()
		run(t, tr)
		x, err := aten.FromGotorch(h.Tensor())
		require.NoError(t, err)
		t.Cleanup(x.Free)
		out = append(out, x)
	}
	return out
}
