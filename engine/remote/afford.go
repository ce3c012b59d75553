package remote

import (
	"fmt"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
)

// What a request would take is estimated before any of it runs (docs/decisions/0030). One that is over a limit ends
// there; what an estimate cannot know is left to the limits of a run.

func (l Limits) bounds() host.Bounds {
	return host.Bounds{Work: l.Work, Memory: l.Memory, Output: l.Output}
}

func (l Limits) bounded() bool { return l.bounds() != host.Bounds{} }

// judge decides about a trace, together with those of its session that came before it.
func (x *performing) judge(p *program, s *Step) host.Judge {
	if !x.Limits.bounded() {
		return nil
	}
	return func(c *host.Cost) error {
		c = wanted(c, p, s)
		if x.kept != nil {
			if len(s.Unsent) > 0 {
				c.Output = 0 // not all of it is sent: what is, is counted then
			}
			x.spent = x.spent.Then(c, x.kept.bytes())
			c = &x.spent
		}
		return x.Limits.bounds().Check(c)
	}
}

// wanted is the cost of a step of which only what is wanted is sent.
func wanted(c *host.Cost, p *program, s *Step) *host.Cost {
	if !slices.Contains(s.Want, WantResults) {
		return c.Saving(graph.ID(len(p.graph.Nodes)))
	}
	return c.Saving(p.last)
}

// judge decides about requests that share forward passes: each answers for its own lines, and its part of the passes by
// its tokens.
func (t *together) judge(all []*performing) host.Judge {
	if !slices.ContainsFunc(all, func(x *performing) bool { return x.Limits.bounded() }) {
		return nil
	}
	tokens := t.graph.Tokens()
	return func(c *host.Cost) error {
		invoke := 0
		for i, x := range all {
			own := x.request.programs[0].graph
			from, to := t.nodes(i)
			saves := [2]graph.ID{from, to}
			if !slices.Contains(x.request.Steps[0].Want, WantResults) {
				saves[1] = saves[0]
			}
			part := c.Part(float64(own.Tokens())/float64(max(tokens, 1)), [2]int{invoke, invoke + len(own.Invokes)}, saves)
			if err := x.Limits.bounds().Check(part); err != nil {
				return err
			}
			invoke += len(own.Invokes)
		}
		return nil
	}
}

// affordable is the error of a generation whose steps, from one on, would take more than they may.
func (x *performing) affordable(from int) error {
	if !x.Limits.bounded() {
		return nil
	}
	r := x.request
	times := max(r.Settings.Returned, r.Settings.Beams, 1)
	growth, err := x.Model.NewGrowth(repeated(r.Prompt.Rows, times), repeated(r.Prompt.Masks, times), r.Settings.MaxNewTokens)
	if err != nil {
		return nil // what begins it says it better
	}
	sum := host.Cost{}
	known := map[string]*host.Cost{}
	for at := from; at < min(len(r.Steps), max(r.Settings.MaxNewTokens, 1)); at++ {
		step, err := x.stepCost(growth, at, known)
		if err != nil {
			return nil
		}
		if step == nil {
			continue
		}
		sum = sum.Then(step, growth.Kept)
		if err := x.Limits.bounds().Check(&sum); err != nil {
			return atStep(err, r.Kind, at)
		}
	}
	return nil
}

// stepCost is what a step takes. Steps of one program that are not the first take about the same.
func (x *performing) stepCost(growth *host.Growth, at int, known map[string]*host.Cost) (*host.Cost, error) {
	s, p := &x.request.Steps[at], &x.request.programs[at]
	if len(p.graph.Nodes) == 0 {
		return growth.Plain(at)
	}
	key := fmt.Sprint(at == 0, p.last, s.End, s.Want, x.constantSizes(s))
	for _, name := range s.Program {
		key += string(x.request.file[name].Data)
	}
	if cost := known[key]; cost != nil {
		return cost, nil
	}
	consts, err := x.constants(s)
	if err != nil {
		return nil, err
	}
	last := at
	if at > 0 { // as long as it becomes
		last = len(x.request.Steps) - 1
	}
	cost, err := growth.Step(last, p.graph, consts, s.End)
	if err != nil {
		return nil, err
	}
	known[key] = wanted(cost, p, s)
	return known[key], nil
}

// constantSizes says of what sizes the constants of a step are.
func (x *performing) constantSizes(s *Step) string {
	var b strings.Builder
	for i := range s.Constants {
		c := &s.Constants[i]
		blob := x.request.file[c.Tensor]
		fmt.Fprint(&b, c.Hash, c.Parameter, blob.DType, blob.Shape)
	}
	return b.String()
}

// repeated gives each row so many times.
func repeated(rows [][]int64, times int) (out [][]int64) {
	for _, row := range rows {
		out = append(out, slices.Repeat([][]int64{row}, times)...)
	}
	return out
}
