package proxy_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/proxy"
	"github.com/stretchr/testify/require"
)

// place is an access point of the small GPT-2 that holds [batch, seq, 16].
type place struct {
	path string
	in   bool
	leaf string
}

var places = []place{
	{"transformer.wte", false, ""}, {"transformer.drop", false, ""}, {"transformer.h.0", true, "args.0"},
	{"transformer.h.0.attn", false, "0"}, {"transformer.h.0.mlp", false, ""}, {"transformer.h.0", false, "0"},
	{"transformer.h.1", true, "args.0"}, {"transformer.h.1.ln_1", false, ""}, {"transformer.h.1.mlp", false, ""},
	{"transformer.h.1", false, "0"}, {"transformer.h.2", false, "0"}, {"transformer.ln_f", true, "args.0"},
	{"transformer.ln_f", false, ""},
}

// line is one line of a random program: what it does with which earlier values.
type line struct {
	do   string // read, scale, blend, fill, patch, write
	at   int    // read, write: number of a place
	x, y int    // values, counted through all invokes
}

func (l line) String() string { return fmt.Sprintf("%s place %d v%d v%d", l.do, l.at, l.x, l.y) }

// record appends an invoke's lines to a trace. values holds what earlier invokes made: values of the
// same trace, or tensors.
func record(in *proxy.Invoke, lines []line, values map[int]any, first int) (saved []*proxy.Value) {
	module := func(p place) (read func() *proxy.Value, write func(*proxy.Value)) {
		m := in.Module(p.path)
		if p.in {
			return func() *proxy.Value { return m.Input(p.leaf) }, func(v *proxy.Value) { m.SetInput(p.leaf, v) }
		}
		return func() *proxy.Value { return m.Output(p.leaf) }, func(v *proxy.Value) { m.SetOutput(p.leaf, v) }
	}
	last := func(v any) *proxy.Value { // its last token, as something to add to any row
		return in.Call("slice", v, 1, -1)
	}
	next := first
	for _, l := range lines {
		var v *proxy.Value
		switch l.do {
		case "read":
			read, _ := module(places[l.at])
			v = read()
		case "scale":
			v = in.Call("mul", values[l.x], 0.5)
		case "blend":
			v = in.Call("add", values[l.x], last(values[l.y]))
		case "fill":
			values[l.x].(*proxy.Value).SetIndex(0.25, proxy.All, 0)
		case "patch":
			values[l.x].(*proxy.Value).SetIndex(last(values[l.y]), proxy.All, proxy.Slice(-1, nil, nil))
		case "write":
			_, write := module(places[l.at])
			write(values[l.x].(*proxy.Value))
		}
		if v != nil {
			values[next] = v
			saved = append(saved, v.Save())
			next++
		}
	}
	return append(saved, in.Module("lm_head").Output("").Save())
}

// draw makes the lines of one invoke, most of which go forward through the model. Values from first
// on are its own.
func draw(r *rand.Rand, first int) (lines []line, made int) {
	reach := 0
	for range 3 + r.IntN(8) {
		l := line{do: []string{"read", "read", "scale", "blend", "fill", "patch", "write"}[r.IntN(7)]}
		if made == 0 {
			l.do = "read"
		}
		switch l.do {
		case "read", "write":
			l.at = min(reach+r.IntN(3), len(places)-1)
			if r.IntN(8) == 0 {
				l.at = r.IntN(len(places))
			}
			reach = max(reach, l.at)
		}
		if l.do != "read" {
			l.x, l.y = first+made-1, r.IntN(first+made)
			if r.IntN(4) == 0 {
				l.x = first + r.IntN(made)
			}
		}
		if l.do == "read" || l.do == "scale" || l.do == "blend" {
			made++
		}
		lines = append(lines, l)
	}
	return lines, made
}

// Rule 5 of the contract: whatever else is in a trace, an invoke gives what it gives alone, its values
// from earlier invokes being what they are.
func TestInvokesBehaveAsIfAlone(t *testing.T) {
	m := open(t, enginetest.GPT2)
	failed, ran := 0, 0
	for seed := range uint64(1200) {
		r := rand.New(rand.NewPCG(seed, 2))
		var prompts []string
		var programs [][]line
		var firsts []int
		total := 0
		for range 2 + r.IntN(2) {
			prompts = append(prompts, strings.Join([]string{"w01", "w02", "w03", "w04"}[:2+r.IntN(3)], " "))
			lines, made := draw(r, total)
			programs, firsts = append(programs, lines), append(firsts, total)
			total += made
		}
		told := fmt.Sprintf("seed %d, prompts %q, programs %v", seed, prompts, programs)

		// alone, one after the other
		var want [][]float32
		var alone error
		values := map[int]any{}
		for i, p := range prompts {
			tr := proxy.New(m)
			saved := record(tr.Invoke(p), programs[i], values, firsts[i])
			if alone = tr.Run(context.Background()); alone != nil {
				break
			}
			for k, v := range saved {
				want = append(want, floats(t, v.Tensor()))
				if k < len(saved)-1 {
					values[firsts[i]+k] = v.Tensor()
				}
			}
		}
		// together
		tr := proxy.New(m)
		values = map[int]any{}
		var saved []*proxy.Value
		for i, p := range prompts {
			saved = append(saved, record(tr.Invoke(p), programs[i], values, firsts[i])...)
		}
		err := tr.Run(context.Background())
		if alone != nil {
			failed++
			require.Equal(t, fault.OutOfOrder, fault.As(alone).Code, "%v\n%s", alone, told)
			require.Error(t, err, told)
			require.Equal(t, fault.OutOfOrder, fault.As(err).Code, "%v\n%s", err, told)
			continue
		}
		ran++
		require.NoError(t, err, told)
		for k, v := range saved {
			require.InDeltaSlice(t, want[k], floats(t, v.Tensor()), 1e-4, "saved value %d, %s", k, told)
		}
	}
	require.Greater(t, ran, 300)
	require.Greater(t, failed, 50)
}
