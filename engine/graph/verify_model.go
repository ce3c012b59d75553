package graph

import (
	"strconv"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// VerifyModel holds a model to the rules of the representation:
//
//   - nodes have the arguments their kind wants and use only values that stand before them;
//   - module paths are there once, each after the module it is part of;
//   - access points belong to modules, or are internal values of one, and stand in the order the forward pass meets them, the output
//     of a module after its input and after all that its children do;
//   - every tensor of an access point is a mark of that point under the name its place in the value
//     gives it, and every mark belongs to one point;
//   - inputs and parameters are named, and stand in the graph once.
//
// It needs no Index. Architectures are held to it by tests; what lets a model pass can be spliced.
func VerifyModel(m *Model) error {
	err := verifyModules(m.Modules)
	if err == nil {
		err = verifyModelNodes(m)
	}
	if err == nil {
		err = verifyPoints(m)
	}
	if err != nil {
		return err
	}
	return nil
}

func verifyModules(modules []Module) *fault.Error {
	if len(modules) == 0 || modules[0].Path != "" {
		return fault.New(fault.Graph, "the model itself, whose path is empty, is not the first of its modules")
	}
	seen := make(map[string]bool, len(modules))
	for i := range modules {
		path := modules[i].Path
		parent := path[:max(strings.LastIndexByte(path, '.'), 0)]
		switch {
		case seen[path]:
			return fault.New(fault.Graph, "there are two modules %q", path)
		case i > 0 && !seen[parent]:
			return fault.New(fault.Graph, "module %q stands before %q, which it is part of", path, parent)
		}
		seen[path] = true
	}
	return nil
}

func verifyModelNodes(m *Model) *fault.Error {
	v := verifier{nodes: m.Nodes}
	sources := map[string]bool{}
	for i := range m.Nodes {
		n := &m.Nodes[i]
		err := v.node(ID(i))
		switch {
		case err != nil:
		case !n.Kind.rule().model:
			err = fault.New(fault.Graph, "a model holds no %s nodes", n.Kind)
		case n.Kind == KindParam || n.Kind == KindInput:
			name := n.Kind.String() + " " + n.Op
			if n.Op == "" {
				err = fault.New(fault.Graph, "this %s has no name", n.Kind)
			} else if sources[name] {
				err = fault.New(fault.Graph, "%s is there twice", name)
			}
			sources[name] = true
		}
		if err != nil {
			err.Node, err.Path = i, n.Path
			return err
		}
	}
	return nil
}

// verifyPoints walks the access points in order, with the modules whose forward pass is under way.
func verifyPoints(m *Model) *fault.Error {
	known := make(map[string]bool, len(m.Modules))
	for i := range m.Modules {
		known[m.Modules[i].Path] = true
	}
	owner := make(map[ID]int, len(m.Points)) // mark -> its point
	var entered []string
	ran := map[string]bool{}
	for i := range m.Points {
		p := &m.Points[i]
		what := p.Port.String() + " of " + strconv.Quote(p.Path)
		var err *fault.Error
		switch {
		case p.Internal:
			if p.Port != PortOutput || known[p.Path] {
				err = fault.New(fault.Graph, "the internal value %q is not the output of a name of its own", p.Path)
			}
		case !known[p.Path]:
			err = fault.New(fault.Graph, "an access point belongs to %q, which is no module", p.Path)
		case p.At < 0 || int(p.At) > len(m.Nodes) || i > 0 && p.At < m.Points[i-1].At:
			err = fault.New(fault.Graph, "the %s is at node %d, out of order", what, p.At)
		case p.Port == PortInput && ran[p.Path]:
			err = fault.New(fault.Graph, "module %q runs twice", p.Path)
		case p.Port == PortInput:
			ran[p.Path] = true
			entered = append(entered, p.Path)
		case p.Port == PortOutput && len(entered) > 0 && entered[len(entered)-1] == p.Path:
			entered = entered[:len(entered)-1]
		default:
			err = fault.New(fault.Graph, "the %s stands where that module is not the one that runs", what)
		}
		if err == nil && !(p.Internal && p.Tree.Kind == ArgRef && int(p.Tree.Ref) < len(m.Nodes) && m.Nodes[p.Tree.Ref].Kind == KindCall) {
			err = verifyMarks(m, i, owner)
		}
		if err != nil {
			err.Path = p.Path
			return err
		}
	}
	if len(entered) > 0 {
		return fault.New(fault.Graph, "module %q has an input and no output", entered[len(entered)-1])
	}
	for i := range m.Nodes {
		if n := &m.Nodes[i]; n.Kind == KindMark {
			if _, ok := owner[ID(i)]; !ok {
				err := fault.New(fault.Graph, "a mark is part of no access point")
				err.Node, err.Path = i, n.Path
				return err
			}
		}
	}
	return nil
}

// verifyMarks checks the tensors of point i: marks of that point, under the right names, no earlier
// than the point and before the next one.
func verifyMarks(m *Model, i int, owner map[ID]int) *fault.Error {
	p := &m.Points[i]
	end := ID(len(m.Nodes))
	if i+1 < len(m.Points) {
		end = m.Points[i+1].At
	}
	var walk func(a *Arg, leaf string) *fault.Error
	walk = func(a *Arg, leaf string) *fault.Error {
		switch a.Kind {
		case ArgNone, ArgBool, ArgInt, ArgFloat, ArgString:
			return nil // a plain value beside the tensors, as use_cache is
		case ArgRef:
			if a.Ref < 0 || int(a.Ref) >= len(m.Nodes) {
				return fault.New(fault.Graph, "the %s speaks of node %d of %d", p.Port, a.Ref, len(m.Nodes))
			}
			n := &m.Nodes[a.Ref]
			_, taken := owner[a.Ref]
			var err *fault.Error
			switch {
			case n.Kind != KindMark || n.Path != p.Path || n.Port != p.Port:
				err = fault.New(fault.Graph, "a tensor of the %s is not a mark of it", p.Port)
			case n.Leaf != leaf:
				err = fault.New(fault.Graph, "the mark of tensor %q of the %s is named %q", leaf, p.Port, n.Leaf)
			case taken:
				err = fault.New(fault.Graph, "a mark is part of two access points, or twice of one")
			case a.Ref < p.At || a.Ref >= max(end, p.At+1):
				err = fault.New(fault.Graph, "tensor %q of the %s does not stand between its access point and the next", leaf, p.Port)
			}
			if err != nil {
				err.Node = int(a.Ref)
				return err
			}
			owner[a.Ref] = i
			return nil
		case ArgList, ArgTuple, ArgDict:
			if a.Kind == ArgDict && len(a.Keys) != len(a.L) {
				return fault.New(fault.Graph, "the %s has %d names for %d elements", p.Port, len(a.Keys), len(a.L))
			}
			for k := range a.L {
				key := strconv.Itoa(k)
				if a.Kind == ArgDict {
					key = a.Keys[k]
				}
				if leaf != "" {
					key = leaf + "." + key
				}
				if err := walk(&a.L[k], key); err != nil {
					return err
				}
			}
			return nil
		default:
			return fault.New(fault.Graph, "the %s holds %s, which an access point cannot", p.Port, a.Kind)
		}
	}
	return walk(&p.Tree, "")
}
