package host

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
	"github.com/stretchr/testify/require"
)

// TestMain holds the count of tensors to zero at the end.
func TestMain(m *testing.M) {
	code := m.Run()
	if n := aten.Live(); n != 0 && code == 0 {
		println("tensors left at the end:", n)
		code = 1
	}
	os.Exit(code)
}

// wide is a GPT-2 whose forward takes long enough to be interrupted.
const wide = `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12, "n_head": 4, "n_embd": 64,
	"n_positions": 512, "vocab_size": 24}`

// open opens a small model with its weights mapped.
func open(t testing.TB, config string) *Native {
	m, err := Open(enginetest.Directory(t, config, 1), Options{Load: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

// program records a trace node by node.
type program struct {
	graph.Graph
	invoke int32
}

// on begins an invoke; without rows it sees the whole batch.
func (p *program) on(rows ...[]int64) {
	p.Invokes = append(p.Invokes, graph.Invoke{Rows: rows})
	p.invoke = int32(len(p.Invokes) - 1)
}

func (p *program) add(n graph.Node) graph.Arg {
	n.Invoke, n.Pos = p.invoke, int32(len(p.Positions))
	p.Positions = append(p.Positions, fault.Pos{File: "user.py", Line: len(p.Positions) + 1})
	p.Nodes = append(p.Nodes, n)
	return graph.Ref(graph.ID(len(p.Nodes) - 1))
}

func (p *program) read(path, leaf string) graph.Arg {
	return p.add(graph.Node{Kind: graph.KindRead, Path: path, Port: graph.PortOutput, Leaf: leaf})
}

func (p *program) write(path, leaf string, v graph.Arg) {
	p.add(graph.Node{Kind: graph.KindWrite, Path: path, Port: graph.PortOutput, Leaf: leaf, Args: []graph.Arg{v}})
}

func (p *program) call(op string, args ...graph.Arg) graph.Arg {
	return p.add(graph.Node{Kind: graph.KindCall, Op: "aten::" + op, Args: args})
}

func (p *program) item(v graph.Arg, i int64) graph.Arg {
	return p.add(graph.Node{Kind: graph.KindItem, Args: []graph.Arg{v, graph.Int(i)}})
}

func (p *program) fill(v graph.Arg, x float64) {
	p.add(graph.Node{Kind: graph.KindSetIndex, Args: []graph.Arg{v, {Kind: graph.ArgEllipsis}, graph.Float(x)}})
}

func (p *program) constant(index int32) graph.Arg {
	return p.add(graph.Node{Kind: graph.KindConst, Index: index})
}

func (p *program) save(v graph.Arg) {
	p.add(graph.Node{Kind: graph.KindSave, Args: []graph.Arg{v}})
}

// logits is a trace of one prompt that saves the logits.
func logits(ids ...int64) *program {
	p := &program{}
	p.on(ids)
	p.save(p.read("lm_head", ""))
	return p
}

// finish runs a trace to its end and gives the numbers of the tensors it saved.
func finish(t testing.TB, m *Native, p *program, consts ...aten.Tensor) [][]float32 {
	t.Helper()
	r, err := m.Start(&p.Graph, consts)
	require.NoError(t, err)
	return finished(t, r)
}

// finished steps a run to its end and gives what it saved.
func finished(t testing.TB, r *Run) [][]float32 {
	t.Helper()
	done, err := r.Step(0)
	require.NoError(t, err)
	require.True(t, done)
	_, tensors, err := r.Results()
	require.NoError(t, err)
	out := make([][]float32, len(tensors))
	for i, x := range tensors {
		out[i], err = x.Float32s()
		require.NoError(t, err)
		x.Free()
	}
	return out
}

func full(t testing.TB, x float32, n int64) aten.Tensor {
	c, err := aten.FromFloat32s(slices.Repeat([]float32{x}, int(n)), n)
	require.NoError(t, err)
	return c
}

// ids are tokens of the small models' vocabulary.
func ids(n int) []int64 {
	out := make([]int64, n)
	for i := range out {
		out[i] = int64(i % 24)
	}
	return out
}

func TestRunsLeaveNothingBehind(t *testing.T) {
	m := open(t, enginetest.GPT2)
	failing := func() *program { // in the middle: two layers have run, one has not
		p := &program{}
		p.on(ids(3))
		h := p.read("transformer.h.1", "0")
		p.save(p.call("add", h, p.read("transformer.h.0.mlp.c_fc", "")))
		p.save(p.read("lm_head", ""))
		return p
	}
	start := func(p *program) *Run {
		r, err := m.Start(&p.Graph, []aten.Tensor{full(t, 1, 4)})
		require.NoError(t, err)
		return r
	}
	for name, try := range map[string]func(){
		"success": func() { finish(t, m, logits(1, 2, 3), full(t, 1, 4)) },
		"an error in the middle": func() {
			r := start(failing())
			_, err := r.Step(0)
			require.Error(t, err)
			r.Free()
		},
		"an error at the start": func() {
			p := logits(99)
			_, err := m.Start(&p.Graph, []aten.Tensor{full(t, 1, 4)})
			require.Error(t, err)
		},
		"freed before its end": func() {
			r := start(logits(1, 2, 3))
			done, err := r.Step(1)
			require.NoError(t, err)
			require.False(t, done)
			r.Free()
			r.Free()
		},
		"never stepped":  func() { start(logits(1)).Free() },
		"results untold": func() { r := start(logits(1)); _, err := r.Step(0); require.NoError(t, err); r.Free() },
		"a panic": func() {
			r := start(logits(1, 2, 3))
			_, err := r.Step(1)
			require.NoError(t, err)
			in := r.machine.Next()
			in.Op, in.Args = plan.OpSetIndex, nil // which looks at its arguments
			require.Panics(t, func() { _, _ = r.Step(0) })
			_, err = r.Step(0)
			require.ErrorContains(t, err, "has ended")
		},
	} {
		t.Run(name, func(t *testing.T) {
			live, mode := aten.Live(), aten.CurrentMode()
			try()
			require.Equal(t, live, aten.Live())
			require.Equal(t, mode, aten.CurrentMode())
			require.Zero(t, m.runs)
			finish(t, m, logits(1)) // the model can be used as before
		})
	}
}

func TestErrorsTellWhere(t *testing.T) {
	m := open(t, enginetest.GPT2)
	p := &program{}
	p.on(ids(3))
	p.save(p.read("lm_head", ""))
	h := p.read("transformer.h.1", "0")
	sum := p.call("add", h, p.read("transformer.h.0.mlp.c_fc", ""))
	p.save(sum)
	r, err := m.Start(&p.Graph, nil)
	require.NoError(t, err)
	_, err = r.Step(0)
	e := fault.As(err)
	require.Equal(t, fault.Op, e.Code)
	require.Equal(t, "aten::add", e.Op)
	require.Equal(t, int(sum.Ref), e.Node)
	require.Equal(t, 0, e.Invoke)
	require.Equal(t, fault.Pos{File: "user.py", Line: int(sum.Ref) + 1}, e.Pos)
	require.Contains(t, e.Error(), "float32 [1 3 16], float32 [1 3 64]")

	// a replacement of other sizes is blamed for what fails after it, inside the model
	p = &program{}
	p.on(ids(3))
	p.write("transformer.h.0.mlp", "", p.call("narrow", p.read("transformer.h.0.mlp", ""), graph.Int(2), graph.Int(0), graph.Int(5)))
	write := len(p.Nodes) - 1
	p.save(p.read("lm_head", ""))
	r, err = m.Start(&p.Graph, nil)
	require.NoError(t, err)
	_, err = r.Step(0)
	e = fault.As(err)
	require.Equal(t, "transformer.h.0", e.Path, "the module whose operator failed")
	require.Equal(t, write, e.Node)
	require.Equal(t, write+1, e.Pos.Line)
	require.Contains(t, e.Message, "had sizes [1 3 16], by one of sizes [1 3 5]")
}

// Ctrl-C is looked at between steps.
func TestStepKeepsToItsBudget(t *testing.T) {
	m := open(t, wide)
	p := logits(ids(512)...)
	r, err := m.Start(&p.Graph, nil)
	require.NoError(t, err)
	const budget = 5 * time.Millisecond
	var took []time.Duration
	for done := false; !done; {
		begun := time.Now()
		done, err = r.Step(budget)
		require.NoError(t, err)
		took = append(took, time.Since(begun))
	}
	r.Free()
	slices.Sort(took)
	require.Greater(t, len(took), 2, "the forward is long enough to be paused: %v", took)
	require.Less(t, took[len(took)/2], 100*time.Millisecond, "steps took %v", took)
}

func TestCancelledInTheMiddle(t *testing.T) {
	m := open(t, enginetest.GPT2)
	want := finish(t, m, logits(1, 2, 3))
	live := aten.Live()
	for steps := range 40 { // wherever it stops
		p := logits(1, 2, 3)
		r, err := m.Start(&p.Graph, nil)
		require.NoError(t, err)
		for range steps {
			_, err := r.Step(1) // a nanosecond: one instruction
			require.NoError(t, err)
		}
		_, _, err = r.Results()
		require.ErrorContains(t, err, "not done yet")
		r.Free()
		require.Equal(t, live, aten.Live())
	}
	require.Equal(t, want, finish(t, m, logits(1, 2, 3)))
}

func TestResultsMoveOut(t *testing.T) {
	m := open(t, enginetest.GPT2)
	p := logits(1)
	r, err := m.Start(&p.Graph, nil)
	require.NoError(t, err)
	_, err = r.Step(0)
	require.NoError(t, err)
	results, tensors, err := r.Results()
	require.NoError(t, err)
	require.Len(t, results, 1)
	require.Len(t, tensors, 1)
	tensors[0].Free()
	results, tensors, err = r.Results()
	require.NoError(t, err)
	require.Empty(t, results)
	require.Empty(t, tensors)
}

// A run that goes on takes what it is given with it, wherever it ends.
func TestExtendedRunsLeaveNothingBehind(t *testing.T) {
	m := open(t, enginetest.GPT2)
	live := aten.Live()
	begin := func() (*Run, *program) {
		p := &program{}
		p.on(ids(3))
		p.save(p.read("transformer.h.0", "0"))
		r, err := m.Begin(&p.Graph, []aten.Tensor{full(t, 1, 16)}, false)
		require.NoError(t, err)
		return r, p
	}
	more := func(r *Run, says func(p *program)) error {
		return r.Extend(func(g *graph.Graph) error {
			p := &program{Graph: *g}
			says(p)
			*g = p.Graph
			return nil
		}, []aten.Tensor{full(t, 1, 16)}, true)
	}
	rest := func(p *program) {
		p.fill(graph.Ref(0), 2)
		p.save(p.call("add", p.read("transformer.h.2", "0"), p.constant(1)))
	}
	step := func(r *Run) {
		_, err := r.Step(0)
		require.NoError(t, err)
	}
	for name, try := range map[string]func(r *Run){
		"to the end": func(r *Run) {
			step(r)
			_, tensors, err := r.Results()
			require.NoError(t, err)
			require.NoError(t, more(r, rest))
			step(r)
			_, again, err := r.Results()
			require.NoError(t, err)
			for _, x := range append(tensors, again...) {
				x.Free()
			}
			require.ErrorContains(t, more(r, rest), "has ended")
		},
		"too early": func(r *Run) { require.ErrorContains(t, more(r, rest), "not done yet") },
		"after its end": func(r *Run) {
			r.Free()
			require.ErrorContains(t, more(r, rest), "has ended")
		},
		"with nonsense": func(r *Run) {
			step(r)
			require.Error(t, more(r, func(p *program) { p.read("no.such", "") }))
			require.ErrorContains(t, more(r, rest), "has ended")
		},
		"a panic": func(r *Run) {
			step(r)
			require.Panics(t, func() { _ = more(r, func(*program) { panic("a bug") }) })
		},
		"an error of an operator": func(r *Run) {
			step(r)
			require.NoError(t, more(r, func(p *program) { p.save(p.call("add", graph.Ref(0), p.read("lm_head", ""))) }))
			_, err := r.Step(0)
			require.Equal(t, fault.Op, fault.As(err).Code)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := begin()
			try(r)
			r.Free()
			require.Equal(t, live, aten.Live())
			require.Zero(t, m.runs)
		})
	}
}

// An invoke whose value was wanted early goes on with a value of one that begins later, and then hands
// its own to a third. Where the third shares the later one's pass, the pass must wait for it; where it
// would come too late, it must not share the pass.
func TestValuesThroughAnEarlierPass(t *testing.T) {
	m := open(t, enginetest.GPT2)
	for name, c := range map[string]struct {
		begin func(p *program) []graph.Arg // up to the value that is wanted early
		rest  func(p *program, values []graph.Arg)
	}{
		"too late": {
			func(p *program) []graph.Arg {
				p.on(ids(3))
				v0 := p.call("slice", p.read("transformer.h.0.mlp", ""), graph.Int(1), graph.Int(-1))
				p.on(ids(1))
				v1 := p.read("transformer.drop", "")
				v2 := p.call("mul", v1, graph.Float(2))
				p.save(v1)
				return []graph.Arg{v0, v2}
			},
			func(p *program, values []graph.Arg) {
				v0, v2 := values[0], values[1]
				p.call("add_", p.read("transformer.h.1.mlp", ""), v0)
				p.call("sub_", v2, graph.Float(0.5))
				p.on(ids(2))
				p.call("add_", p.read("transformer.h.0.attn", "0"), v2)
				p.save(p.read("lm_head", ""))
			},
		},
		"in time": {
			func(p *program) []graph.Arg {
				p.on(ids(3))
				v0, logits := p.read("transformer.h.0.ln_2", ""), p.read("lm_head", "")
				p.on(ids(1))
				p.save(p.read("transformer.drop", ""))
				return []graph.Arg{v0, logits}
			},
			func(p *program, values []graph.Arg) {
				v1 := p.call("sum", values[0])
				p.on(ids(2))
				p.call("add_", p.read("transformer.h.0.ln_2", ""), v1)
				p.save(p.read("lm_head", ""))
				p.invoke = 0
				p.save(values[1])
			},
		},
		"in time, and further on": {
			func(p *program) []graph.Arg {
				p.on(ids(3))
				v0, logits := p.read("transformer.h.0.ln_1", ""), p.read("lm_head", "")
				p.on(ids(1))
				p.save(p.read("transformer.drop", ""))
				return []graph.Arg{v0, logits}
			},
			func(p *program, values []graph.Arg) {
				p.save(p.call("sum", values[0]))
				v2 := p.read("transformer.h.0.attn.c_proj", "")
				p.on(ids(2))
				p.call("add_", p.read("transformer.h.0.attn.c_proj", ""), v2)
				p.save(p.read("lm_head", ""))
				p.invoke = 0
				p.save(values[1])
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := &program{}
			c.rest(p, c.begin(p))
			want := finish(t, m, p)

			p = &program{}
			values := c.begin(p)
			r, err := m.Begin(&p.Graph, nil, false)
			require.NoError(t, err)
			defer r.Free()
			_, err = r.Step(0)
			require.NoError(t, err)
			require.NoError(t, r.Extend(func(g *graph.Graph) error {
				p := &program{Graph: *g, invoke: 1}
				c.rest(p, values)
				*g = p.Graph
				return nil
			}, nil, true))
			_, err = r.Step(0)
			require.NoError(t, err)
			_, tensors, err := r.Results()
			require.NoError(t, err)
			require.Len(t, tensors, len(want)-1)
			for i, tensor := range tensors {
				got, err := tensor.Float32s()
				require.NoError(t, err)
				tensor.Free()
				require.InDeltaSlice(t, want[i+1], got, 1e-4)
			}
		})
	}
}

// A value that is wanted early is as all invokes have left it, whoever owns it.
func TestValuesThatOtherInvokesChanged(t *testing.T) {
	m := open(t, enginetest.GPT2)
	p := &program{}
	p.on(ids(3))
	v := p.call("mul", p.read("transformer.h.0", "0"), graph.Float(2))
	view := p.call("slice", v, graph.Int(1), graph.Int(-1))
	p.on(ids(2))
	p.fill(view, 7)
	p.invoke = 0
	p.save(view)
	r, err := m.Begin(&p.Graph, nil, false)
	require.NoError(t, err)
	defer r.Free()
	_, err = r.Step(0)
	require.NoError(t, err)
	_, tensors, err := r.Results()
	require.NoError(t, err)
	require.Len(t, tensors, 1)
	defer tensors[0].Free()
	got, err := tensors[0].Float32s()
	require.NoError(t, err)
	for _, x := range got {
		require.Equal(t, float32(7), x)
	}
}

func TestConcurrentRuns(t *testing.T) {
	m, err := Open(enginetest.Directory(t, enginetest.GPT2, 1), Options{}) // the first run loads the weights
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	trace := func(k int) *program {
		p := &program{}
		p.on(ids(2 + k))
		p.fill(p.read("transformer.h.0", "0"), float64(k))
		p.save(p.read("lm_head", ""))
		p.on(ids(1 + k))
		p.save(p.read("transformer.h.2", "0"))
		return p
	}
	const users, rounds = 8, 12
	got := make([][][][]float32, users)
	var wait sync.WaitGroup
	for k := range users {
		wait.Go(func() {
			for range rounds {
				r, err := m.Start(&trace(k).Graph, nil)
				if err != nil {
					t.Error(err)
					return
				}
				for done := false; !done; {
					if done, err = r.Step(time.Microsecond); err != nil { // many short steps, from any thread
						t.Error(err)
						return
					}
					runtime.Gosched()
				}
				_, tensors, err := r.Results()
				if err != nil {
					t.Error(err)
					return
				}
				var one [][]float32
				for _, x := range tensors {
					data, err := x.Float32s()
					if err != nil {
						t.Error(err)
					}
					one = append(one, data)
					x.Free()
				}
				got[k] = append(got[k], one)
			}
		})
	}
	wait.Wait()
	for k := range users {
		want := finish(t, m, trace(k))
		require.Len(t, got[k], rounds)
		for _, one := range got[k] {
			require.Len(t, one, len(want))
			for i := range want {
				require.InDeltaSlice(t, want[i], one[i], 1e-4) // how a product is cut up depends on the threads at hand
			}
		}
	}
}

func TestCloseWaitsForRuns(t *testing.T) {
	live := aten.Live()
	m, err := Open(enginetest.Directory(t, enginetest.GPT2, 1), Options{})
	require.NoError(t, err)
	want := finish(t, m, logits(1, 2, 3))
	weight, err := m.Parameter("lm_head.weight")
	require.NoError(t, err)
	p := logits(1, 2, 3)
	r, err := m.Start(&p.Graph, nil)
	require.NoError(t, err)
	_, err = r.Step(1)
	require.NoError(t, err)
	require.NoError(t, m.Close())
	require.NoError(t, m.Close())
	_, err = m.Start(&p.Graph, nil)
	require.ErrorContains(t, err, "has been closed")
	_, err = m.Parameter("lm_head.weight")
	require.ErrorContains(t, err, "has been closed")
	done, err := r.Step(0)
	require.NoError(t, err)
	require.True(t, done)
	_, tensors, err := r.Results()
	require.NoError(t, err)
	got, err := tensors[0].Float32s()
	require.NoError(t, err)
	require.Equal(t, want[0], got)
	tensors[0].Free()
	require.Equal(t, live+1, aten.Live(), "the weights went with the last run")
	_, err = weight.Float32s()
	require.NoError(t, err, "what was handed out stays")
	weight.Free()
}

// Several results inside one of several results.
func TestNestedResults(t *testing.T) {
	m := open(t, enginetest.GPT2)
	live := aten.Live()
	p := &program{}
	p.on(ids(3))
	h := p.call("reshape", p.read("transformer.h.0", "0"), graph.List(graph.Int(-1), graph.Int(2)))
	bins := graph.List(graph.Int(2), graph.Int(3))
	both := p.call("histogramdd", h, bins)
	edges := p.item(both, 1)
	p.save(p.item(edges, 0))
	p.save(edges)
	p.save(p.item(both, 0))
	out := finish(t, m, p)
	require.Equal(t, live, aten.Live())
	require.Len(t, out, 4)
	require.Len(t, out[0], 3)
	require.Equal(t, out[0], out[1])
	require.Len(t, out[2], 4)
	require.Len(t, out[3], 6)
}

// Rows are padded to the longest: a few hostile bytes must not ask for a terabyte.
func TestLopsidedBatch(t *testing.T) {
	m := open(t, wide)
	p := &program{}
	rows := slices.Repeat([][]int64{{1}}, 1<<17)
	p.on(append(rows, ids(512))...)
	p.save(p.read("lm_head", ""))
	live := aten.Live()
	_, err := m.Start(&p.Graph, []aten.Tensor{full(t, 1, 4)})
	e := fault.As(err)
	require.Equal(t, fault.Input, e.Code, err)
	require.Contains(t, e.Message, "131073 rows padded to 512 tokens")
	require.Equal(t, live, aten.Live())
}

// Memory that cannot be had is an error, and the end of that run only.
func TestOutOfMemory(t *testing.T) {
	m := open(t, enginetest.GPT2)
	live := aten.Live()
	p := &program{}
	p.on(ids(3))
	p.save(p.call("zeros", graph.List(graph.Int(1<<44))))
	p.save(p.call("zeros", graph.List(graph.Int(1<<62), graph.Int(1<<62))))
	r, err := m.Start(&p.Graph, nil)
	require.NoError(t, err)
	_, err = r.Step(0)
	require.Equal(t, fault.Op, fault.As(err).Code)
	require.Equal(t, live, aten.Live())
	finish(t, m, logits(1))
}

// The weights are ordinary tensors wherever they were first used.
func TestLoadedInInferenceMode(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	grad := aten.GradEnabled()
	m, err := Open(enginetest.Directory(t, enginetest.GPT2, 1), Options{DType: "bfloat16"}) // so that they are converted
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	leave := aten.InferenceMode(true)
	finish(t, m, logits(1, 2))
	require.NotZero(t, aten.CurrentMode()&graph.ModeInference)
	leave()
	require.Equal(t, grad, aten.GradEnabled())
	for _, name := range []string{"lm_head.weight", "transformer.ln_f.bias"} {
		w, err := m.Parameter(name)
		require.NoError(t, err)
		op, err := aten.Find("aten::is_inference")
		require.NoError(t, err)
		v, err := op.Call([]aten.Value{aten.TensorValue(w)})
		require.NoError(t, err)
		require.Zero(t, v.I, name)
		w.Free()
	}
}

// A line's mode holds for that line.
func TestModes(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m := open(t, enginetest.GPT2)
	for _, outer := range []bool{false, true} {
		leave := aten.InferenceMode(outer)
		before := aten.CurrentMode()
		p := &program{}
		p.on(ids(2))
		for _, mode := range []graph.Mode{0, graph.ModeGrad, graph.ModeInference, graph.ModeGrad, graph.ModeInference} {
			p.save(p.call("is_inference", p.call("zeros", graph.List(graph.Int(1)))))
			p.Nodes[len(p.Nodes)-3].Mode, p.Nodes[len(p.Nodes)-2].Mode = mode, mode
		}
		r, err := m.Start(&p.Graph, nil)
		require.NoError(t, err)
		_, err = r.Step(0)
		require.NoError(t, err)
		results, _, err := r.Results()
		require.NoError(t, err)
		var inference []int64
		for _, result := range results {
			inference = append(inference, result.Value.I)
		}
		require.Equal(t, []int64{0, 0, 1, 0, 1}, inference)
		require.Equal(t, before, aten.CurrentMode())
		leave()
	}
}

// What an invoke assigned for the whole batch may be a tensor from outside, or a view that repeats
// one row: another invoke's edit of its own rows must reach neither.
func TestEditsStayOutOfAssignedValues(t *testing.T) {
	m := open(t, enginetest.GPT2)
	given := full(t, 0.25, 16)
	kept, err := given.Share()
	require.NoError(t, err)
	defer kept.Free()
	p := &program{}
	p.on()
	p.write("transformer.h.0", "0", p.call("expand", p.constant(0), graph.List(graph.Int(2), graph.Int(3), graph.Int(16))))
	p.on(ids(3))
	h := p.read("transformer.h.0", "0")
	p.fill(h, 7)
	p.save(p.read("transformer.h.1", "0"))
	p.on([]int64{4, 5, 6})
	p.save(p.read("transformer.h.0", "0"))
	out := finish(t, m, p, given)
	require.Equal(t, slices.Repeat([]float32{0.25}, 48), out[1], "the other invoke's rows")
	data, err := kept.Float32s()
	require.NoError(t, err)
	require.Equal(t, slices.Repeat([]float32{0.25}, 16), data, "the tensor from outside")
}

// A value that was assigned to an access point is the activation from then on.
func TestAssignedValueChangedInPlace(t *testing.T) {
	m := open(t, enginetest.GPT2)
	trace := func(record func(p *program, v, other graph.Arg)) ([][]float32, error) {
		p := &program{}
		p.on(ids(3))
		v := p.call("mul", p.read("transformer.h.1.mlp", ""), graph.Float(0.5))
		other := p.call("clone", v)
		p.write("transformer.h.1.mlp", "", v)
		record(p, v, other)
		p.save(p.read("lm_head", ""))
		r, err := m.Start(&p.Graph, nil)
		if err != nil {
			return nil, err
		}
		defer r.Free()
		if _, err := r.Step(0); err != nil {
			return nil, err
		}
		_, tensors, err := r.Results()
		require.NoError(t, err)
		data, err := tensors[len(tensors)-1].Float32s()
		for _, x := range tensors {
			x.Free()
		}
		return [][]float32{data}, err
	}
	late := func(p *program) { p.save(p.read("transformer.h.2", "0")) }
	want, err := trace(func(p *program, v, other graph.Arg) { p.fill(v, 3) })
	require.NoError(t, err)
	got, err := trace(func(p *program, v, other graph.Arg) { p.fill(other, 3); p.write("transformer.h.1.mlp", "", other) })
	require.NoError(t, err)
	require.Equal(t, want, got)
	_, err = trace(func(p *program, v, other graph.Arg) { late(p); p.fill(v, 3) })
	require.Equal(t, fault.OutOfOrder, fault.As(err).Code, "nothing would feel it: %v", err)
	plain, err := trace(func(p *program, v, other graph.Arg) { late(p) })
	require.NoError(t, err)
	for _, harmless := range []func(p *program, v, other graph.Arg){
		func(p *program, v, other graph.Arg) { late(p); p.fill(other, 3) },
		func(p *program, v, other graph.Arg) { p.write("transformer.h.1.mlp", "", other); late(p); p.fill(v, 3) },
	} {
		got, err := trace(harmless)
		require.NoError(t, err)
		require.Equal(t, plain, got)
	}

	// read again further on, it is the activation there: q_proj has gone by, v_proj has not
	l := open(t, enginetest.Llama)
	p := &program{}
	p.on(ids(3))
	p.write("model.layers.0.input_layernorm", "", p.call("mul", p.read("model.layers.0.input_layernorm", ""), graph.Float(0.5)))
	p.save(p.read("model.layers.0.self_attn.q_proj", ""))
	p.fill(p.add(graph.Node{Kind: graph.KindRead, Path: "model.layers.0.self_attn.v_proj", Port: graph.PortInput, Leaf: "args.0"}), 0)
	p.save(p.read("model.layers.0.self_attn.v_proj", ""))
	out := finish(t, l, p)
	require.NotZero(t, out[0][0])
	require.Zero(t, out[1][0])
}

func TestScalarForAllRows(t *testing.T) {
	m := open(t, enginetest.GPT2)
	live := aten.Live()
	p := &program{}
	p.on()
	p.write("transformer.wpe", "", p.constant(0))
	p.on(ids(3))
	p.fill(p.read("transformer.wpe", ""), 0)
	p.save(p.read("lm_head", ""))
	p.on([]int64{4, 5, 6})
	p.save(p.read("lm_head", ""))
	scalar, err := aten.FromFloat32s([]float32{0})
	require.NoError(t, err)
	r, err := m.Start(&p.Graph, []aten.Tensor{scalar})
	require.NoError(t, err)
	_, err = r.Step(0)
	require.Error(t, err)
	r.Free()
	require.Equal(t, live, aten.Live())
}

func TestInputErrors(t *testing.T) {
	m := open(t, enginetest.GPT2)
	for says, rows := range map[string][][]int64{
		"row 0 has no tokens":                             {{}},
		"has 33 tokens; the model's context holds 32":     {ids(33)},
		"token 1 of row 1 of invoke 0 is id 24; the voca": {{1}, {2, 24}},
		"is id -1; the vocabulary has ids 0 to 23":        {{-1}},
	} {
		p := &program{}
		p.on(rows...)
		p.save(p.read("lm_head", ""))
		_, err := m.Start(&p.Graph, nil)
		require.ErrorContains(t, err, says)
		require.Equal(t, fault.Input, fault.As(err).Code)
		require.Equal(t, 0, fault.As(err).Invoke)
	}
	p := &program{}
	p.on()
	p.save(p.read("lm_head", ""))
	_, err := m.Start(&p.Graph, nil)
	require.ErrorContains(t, err, "the trace has no input")
}

func TestOpenErrors(t *testing.T) {
	live := aten.Live()
	for name, c := range map[string]struct {
		spoil func(dir string) error
		says  []string
	}{
		"architecture": {func(dir string) error {
			return os.WriteFile(dir+"/config.json", []byte(`{"architectures": ["MambaForCausalLM"]}`), 0o644)
		}, []string{"MambaForCausalLM", "GPT2LMHeadModel", "LlamaForCausalLM"}},
		"no config":  {func(dir string) error { return os.Remove(dir + "/config.json") }, []string{"config.json"}},
		"no weights": {func(dir string) error { return os.Remove(dir + "/model.safetensors") }, []string{"model.safetensors"}},
		"truncated": {func(dir string) error {
			return os.Truncate(dir+"/model.safetensors", 5000)
		}, []string{"model.safetensors", "cut short"}},
		"empty": {func(dir string) error { return os.Truncate(dir+"/model.safetensors", 0) }, []string{"model.safetensors"}},
		"wider": {func(dir string) error {
			return os.WriteFile(dir+"/config.json", []byte(strings.Replace(enginetest.GPT2, `"n_embd": 16`, `"n_embd": 32`, 1)), 0o644)
		}, []string{"wrong shape: transformer.wte.weight has [24 16], the config asks for [24 32]"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := enginetest.Directory(t, enginetest.GPT2, 1)
			require.NoError(t, c.spoil(dir))
			_, err := Open(dir, Options{Load: true})
			require.Error(t, err)
			require.Contains(t, []fault.Code{fault.ModelLoad}, fault.As(err).Code)
			for _, says := range c.says {
				require.Contains(t, err.Error(), says)
			}
			require.Contains(t, err.Error(), dir)
			require.Equal(t, live, aten.Live())
		})
	}
	dir := enginetest.Directory(t, enginetest.GPT2, 1)
	for _, o := range []Options{{DType: "float31", Load: true}, {Device: "tpu", Load: true}, {Device: "cuda:77", Load: true}} {
		_, err := Open(dir, o)
		require.Error(t, err, fmt.Sprint(o))
		require.Equal(t, live, aten.Live())
	}
}
