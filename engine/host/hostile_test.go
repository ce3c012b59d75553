package host

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/guard"
	"github.com/stretchr/testify/require"
)

// operator is one that a server runs, and how many arguments it has.
type operator struct {
	name string
	most int
}

func operators(t testing.TB) (list []operator) {
	text, err := os.ReadFile("../guard/operators.txt")
	require.NoError(t, err)
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		list = append(list, operator{fields[0], len(fields) - 1})
	}
	return list
}

// absurd makes programs out of bytes: calls of operators with whatever the bytes say.
type absurd struct {
	program
	ops    []operator
	bytes  []byte
	values []graph.Arg
	huge   bool // some of them would take more memory than there is
}

// next is a number below n.
func (a *absurd) next(n int) int {
	if len(a.bytes) < 2 {
		a.bytes = append(a.bytes, 0, 0)
	}
	k := int(binary.LittleEndian.Uint16(a.bytes)) % n
	a.bytes = a.bytes[2:]
	return k
}

var (
	numbers = []int64{0, 1, 2, -1, 3, 4, -2, 16, 7, 1 << 31, 1<<31 - 1, 1 << 40, math.MaxInt64, math.MinInt64, -1 << 31}
	floats  = []float64{0, 1, -1, .5, math.NaN(), math.Inf(1), math.Inf(-1), 1e308, 1e-320, 2}
	texts   = []string{"floor", "trunc", "mean", "sum", "fro", "nuc", "constant", "reflect", "ij,jk->ik", "i->", "...", "prod", "amax", "tanh", "cpu", "meta", ""}
	dtypes  = []string{"float32", "int64", "bool", "float64", "bfloat16", "complex64", "int8", "uint8", "int32", "float16"}
)

func pick[T any](a *absurd, list []T) T { return list[a.next(len(list))] }

func (a *absurd) arg(depth int) graph.Arg {
	switch k := a.next(20); {
	case k < 9:
		return pick(a, a.values)
	case k < 13:
		return graph.Int(pick(a, numbers))
	case k < 14:
		return graph.Float(pick(a, floats))
	case k < 15:
		return graph.Bool(a.next(2) == 1)
	case k < 16:
		return graph.Null()
	case k < 17 && a.next(2) == 0:
		return graph.Arg{Kind: graph.ArgDType, S: pick(a, dtypes)}
	case k < 17:
		return graph.String(pick(a, texts))
	}
	if depth > 1 {
		return graph.Null()
	}
	list := graph.List()
	for range a.next(4) {
		list.L = append(list.L, a.arg(depth+1))
	}
	return list
}

// build makes a program of a few calls, beginning with some tensors that operators might choke on.
func (a *absurd) build() *graph.Graph {
	a.on([]int64{1, 2, 3}, []int64{4, 5})
	h := a.read("transformer.h.0", "0")
	small := a.call("select", h, graph.Int(0), graph.Int(0))
	a.values = []graph.Arg{
		h, small, a.call("mul", small, graph.Float(math.NaN())), a.call("select", small, graph.Int(0), graph.Int(0)), a.constant(0),
		a.call("full_like", small, graph.Int(math.MinInt64)), a.call("to", small, graph.Arg{Kind: graph.ArgDType, S: "int64"}),
		a.call("zeros", graph.List(graph.Int(0), graph.Int(3))), a.call("arange", graph.Int(4)), a.call("full", graph.List(graph.Int(3)), graph.Int(math.MinInt64)),
		a.call("expand", a.call("ones", graph.List(graph.Int(1))), graph.List(graph.Int(4), graph.Int(4))),
		a.call("zeros", graph.List(graph.Int(1), graph.Int(2), graph.Int(4), graph.Int(4))), a.call("sum", small),
	}
	if a.huge {
		a.values = append(a.values, a.call("zeros", graph.List(graph.Int(1<<31), graph.Int(3))), a.call("ones", graph.List(graph.Int(2), graph.Int(1<<40))),
			a.call("expand", small, graph.List(graph.Int(1<<20), graph.Int(3), graph.Int(16))), a.call("arange", graph.Int(1<<40)))
	}
	for range 1 + a.next(2) {
		op := pick(a, a.ops)
		args := []graph.Arg{pick(a, a.values)}
		for range a.next(op.most) {
			args = append(args, a.arg(0))
		}
		out := a.add(graph.Node{Kind: graph.KindCall, Op: op.name, Args: args})
		a.save(out)
		switch a.next(6) {
		case 0:
			a.fill(out, 1)
		case 1:
			a.add(graph.Node{Kind: graph.KindSetIndex, Args: []graph.Arg{pick(a, a.values), a.index(), a.arg(2)}})
		case 2:
			a.save(a.add(graph.Node{Kind: graph.KindIndex, Args: []graph.Arg{pick(a, a.values), a.index()}}))
		case 3:
			a.write("transformer.h.1", "0", out)
		}
		a.values = append(a.values, out)
	}
	a.save(a.read("lm_head", ""))
	return &a.Graph
}

func (a *absurd) index() graph.Arg {
	if a.next(3) == 0 {
		return graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{a.arg(2), a.arg(2), a.arg(2)}}
	}
	if i := a.arg(0); i.Kind != graph.ArgFloat && i.Kind != graph.ArgDType {
		return i
	}
	return graph.Null()
}

// hostile is a model that strangers use, and what must not change of it.
type hostile struct {
	model *Native
	ops   []operator
}

func newHostile(t testing.TB) *hostile {
	m := open(t, enginetest.GPT2)
	m.Protect(true)
	require.NoError(t, aten.CapMemory(256<<20))
	t.Cleanup(func() { require.NoError(t, aten.CapMemory(-1)) })
	return &hostile{model: m, ops: operators(t)}
}

// try runs what the bytes say, if a server would.
func (h *hostile) try(t testing.TB, data []byte) (ran bool) {
	a := &absurd{ops: h.ops, bytes: data}
	g := a.build()
	wire := graph.Encode(g)
	back, err := graph.Decode(wire)
	require.NoError(t, err)
	if err := guard.Check(back); err != nil {
		require.Equal(t, fault.Remote, fault.As(err).Code)
		return false
	}
	w, err := h.model.Constant(vector)
	require.NoError(t, err)
	live := aten.Live() - 1
	var cost *Cost
	r, err := h.model.BeginBytes(wire, []aten.Tensor{w}, true, func(c *Cost) error { cost = c; return nil })
	if err != nil {
		require.Equal(t, live, aten.Live())
		return false
	}
	if _, err = r.Step(0); err == nil {
		_, tensors, err := r.Results()
		require.NoError(t, err)
		output := int64(0)
		for _, x := range tensors {
			output += x.Bytes()
		}
		aten.FreeAll(tensors)
		if cost.Exact {
			require.Equal(t, output, cost.Output, "%s", g)
		}
	}
	r.Free()
	require.Equal(t, live, aten.Live())
	return err == nil
}

// intact holds that nothing of the model has changed, and that it still answers.
func (h *hostile) intact(t testing.TB, want [][]float32, weights []float32) {
	require.Equal(t, want, finish(t, h.model, logits(1, 2, 3)))
	require.Equal(t, weights, h.weight(t))
}

func (h *hostile) weight(t testing.TB) []float32 {
	w, err := h.model.Constant(vector)
	require.NoError(t, err)
	defer w.Free()
	numbers, err := w.Float32s()
	require.NoError(t, err)
	return numbers
}

// rounds is how many programs are tried.
func rounds() int {
	if n, err := strconv.Atoi(os.Getenv("NNSIGHT_GO_ABSURD")); err == nil {
		return n
	}
	return 3000
}

// TestAbsurdCalls runs many small programs of nonsense. None of them ends the process, changes a weight or
// leaves a tensor behind.
func TestAbsurdCalls(t *testing.T) {
	h := newHostile(t)
	want, weights := finish(t, h.model, logits(1, 2, 3)), h.weight(t)
	r, ran := rand.New(rand.NewPCG(1, 2)), 0
	for range rounds() {
		data := make([]byte, 64)
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		if h.try(t, data) {
			ran++
		}
	}
	require.Greater(t, ran, 100)
	h.intact(t, want, weights)
}

// errJudged ends a run before it begins.
var errJudged = fault.New(fault.Remote, "judged")

// TestAbsurdEstimates estimates programs of nonsense, of tensors larger than any memory, and runs none: it takes no time and
// no memory to say so.
func TestAbsurdEstimates(t *testing.T) {
	h := newHostile(t)
	r, judged := rand.New(rand.NewPCG(3, 4)), 0
	before := aten.PeakAllocated()
	for range rounds() {
		data := make([]byte, 64)
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		a := &absurd{ops: h.ops, bytes: data, huge: true}
		g := a.build()
		if guard.Check(g) != nil {
			continue
		}
		w, err := h.model.Constant(vector)
		require.NoError(t, err)
		live, begun := aten.Live()-1, time.Now()
		_, err = h.model.Begin(g, []aten.Tensor{w}, true, func(*Cost) error { judged++; return errJudged })
		require.Error(t, err)
		require.Equal(t, live, aten.Live())
		require.Less(t, time.Since(begun), 5*time.Second, "%s", g)
		require.Less(t, aten.PeakAllocated()-before, int64(1<<20), "%s", g)
	}
	require.Greater(t, judged, 100)
}

// FuzzRun is [TestAbsurdCalls] for bytes that a fuzzer finds.
func FuzzRun(f *testing.F) {
	h := newHostile(f)
	want, weights := finish(f, h.model, logits(1, 2, 3)), h.weight(f)
	f.Add([]byte{})
	f.Add([]byte("operators, numbers and places out of these"))
	f.Fuzz(func(t *testing.T, data []byte) {
		h.try(t, data)
		h.intact(t, want, weights)
	})
}
