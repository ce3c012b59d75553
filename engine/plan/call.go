package plan

import (
	"strconv"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Calls: a module applied to values of the user.

// module calls a module of the model on the user's values: the part of the forward pass between
// its input and its output is placed once more, on them.
func (s *Plan) module(p *pass, n int) error {
	node := &s.g.Nodes[n]
	in, okIn := p.model.Point(node.Path, graph.PortInput)
	out, okOut := p.model.Point(node.Path, graph.PortOutput)
	if !okIn || !okOut {
		_, err := accessPoint(p.model, &graph.Node{Path: node.Path, Port: graph.PortOutput})
		if err == nil {
			err = fault.New(fault.ModulePath, "module %q cannot be called by itself", node.Path)
		}
		return err
	}
	env := make([]Slot, len(p.model.Nodes))
	for k := range env {
		env[k] = NoSlot
	}
	value := func(id graph.ID) graph.Arg { return s.val[id] }
	given := map[string]Slot{}
	put := func(leaf string, a graph.Arg) {
		leaves(leaf, &a, func(leaf string, a *graph.Arg) {
			if a.Kind == graph.ArgRef {
				given[leaf] = a.Ref
			}
		})
	}
	for i, a := range graph.ReplacedArgs(node.Args, value) {
		put("args."+strconv.Itoa(i), a)
	}
	for _, kw := range graph.ReplacedKwargs(node.Kwargs, value) {
		put("kwargs."+kw.Name, kw.Arg)
	}
	if err := s.bindInputs(p, node, in, given, env); err != nil {
		return err
	}
	start, end := pointReady(&p.model.Points[in]), pointReady(&p.model.Points[out])
	for k := start; k < end; k++ {
		m := &p.model.Nodes[k]
		switch m.Kind {
		case graph.KindParam:
			slot, err := s.resolve(p, graph.ID(k))
			if err != nil {
				return err
			}
			env[k] = slot
		case graph.KindInput:
		case graph.KindMark:
			slot, err := s.inner(p, node.Invoke, m.Args[0].Ref, env, start)
			if err != nil {
				return err
			}
			env[k] = slot
		default:
			if isInPlace(m.Op) {
				return fault.New(fault.Op, "module %q cannot be called on a value during generation: it would write to the cache", node.Path).
					WithHint("Call the modules in it that look at one token alone (norms, MLPs, the head).")
			}
			var failed error
			m.Refs(func(id graph.ID) {
				slot, err := s.inner(p, node.Invoke, id, env, start)
				if err != nil {
					failed = err
				}
				env[id] = slot
			})
			if failed != nil {
				return failed
			}
			if err := s.compute(p, graph.ID(k), env); err != nil {
				return err
			}
		}
	}
	tree := p.model.Points[out].Tree
	s.val[n] = tree.Replaced(func(id graph.ID) graph.Arg { return graph.Ref(env[id]) })
	s.inherit(n)
	return nil
}

// bindInputs gives the marks of a module's inputs the user's values, by position or by name.
func (s *Plan) bindInputs(p *pass, node *graph.Node, in int, given map[string]Slot, env []Slot) error {
	tree := &p.model.Points[in].Tree
	used := 0
	bound := false
	tree.Refs(func(id graph.ID) {
		leaf := p.model.Nodes[id].Leaf
		slot, ok := given[leaf]
		if !ok && !bound { // the first input, given by position or by its name
			for _, alias := range []string{"args.0", "kwargs.hidden_states", "kwargs.input"} {
				if slot, ok = given[alias]; ok {
					break
				}
			}
		}
		if ok {
			env[id] = slot
			used++
			bound = true
		}
	})
	if used < len(given) || !bound {
		var want []string
		tree.Refs(func(id graph.ID) { want = append(want, p.model.Nodes[id].Leaf) })
		return fault.New(fault.Op, "module %q does not take these arguments", node.Path).
			WithHint("It takes the tensors %s.", strings.Join(want, ", "))
	}
	return nil
}

// inner is the value of a model node inside a module that is called by itself. Values from outside
// the module (masks, position embeddings) are those of the pass, cut to the invoke's part.
func (s *Plan) inner(p *pass, invoke int32, id graph.ID, env []Slot, start int) (Slot, error) {
	if env[id] != NoSlot {
		return env[id], nil
	}
	n := &p.model.Nodes[id]
	if int(id) < start && n.Kind == graph.KindMark {
		if slot, err := s.inner(p, invoke, n.Args[0].Ref, env, start); err == nil && env[n.Args[0].Ref] != NoSlot {
			return slot, nil
		}
	}
	if n.Kind == graph.KindParam || n.Shape == nil {
		return s.resolve(p, id)
	}
	return s.view(p, invoke, id)
}
