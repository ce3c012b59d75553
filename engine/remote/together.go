package remote

import (
	"context"
	"slices"
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
	if r.Kind != Trace || len(r.Steps[0].Program) != 1 || r.Random != "" || !r.keepsToItself(0) {
		return nil
	}
	g := r.programs[0].graph
	if len(g.Invokes) == 0 || slices.ContainsFunc(g.Invokes, graph.Invoke.WholeBatch) {
		return nil
	}
	return traces{g.Invokes[0].Mode(), slices.ContainsFunc(g.Invokes, padded)}
}

// traces is the company of traces. Positions have a row each in a pass in which some rows are padded, and else one for all.
type traces struct {
	mode   graph.Mode
	padded bool
}

// padded reports whether rows of an invoke are padded, or leave tokens out, when it runs alone.
func padded(v graph.Invoke) bool {
	for r, row := range v.Rows {
		if len(row) != len(v.Rows[0]) || v.Masks != nil && slices.Contains(v.Masks[r], 0) {
			return true
		}
	}
	return false
}

// mostLines is how many lines a request has at most that shares passes: what it takes to plan a pass grows with the square
// of all that are in it, and cannot be interrupted.
const mostLines = 1 << 10

// keepsToItself reports whether the lines of a step are done beside those of others as they are alone: they are complete,
// run under one mode, and ask for no gradients.
func (r *Request) keepsToItself(step int) bool {
	s, g := &r.Steps[step], r.programs[step].graph
	if !s.End || len(s.Program) > 1 || len(g.Nodes) > mostLines || endsInEdit(g) || slices.ContainsFunc(s.Constants, func(c Constant) bool { return c.Grad }) {
		return false
	}
	for _, v := range g.Invokes {
		if v.Mode() != g.Invokes[0].Mode() {
			return false
		}
	}
	return !slices.ContainsFunc(g.Nodes, func(n graph.Node) bool {
		return n.Kind >= graph.KindTrack || strings.HasPrefix(n.Op, "nng::")
	})
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

// endsInEdit reports whether the last of a program's invokes is an edit. It would go with the invoke that comes next, which
// is somebody else's.
func endsInEdit(g *graph.Graph) bool {
	return len(g.Invokes) > 0 && g.Invokes[len(g.Invokes)-1].Edit
}

// together is several requests in one run.
type together struct {
	graph  *graph.Graph
	starts []graph.ID // the first node of each
	consts []aten.Tensor
}

// add appends a step of a request, whose numbers go on where those of the others end.
func (t *together) add(x *performing, step int) error {
	consts, err := x.constants(&x.request.Steps[step])
	if err != nil {
		return err
	}
	own := x.request.programs[step].graph
	if endsInEdit(own) {
		aten.FreeAll(consts)
		return malformed("it ends in an edit of nothing")
	}
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

// nodes are those of one of the requests: from the first to the one behind the last.
func (t *together) nodes(request int) (from, to graph.ID) {
	if request+1 < len(t.starts) {
		return t.starts[request], t.starts[request+1]
	}
	return t.starts[request], graph.ID(len(t.graph.Nodes))
}

// own are the results of one of the requests, numbered as in its own program.
func (t *together) own(request int, results []graph.Result) (own []graph.Result) {
	from, to := t.nodes(request)
	for _, result := range results {
		if result.Node >= from && result.Node < to {
			result.Node -= from
			own = append(own, result)
		}
	}
	return own
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
		if err = t.add(x, 0); err != nil {
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
		step, err := x.answer(t.own(i, results), tensors, &x.request.Steps[0])
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
