package remote

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// checkPlaces holds constants that are results of earlier steps to what those steps give.
func (r *Request) checkPlaces() error {
	for i := range r.Steps {
		for _, c := range r.Steps[i].Constants {
			switch at := c.Result; {
			case at == nil:
			case r.Kind != Session:
				return malformed("a constant is a result of another step, and only a session has such")
			case at.Step < 0 || at.Step >= i:
				return atStep(malformed("a constant is a result of step %d, which does not come before it", at.Step), r.Kind, i)
			case at.Number < 0 || at.Number >= r.programs[at.Step].saves():
				return atStep(malformed("step %d has no result %d", at.Step, at.Number), r.Kind, i)
			}
		}
		for _, n := range r.Steps[i].Unsent {
			if n < 0 || n >= r.programs[i].saves() {
				return atStep(malformed("it has no result %d that could stay away", n), r.Kind, i)
			}
		}
	}
	return nil
}

// saves is how many results are wanted of the last part of a program.
func (p *program) saves() (n int) {
	for _, node := range p.graph.Nodes[p.last:] {
		if node.Kind == graph.KindSave {
			n++
		}
	}
	return n
}

// kept holds results of steps that later ones use.
type kept struct {
	last    map[Place]int // by result: the last step that uses it
	tensors map[Place]aten.Tensor
}

func newKept(r *Request) *kept {
	k := &kept{last: map[Place]int{}, tensors: map[Place]aten.Tensor{}}
	for i := range r.Steps {
		for _, c := range r.Steps[i].Constants {
			if c.Result != nil {
				k.last[*c.Result] = i
			}
		}
	}
	return k
}

// take keeps those results of a step that later ones use. Autograd does not follow them, as it follows nothing that a
// client sends.
func (k *kept) take(step int, results []graph.Result, tensors []aten.Tensor) error {
	for n, result := range results {
		at := Place{step, n}
		if _, used := k.last[at]; !used {
			continue
		}
		if result.Value.Kind != graph.ArgRef {
			return malformed("result %d of step %d is no tensor, and a later step uses it as one", n, step)
		}
		t, err := aten.Detach(tensors[result.Value.Ref])
		if err != nil {
			return err
		}
		k.tensors[at] = t
	}
	return nil
}

// bytes is what they take.
func (k *kept) bytes() (n int64) {
	for _, t := range k.tensors {
		n += t.Bytes()
	}
	return n
}

// done frees what no step behind this one uses.
func (k *kept) done(step int) {
	for at, t := range k.tensors {
		if k.last[at] <= step {
			t.Free()
			delete(k.tensors, at)
		}
	}
}

// session runs traces one after the other.
func (x *performing) session() error {
	x.kept = newKept(x.request)
	defer x.kept.done(len(x.request.Steps))
	for i := range x.request.Steps {
		out, err := x.traceStep(i)
		if err != nil {
			return atStep(err, Session, i)
		}
		out.Step = i
		x.response.Steps = append(x.response.Steps, out)
		x.kept.done(i)
	}
	return nil
}

// inOrder sorts results by their nodes, as clients count them.
func inOrder(results []graph.Result) []graph.Result {
	slices.SortFunc(results, func(a, b graph.Result) int { return int(a.Node) - int(b.Node) })
	return results
}

// without leaves out some results.
func without(results []graph.Result, unsent []int) []graph.Result {
	if len(unsent) == 0 {
		return results
	}
	var out []graph.Result
	for n, result := range results {
		if !slices.Contains(unsent, n) {
			out = append(out, result)
		}
	}
	return out
}
