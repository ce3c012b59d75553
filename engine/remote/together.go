package remote

import (
	"context"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Company says with whom a request may share forward passes: with those of the same, which can be compared. It is nil
// for one that runs alone. What each gives is what it gives alone (docs/contract.md, rule 5).
func (r *Request) Company() any {
	if r.Kind == Generate {
		return r.company()
	}
	if r.Kind != Trace || !r.Steps[0].End || len(r.Steps[0].Program) != 1 || r.Random != "" {
		return nil
	}
	for i := range r.Steps[0].Constants {
		if r.Steps[0].Constants[i].Grad {
			return nil
		}
	}
	g := r.programs[0].graph
	for i := range g.Invokes {
		if v := &g.Invokes[i]; v.Rows == nil && !v.Edit || v.Mode() != g.Invokes[0].Mode() {
			return nil // it sees the whole batch
		}
	}
	for i := range g.Nodes {
		if n := &g.Nodes[i]; n.Kind >= graph.KindTrack || strings.HasPrefix(n.Op, "nng::") {
			return nil // it asks for gradients
		}
	}
	if len(g.Invokes) == 0 {
		return nil
	}
	return g.Invokes[0].Mode()
}

// Tokens is how many there are in the rows of a request, new ones included.
func (r *Request) Tokens() (n int) {
	for _, p := range r.programs {
		n += p.graph.Tokens()
	}
	if r.Kind == Generate {
		n += (graph.CountTokens(r.Prompt.Rows) + len(r.Prompt.Rows)*r.Settings.MaxNewTokens) * max(r.Settings.Returned, r.Settings.Beams, 1)
	}
	return n
}

// together is several requests in one run.
type together struct {
	graph  *graph.Graph
	starts []graph.ID // the first node of each
	consts []aten.Tensor
}

// add appends a request, whose numbers go on where those of the others end.
func (t *together) add(x *performing) error {
	consts, err := x.constants(&x.request.Steps[0])
	if err != nil {
		return err
	}
	own := x.request.programs[0].graph
	node, invoke, pos, index := graph.ID(len(t.graph.Nodes)), int32(len(t.graph.Invokes)), int32(len(t.graph.Positions)), int32(len(t.consts))
	renumber := func(id graph.ID) graph.Arg { return graph.Ref(id + node) }
	for _, n := range own.Nodes {
		n.Invoke += invoke
		if n.Pos >= 0 {
			n.Pos += pos
		}
		if n.Kind == graph.KindConst {
			if int(n.Index) >= len(consts) {
				aten.FreeAll(consts)
				return malformed("constant %d is not among the %d there are", n.Index, len(consts))
			}
			n.Index += index
		}
		n.Args, n.Kwargs = graph.ReplacedArgs(n.Args, renumber), graph.ReplacedKwargs(n.Kwargs, renumber)
		t.graph.Nodes = append(t.graph.Nodes, n)
	}
	t.graph.Invokes = append(t.graph.Invokes, own.Invokes...)
	t.graph.Positions = append(t.graph.Positions, own.Positions...)
	t.starts = append(t.starts, node)
	t.consts = append(t.consts, consts...)
	return nil
}

// PerformTogether runs requests of one company in the same forward passes, and gives the response of each. Where anything fails it
// gives an error and no response: who is to blame shows when each runs alone.
func (p *Performer) PerformTogether(ctx context.Context, requests []*Request) (out [][]byte, err error) {
	if requests[0].Kind == Generate {
		return p.generateTogether(ctx, requests)
	}
	t := &together{graph: &graph.Graph{}}
	var all []*performing
	for _, r := range requests {
		x := p.begin(ctx, r)
		if err = t.add(x); err != nil {
			break
		}
		all = append(all, x)
	}
	if err != nil {
		aten.FreeAll(t.consts)
		return nil, err
	}
	run, err := p.Model.Begin(t.graph, t.consts, true, t.judge(all))
	if err != nil {
		return nil, err
	}
	results, tensors, err := finish(ctx, run)
	if err != nil {
		return nil, err
	}
	defer func() {
		aten.FreeAll(tensors)
	}()
	for i, x := range all {
		end := graph.ID(len(t.graph.Nodes))
		if i+1 < len(all) {
			end = t.starts[i+1]
		}
		var own []graph.Result
		for _, result := range results {
			if result.Node >= t.starts[i] && result.Node < end {
				result.Node -= t.starts[i]
				own = append(own, result)
			}
		}
		step, err := x.answer(own, tensors, &x.request.Steps[0])
		if err != nil {
			return nil, err
		}
		x.response.Steps = append(x.response.Steps, step)
		file, err := x.file()
		if err != nil {
			return nil, err
		}
		out = append(out, file)
	}
	return out, nil
}
