package host

import (
	"testing"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
	"github.com/stretchr/testify/require"
)

// reality is what a trace takes when it runs: multiplications, and bytes of what it saves.
func reality(t testing.TB, m *Native, g *graph.Graph, consts ...aten.Tensor) (estimated *Cost, work float64, output int64) {
	r, err := m.Begin(g, consts, true, func(c *Cost) error { estimated = c; return nil })
	require.NoError(t, err)
	defer r.Free()
	count := &shadow{run: r, known: make([]known, r.schedule.Slots)}
	for in := r.machine.Next(); in != nil; in = r.machine.Next() {
		if f := works[baseOf(in.Name)]; in.Op == plan.OpCall && f != nil {
			args, err := count.given(in)
			require.NoError(t, err)
			work += f(args.sizes, args.text)
		}
		out, err := r.perform(in)
		require.NoError(t, err)
		release(r.machine.Feed(out, nil))
	}
	_, tensors, err := r.Results()
	require.NoError(t, err)
	for _, x := range tensors {
		output += x.Bytes()
	}
	aten.FreeAll(tensors)
	return estimated, work, output
}

func baseOf(op string) string {
	for i := range op {
		if op[i] == '.' {
			return op[:i]
		}
	}
	return op
}

func TestAnEstimateIsWhatComes(t *testing.T) {
	for name, config := range map[string]string{"gpt2": enginetest.GPT2, "llama": enginetest.Llama} {
		m := open(t, config)
		block, head := "transformer.h.1", "lm_head"
		if name == "llama" {
			block = "model.layers.1"
		}
		for what, write := range map[string]func(p *program){
			"all logits": func(p *program) { p.on([]int64{1, 2, 3}); p.save(p.read(head, "")) },
			"the last": func(p *program) {
				p.on([]int64{1, 2, 3})
				p.save(p.call("select.int", p.read(head, ""), graph.Int(1), graph.Int(-1)))
			},
			"a layer":       func(p *program) { p.on([]int64{1, 2, 3}, []int64{4, 5, 6}); p.save(p.read(block, "0")) },
			"other lengths": func(p *program) { p.on([]int64{1, 2, 3}, []int64{4, 5}); p.save(p.read(head, "")) },
			"several": func(p *program) {
				p.on([]int64{1, 2, 3})
				h := p.read(block, "0")
				p.on([]int64{1, 2, 3, 4, 5})
				p.write(block, "0", p.call("add.Tensor", p.read(block, "0"), p.call("mean", h)))
				p.save(p.read(head, ""))
			},
			"lines": func(p *program) {
				p.on([]int64{1, 2, 3})
				h := p.read(block, "0")
				p.fill(h, 2)
				p.save(p.call("matmul", h, p.call("transpose.int", h, graph.Int(1), graph.Int(2))))
				p.save(p.call("std.dim", h, graph.List(graph.Int(-1)), graph.Bool(true), graph.Bool(true)))
				p.save(p.call("ones", graph.List(graph.Int(3), graph.Int(4))))
				p.save(p.read(head, ""))
			},
			"other sizes": func(p *program) {
				p.on([]int64{1, 2, 3})
				p.write(block, "0", p.call("repeat", p.read(block, "0"), graph.List(graph.Int(1), graph.Int(3), graph.Int(1))))
				p.save(p.read(head, ""))
			},
		} {
			p := &program{}
			write(p)
			c, work, output := reality(t, m, &p.Graph)
			require.True(t, c.Exact, "%s %s", name, what)
			require.InEpsilon(t, work, c.Work, 1e-9, "%s %s", name, what)
			require.Equal(t, output, c.Output, "%s %s", name, what)
			require.Positive(t, c.Peak)
		}
	}
}

func TestWhatIsTooDearMakesNothing(t *testing.T) {
	m := open(t, enginetest.GPT2)
	bounds := Bounds{Work: 1e11, Memory: 1 << 30, Output: 1 << 20}
	large := func(p *program, sizes ...int64) graph.Arg {
		list := graph.List()
		for _, n := range sizes {
			list.L = append(list.L, graph.Int(n))
		}
		return p.call("ones", list)
	}
	for says, write := range map[string]func(p *program) graph.Arg{
		"GiB of memory at once": func(p *program) graph.Arg { return p.call("sum", large(p, 1<<20, 1<<12)) },
		"TiB of memory at once": func(p *program) graph.Arg {
			return p.call("sum", p.call("contiguous", p.call("expand", large(p, 1, 1), graph.List(graph.Int(1<<20), graph.Int(1<<20)))))
		},
		"a job may send": func(p *program) graph.Arg { return large(p, 1<<10, 1<<10) },
		"multiplications, and": func(p *program) graph.Arg {
			x := p.call("expand", large(p, 1, 1), graph.List(graph.Int(1<<13), graph.Int(1<<13)))
			return p.call("sum", p.call("mm", x, x))
		},
	} {
		p := &program{}
		p.on([]int64{1, 2, 3})
		p.save(write(p))
		p.save(p.read("lm_head", ""))
		require.NoError(t, aten.CapMemory(1<<40))
		before := aten.PeakAllocated()
		begun := time.Now()
		_, err := m.Begin(&p.Graph, nil, true, bounds.Check)
		require.ErrorContains(t, err, says)
		require.Equal(t, "user.py", fault.As(err).Pos.File)
		require.Less(t, aten.PeakAllocated()-before, int64(1<<16), says)
		require.Less(t, time.Since(begun), time.Second)
	}
}

func BenchmarkEstimate(b *testing.B) {
	m := open(b, wide)
	p := &program{}
	p.on([]int64{1, 2, 3, 4, 5, 6, 7, 8})
	h := p.read("transformer.h.5", "0")
	p.fill(h, 0)
	p.save(p.call("mean", h))
	p.save(p.read("lm_head", ""))
	r, err := m.Begin(&p.Graph, nil, true)
	require.NoError(b, err)
	defer r.Free()
	b.ResetTimer()
	for range b.N {
		_, err := r.estimate(r.schedule)
		require.NoError(b, err)
	}
	b.ReportMetric(float64(len(r.schedule.Instrs)), "instrs")
}
