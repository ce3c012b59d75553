package graph

import (
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// arity is how many arguments a node of each kind has; -1 is any number.
var arity = map[Kind]int{
	KindCall: -1, KindIndex: 2, KindSetIndex: 3, KindItem: 2, KindRead: 0, KindWrite: 1, KindModule: -1, KindConst: 0, KindSave: 1,
}

// Verify holds a trace to the rules of the representation and to the model it speaks of: values
// are used after they are defined, modules and access points exist, constants are there. What it
// lets pass can be spliced.
func Verify(g *Graph, m *Model, nconsts int) error {
	for i := range g.Nodes {
		n := &g.Nodes[i]
		err := verifyNode(g, m, n, ID(i), nconsts)
		if err == nil {
			continue
		}
		err.Node, err.Invoke, err.Step, err.Pos = i, int(n.Invoke), int(n.Step), g.PosOf(n)
		return err
	}
	return nil
}

func verifyNode(g *Graph, m *Model, n *Node, id ID, nconsts int) *fault.Error {
	want, known := arity[n.Kind]
	if !known {
		return fault.New(fault.Graph, "a trace holds no nodes of kind %d", n.Kind)
	}
	if want >= 0 && len(n.Args) != want {
		return fault.New(fault.Graph, "a node of kind %d has %d arguments instead of %d", n.Kind, len(n.Args), want)
	}
	if n.Invoke < 0 || int(n.Invoke) >= len(g.Invokes) {
		return fault.New(fault.Graph, "it belongs to invoke %d of %d", n.Invoke, len(g.Invokes))
	}
	var late bool
	n.Refs(func(ref ID) { late = late || ref < 0 || ref >= id })
	if late {
		return fault.New(fault.Graph, "it uses a value that does not come before it")
	}
	switch n.Kind {
	case KindIndex, KindSetIndex, KindItem:
		if n.Args[0].Kind != ArgRef {
			return fault.New(fault.Graph, "its target is not a value")
		}
		if n.Kind == KindItem && n.Args[1].Kind != ArgInt && n.Args[1].Kind != ArgString {
			return fault.New(fault.Graph, "the key of an element is neither a number nor a string")
		}
	case KindConst:
		if n.Index < 0 || int(n.Index) >= nconsts {
			return fault.New(fault.Graph, "it names constant %d of %d", n.Index, nconsts)
		}
	case KindCall:
		if !strings.Contains(n.Op, "::") {
			return fault.New(fault.Graph, "%q is not the name of an operator", n.Op)
		}
	case KindModule:
		if err := verifyPoint(m, n.Path, PortOutput); err != nil {
			return err
		}
	case KindRead, KindWrite:
		if n.Port == PortGrad {
			return fault.New(fault.Graph, "gradients of access points cannot be read yet")
		}
		if err := verifyPoint(m, n.Path, n.Port); err != nil {
			return err
		}
		return verifyLeaf(m, n)
	}
	return nil
}

func verifyPoint(m *Model, path string, port Port) *fault.Error {
	if _, ok := m.Point(path, port); ok {
		return nil
	}
	if m.HasModule(path) {
		e := fault.New(fault.ModulePath, "module %q never runs by itself in a forward pass, so it has no input or output", path)
		e.Path = path
		return e.WithHint("A list of modules is indexed first; a dropout inside fused attention has no place of its own.")
	}
	e := fault.New(fault.ModulePath, "the model has no module %q", path)
	e.Path = path
	return e.WithHint("Nearest: %s.", strings.Join(Nearest(path, m.paths(), 3), ", "))
}

func (m *Model) paths() []string {
	out := make([]string, len(m.Modules))
	for i := range m.Modules {
		out[i] = m.Modules[i].Path
	}
	return out
}

func verifyLeaf(m *Model, n *Node) *fault.Error {
	p, _ := m.Point(n.Path, n.Port)
	var leaves []string
	m.Points[p].Tree.Refs(func(id ID) { leaves = append(leaves, m.Nodes[id].Leaf) })
	if slices.Contains(leaves, n.Leaf) {
		return nil
	}
	if len(leaves) == 1 && leaves[0] == "" {
		return fault.New(fault.ModulePath, "the value of %s is a bare tensor and has no element %q", n.Path, n.Leaf)
	}
	return fault.New(fault.ModulePath, "the value of %s has no tensor %q", n.Path, n.Leaf).
		WithHint("It has: %s.", strings.Join(leaves, ", "))
}

// Nearest gives the n names most like a wrong one, by edit distance, nearest first.
func Nearest(name string, names []string, n int) []string {
	type scored struct {
		name  string
		edits int
	}
	var all []scored
	for _, c := range names {
		if c != "" {
			all = append(all, scored{c, edits(name, c)})
		}
	}
	slices.SortStableFunc(all, func(a, b scored) int { return a.edits - b.edits })
	out := make([]string, 0, n)
	for i := 0; i < len(all) && i < n; i++ {
		out = append(out, all[i].name)
	}
	return out
}

// edits is the Levenshtein distance of two names.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
