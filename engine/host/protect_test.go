package host

import (
	"strings"
	"sync"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

// bits is every weight of a model, as its numbers.
func bits(t *testing.T, m *Native) map[string][]float32 {
	out := map[string][]float32{}
	for _, p := range m.Describe().Params {
		w, err := m.Constant(p.Name)
		require.NoError(t, err)
		out[p.Name], err = w.Float32s()
		w.Free()
		require.NoError(t, err)
	}
	return out
}

// attempt runs a program on a weight, its constant 0.
func attempt(t *testing.T, m *Native, weight string, write func(p *program, w graph.Arg)) error {
	w, err := m.Constant(weight)
	require.NoError(t, err)
	p := &program{}
	p.on([]int64{1, 2, 3})
	write(p, p.constant(0))
	p.save(p.read("lm_head", ""))
	r, err := m.Start(&p.Graph, []aten.Tensor{w})
	require.NoError(t, err)
	defer r.Free()
	if _, err = r.Step(0); err == nil {
		_, tensors, err := r.Results()
		require.NoError(t, err)
		aten.FreeAll(tensors)
	}
	return err
}

const vector = "transformer.h.0.ln_1.weight"

// ways are paths on which a line comes to write to a weight.
var ways = map[string]func(p *program, w graph.Arg){
	"in place":     func(p *program, w graph.Arg) { p.call("mul_", w, graph.Int(2)) },
	"one overload": func(p *program, w graph.Arg) { p.call("mul_.Tensor", w, w) },
	"zeroed":       func(p *program, w graph.Arg) { p.call("zero_", w) },
	"set":          func(p *program, w graph.Arg) { p.fill(w, 7) },
	"a view":       func(p *program, w graph.Arg) { p.fill(p.call("view", w, graph.List(graph.Int(4), graph.Int(4))), 7) },
	"an item":      func(p *program, w graph.Arg) { p.fill(p.item(p.call("chunk", w, graph.Int(2)), 1), 7) },
	"one of a list": func(p *program, w graph.Arg) {
		p.call("zero_", p.item(p.call("broadcast_tensors", graph.List(w, w)), 0))
	},
	"an index": func(p *program, w graph.Arg) {
		p.call("add_", p.add(graph.Node{Kind: graph.KindIndex, Args: []graph.Arg{w, graph.Int(1)}}), graph.Int(1))
	},
	"expanded": func(p *program, w graph.Arg) { p.call("fill_", p.call("expand_as", w, w), graph.Int(1)) },
	"type_as":  func(p *program, w graph.Arg) { p.call("zero_", p.call("type_as", w, w)) },
	"to": func(p *program, w graph.Arg) {
		p.call("zero_", p.call("to", w, graph.Arg{Kind: graph.ArgDType, S: "float32"}))
	},
	"contiguous": func(p *program, w graph.Arg) { p.call("zero_", p.call("contiguous", w)) },
	"dropout in eval": func(p *program, w graph.Arg) {
		p.call("zero_", p.call("dropout", w, graph.Float(.5), graph.Bool(false)))
	},
	"einsum":   func(p *program, w graph.Arg) { p.call("zero_", p.call("einsum", graph.String("i->i"), graph.List(w))) },
	"detached": func(p *program, w graph.Arg) { p.call("zero_", p.call("detach", w)) },
	"reshaped": func(p *program, w graph.Arg) { p.call("zero_", p.call("reshape", w, graph.List(graph.Int(-1)))) },
	"real":     func(p *program, w graph.Arg) { p.call("zero_", p.call("real", w)) },
	"as other bits": func(p *program, w graph.Arg) {
		p.call("zero_", p.call("view.dtype", w, graph.Arg{Kind: graph.ArgDType, S: "int32"}))
	},
	"strided": func(p *program, w graph.Arg) {
		p.call("zero_", p.call("as_strided", w, graph.List(graph.Int(1)), graph.List(graph.Int(1))))
	},
	"copied into": func(p *program, w graph.Arg) { p.call("copy_", w, p.call("neg", w)) },
	"scattered into": func(p *program, w graph.Arg) {
		p.call("index_fill_", w, graph.Int(0), p.call("arange", graph.Int(3)), graph.Int(0))
	},
	"resized":           func(p *program, w graph.Arg) { p.call("resize_", w, graph.List(graph.Int(3))) },
	"transposed":        func(p *program, w graph.Arg) { p.call("unsqueeze_", w, graph.Int(0)) },
	"set to another":    func(p *program, w graph.Arg) { p.call("set_", w, p.call("neg", w)) },
	"detached in place": func(p *program, w graph.Arg) { p.call("detach_", w) },
	"made a leaf":       func(p *program, w graph.Arg) { p.call("requires_grad_", w) },
	"by a list": func(p *program, w graph.Arg) {
		p.call("_foreach_add_", graph.List(w, w), graph.Int(1))
	},
	"out": func(p *program, w graph.Arg) {
		p.add(graph.Node{Kind: graph.KindCall, Op: "aten::neg", Args: []graph.Arg{p.call("neg", w)}, Kwargs: []graph.Kwarg{{Name: "out", Arg: w}}})
	},
	"one of two outs": func(p *program, w graph.Arg) {
		i := p.call("arange", graph.Int(16))
		out := p.add(graph.Node{Kind: graph.KindCall, Op: "aten::sort", Args: []graph.Arg{p.call("neg", w)},
			Kwargs: []graph.Kwarg{{Name: "values", Arg: w}, {Name: "indices", Arg: i}}})
		p.save(p.item(out, 0)) // what nobody looks at is not computed
	},
	"running statistics": func(p *program, w graph.Arg) {
		out := p.call("batch_norm", p.call("ones", graph.List(graph.Int(2), graph.Int(16))), graph.Null(), graph.Null(), w, w,
			graph.Bool(true), graph.Float(.5), graph.Float(1e-5), graph.Bool(false))
		p.save(out)
	},
	"its gradient": func(p *program, w graph.Arg) {
		p.add(graph.Node{Kind: graph.KindCall, Op: "nng::add_grad", Args: []graph.Arg{w, p.call("neg", w)}})
	},
	"an activation": func(p *program, _ graph.Arg) { // of which one row is then another invoke's
		w := p.call("expand", p.constant(0), graph.List(graph.Int(1), graph.Int(3), graph.Int(16)))
		p.write("transformer.h.0", "0", w)
		p.call("zero_", p.read("transformer.h.0", "0"))
	},
	"followed by autograd": func(p *program, w graph.Arg) {
		p.add(graph.Node{Kind: graph.KindTrack, Args: []graph.Arg{w, graph.Int(graph.TrackRead)}})
		p.add(graph.Node{Kind: graph.KindCall, Op: "aten::zero_", Args: []graph.Arg{w}})
	},
}

func TestWeightsStayAsTheyAre(t *testing.T) {
	m := open(t, enginetest.GPT2)
	before, want := bits(t, m), finish(t, m, logits(1, 2, 3))
	m.Protect(true)
	for name, write := range ways {
		err := attempt(t, m, vector, write)
		require.ErrorContains(t, err, "would change "+vector, name)
		e := fault.As(err)
		require.Equal(t, fault.Remote, e.Code)
		require.Equal(t, "user.py", e.Pos.File)
		require.Contains(t, e.Hint, ".clone()")
		require.Equal(t, before, bits(t, m), name)
	}
	require.NoError(t, attempt(t, m, vector, func(p *program, w graph.Arg) {
		own := p.call("clone", w)
		p.call("zero_", own)
		p.fill(own, 3)
		p.call("mul", w, own)
		p.save(w)
	}), "copies are the line's own, and weights may be read")
	require.Equal(t, want, finish(t, m, logits(1, 2, 3)))
	require.Equal(t, before, bits(t, m))

	m.Protect(false)
	require.NoError(t, attempt(t, m, vector, ways["in place"]))
	require.NotEqual(t, before, bits(t, m), "a model of one's own is one's own")
}

// The planner goes by where an argument stands: a change that it did not notice could be one of shared tokens.
func TestChangesStandFirst(t *testing.T) {
	m := open(t, enginetest.GPT2)
	p := &program{}
	p.on([]int64{1, 2, 3})
	h := p.read("transformer.h.0", "0")
	p.save(p.add(graph.Node{Kind: graph.KindCall, Op: "aten::zero_", Kwargs: []graph.Kwarg{{Name: "self", Arg: h}}}))
	_, err := m.Start(&p.Graph, nil)
	require.ErrorContains(t, err, "as its first argument")
}

// A schedule that is known starts runs on a way of its own, and so do steps of a generation.
func TestEveryRunKeepsTheWeights(t *testing.T) {
	m := open(t, enginetest.Llama)
	const name = "model.layers.0.input_layernorm.weight"
	before := bits(t, m)
	m.Protect(true)
	p := &program{}
	p.on([]int64{1, 2, 3})
	p.call("mul_", p.constant(0), graph.Int(2))
	data := graph.Encode(&p.Graph)
	for range 3 {
		w, err := m.Constant(name)
		require.NoError(t, err)
		r, err := m.BeginBytes(data, []aten.Tensor{w}, true)
		require.NoError(t, err)
		_, err = r.Step(0)
		require.ErrorContains(t, err, "would change "+name)
	}
	c, err := m.NewCache([][]int64{{1, 2, 3}}, nil, 4)
	require.NoError(t, err)
	defer c.Free()
	w, err := m.Constant(name)
	require.NoError(t, err)
	p.Invokes[0].Rows = nil
	r, err := c.Begin(&p.Graph, []aten.Tensor{w}, true)
	require.NoError(t, err)
	_, err = r.Step(0)
	require.ErrorContains(t, err, "would change "+name)
	require.Equal(t, before, bits(t, m))
}

func TestNoPassFillsTheGradientsOfWeights(t *testing.T) {
	m := open(t, enginetest.GPT2)
	w, err := m.Constant(vector)
	require.NoError(t, err)
	op, err := aten.Find("aten::requires_grad_.default")
	require.NoError(t, err)
	out, err := op.Call([]aten.Value{aten.TensorValue(w)})
	require.NoError(t, err)
	out.Free()
	w.Free()
	m.Protect(true)
	p := logits(1, 2, 3)
	loss := p.call("sum", graph.Ref(0))
	p.add(graph.Node{Kind: graph.KindBackward, Mode: graph.ModeGrad, Args: []graph.Arg{loss, graph.Null(), graph.Bool(false),
		graph.Bool(false), graph.Bool(true), graph.Bool(false)}})
	r, err := m.Start(&p.Graph, nil)
	require.NoError(t, err)
	_, err = r.Step(0)
	require.ErrorContains(t, err, "leave gradients at the weights")
}

// Tokens that invokes have in common are computed once; what one of them does to its values is its own affair.
func TestInvokesDoNotSeeEachOther(t *testing.T) {
	for _, config := range []string{enginetest.GPT2, enginetest.Llama} {
		m := open(t, config)
		m.Protect(true)
		want := finish(t, m, logits(1, 2, 3, 4))
		for _, point := range m.graphs.Causal.Points {
			var leaves []string
			point.Tree.Refs(func(id graph.ID) { leaves = append(leaves, m.graphs.Causal.Nodes[id].Leaf) })
			for _, leaf := range leaves {
				p := &program{}
				p.on([]int64{1, 2, 3, 4})
				v := p.add(graph.Node{Kind: graph.KindRead, Path: point.Path, Port: point.Port, Leaf: leaf})
				p.call("zero_", v)
				p.on([]int64{1, 2, 3, 4})
				p.save(p.read("lm_head", ""))
				r, err := m.Start(&p.Graph, nil)
				if err != nil {
					continue
				}
				if _, err := r.Step(0); err != nil {
					require.Equal(t, fault.Remote, fault.As(err).Code, "%s %s: %v", point.Path, leaf, err)
					continue
				}
				_, tensors, err := r.Results()
				require.NoError(t, err)
				got, err := tensors[0].Float32s()
				aten.FreeAll(tensors)
				require.NoError(t, err)
				require.InDeltaSlice(t, want[0], got, 1e-4, "%s %s %s", point.Path, point.Port, leaf)
			}
		}
	}
}

// A generation's keys and values lie in buffers that no access point shows: what a step does to what it reads
// leaves those of earlier steps as they are.
func TestNoPointShowsTheCache(t *testing.T) {
	for _, config := range []string{enginetest.GPT2, enginetest.Llama} {
		m := open(t, config)
		m.Protect(true)
		c, err := m.NewCache([][]int64{{1, 2, 3}, {4, 5, 6}}, nil, 4)
		require.NoError(t, err)
		buffers := map[uintptr]string{}
		for name, buffer := range c.tensors {
			buffers[buffer.StorageID()] = name
		}
		for range 3 {
			seen := 0
			model := m.graphs.Causal
			for _, point := range model.Points {
				if strings.Contains(point.Path, "source") {
					continue
				}
				point.Tree.Refs(func(id graph.ID) {
					p := &program{}
					p.on()
					p.save(p.add(graph.Node{Kind: graph.KindRead, Path: point.Path, Port: point.Port, Leaf: model.Nodes[id].Leaf}))
					r, err := c.Begin(&p.Graph, nil, false)
					if err != nil {
						return // not computed in a generation
					}
					defer r.Free()
					_, err = r.Step(0)
					require.NoError(t, err, point.Path)
					_, tensors, err := r.Results()
					require.NoError(t, err)
					for _, x := range tensors {
						require.NotContains(t, buffers, x.StorageID(), "%s %s", point.Path, point.Port)
						seen++
					}
					aten.FreeAll(tensors)
				})
			}
			require.Greater(t, seen, 20)
			r, err := c.Begin(&graph.Graph{}, nil, true)
			require.NoError(t, err)
			_, err = r.Step(0)
			require.NoError(t, err)
			_, _, err = r.Results()
			require.NoError(t, err)
			scores, err := c.TakeLogits()
			require.NoError(t, err)
			scores.Free()
			require.NoError(t, c.Append([]int64{7, 8}))
		}
		c.Free()
	}
}

func TestFewParts(t *testing.T) {
	m := open(t, enginetest.GPT2)
	many := func(p *program) graph.Arg {
		return p.call("expand", p.call("zeros", graph.List(graph.Int(1))), graph.List(graph.Int(1<<40)))
	}
	m.Protect(true)
	for name, write := range map[string]func(p *program) graph.Arg{
		"unbind":       func(p *program) graph.Arg { return p.call("unbind", many(p)) },
		"by an axis":   func(p *program) graph.Arg { return p.call("unbind.int", many(p), graph.Int(-1)) },
		"split":        func(p *program) graph.Arg { return p.call("split", many(p), graph.Int(3)) },
		"split of one": func(p *program) graph.Arg { return p.call("split", many(p), p.call("ones", graph.List())) },
		"by name": func(p *program) graph.Arg {
			return p.add(graph.Node{Kind: graph.KindCall, Op: "aten::unbind", Kwargs: []graph.Kwarg{{Name: "self", Arg: many(p)}}})
		},
	} {
		err := attempt(t, m, vector, func(p *program, _ graph.Arg) { p.save(p.item(write(p), 0)) })
		require.ErrorContains(t, err, "would be cut into more", name)
	}
	require.NoError(t, attempt(t, m, vector, func(p *program, w graph.Arg) {
		p.save(p.item(p.call("unbind", w), 0))
		wide := p.call("expand", p.call("zeros", graph.List(graph.Int(1))), graph.List(graph.Int(2), graph.Int(1<<20)))
		p.save(p.item(p.call("split", wide, graph.Int(1<<10), graph.Int(1)), 0))
		p.save(p.item(p.call("unbind", wide), 0))
	}))
}

// The switch may be thrown while runs begin.
func TestProtectIsSafeForConcurrentUse(t *testing.T) {
	m := open(t, enginetest.GPT2)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for i := range 10 {
				m.Protect(i%2 == 0)
				finish(t, m, logits(1, 2, 3))
			}
		})
	}
	all.Wait()
}

// BenchmarkProtect is what asking costs, on a model whose every instruction is small.
func BenchmarkProtect(b *testing.B) {
	m := open(b, wide)
	for _, on := range []bool{false, true, false, true} {
		b.Run(map[bool]string{false: "off", true: "on"}[on], func(b *testing.B) {
			m.Protect(on)
			for range b.N {
				finish(b, m, logits(1, 2, 3))
			}
		})
	}
}

func TestALineDoesNotTakeForEver(t *testing.T) {
	m := open(t, enginetest.GPT2)
	large := func(p *program, n int64) graph.Arg { // as large as one likes, and takes no memory
		one := p.call("ones", graph.List(graph.Int(1), graph.Int(1)))
		return p.call("expand", one, graph.List(graph.Int(n), graph.Int(n)))
	}
	m.Protect(true)
	m.LimitWork(1e13)
	for name, line := range map[string]func(p *program) graph.Arg{
		"a product":       func(p *program) graph.Arg { x := large(p, 1<<20); return p.call("mm", x, x) },
		"a decomposition": func(p *program) graph.Arg { return p.call("linalg_svdvals", large(p, 1<<15), graph.Null()) },
		"einsum": func(p *program) graph.Arg {
			x := large(p, 1<<20)
			return p.call("einsum", graph.String("ij,jk->ik"), graph.List(x, x))
		},
	} {
		err := attempt(t, m, vector, func(p *program, _ graph.Arg) { p.save(line(p)) })
		require.ErrorContains(t, err, "multiplications", name)
		require.Equal(t, fault.Remote, fault.As(err).Code)
		require.Equal(t, "user.py", fault.As(err).Pos.File)
	}
	require.NoError(t, attempt(t, m, vector, func(p *program, _ graph.Arg) { x := large(p, 64); p.save(p.call("mm", x, x)) }))
	m.LimitWork(1000)
	small := func(p *program, _ graph.Arg) { x := large(p, 16); p.save(p.call("mm", x, x)) }
	require.ErrorContains(t, attempt(t, m, vector, small), "4.1e+03 multiplications, and a line may take 1.0e+03")
	m.Protect(false)
	require.NoError(t, attempt(t, m, vector, small), "a model of one's own")
}
