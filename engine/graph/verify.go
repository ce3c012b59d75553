package graph

import (
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Verify holds a trace to the rules of the representation and to the model it speaks of: nodes have
// the arguments their kind wants, values are used after they are defined, invokes and constants
// are there and values go to later invokes only, masks fit their rows, and modules, access points and their tensors exist. nconsts is
// how many constants travel beside the graph.
//
// Errors have code Graph where the graph itself is wrong, Input where an invoke's rows are, and
// ModulePath where it names what the model does not have; they carry the node, the invoke, the
// step and the user's line. The order of reads and writes, token ids and operators' schemas are
// checked later, by those who know.
func Verify(g *Graph, m *Model, nconsts int) error { return VerifyMore(g, m, nconsts, 0, 0) }

// VerifyMore is Verify for a graph whose first invokes and nodes have been verified before.
func VerifyMore(g *Graph, m *Model, nconsts, invokes, nodes int) error {
	for i := invokes; i < len(g.Invokes); i++ {
		if err := verifyInvoke(&g.Invokes[i]); err != nil {
			err.Invoke = i
			return err
		}
		if err := verifyEdit(g, i); err != nil {
			err.Invoke = i
			return err
		}
	}
	v := verifier{nodes: g.Nodes}
	for i := nodes; i < len(g.Nodes); i++ {
		n := &g.Nodes[i]
		err := v.node(ID(i))
		if err == nil {
			err = verifyInTrace(g, m, n, nconsts)
		}
		if err != nil {
			err.Node, err.Invoke, err.Pos = i, int(n.Invoke), g.PosOf(n)
			if r := n.Kind.rule(); r != nil && r.place {
				err.Step = int(n.Step)
			}
			return err
		}
	}
	return nil
}

func verifyInvoke(in *Invoke) *fault.Error {
	for r, row := range in.Rows {
		if len(row) == 0 {
			return fault.New(fault.Input, "row %d has no tokens", r).WithHint("Give a prompt of at least one token.")
		}
	}
	if in.Masks == nil {
		return nil
	}
	if len(in.Masks) != len(in.Rows) {
		return fault.New(fault.Input, "there are %d rows and %d attention masks", len(in.Rows), len(in.Masks))
	}
	for r, mask := range in.Masks {
		if len(mask) != len(in.Rows[r]) {
			return fault.New(fault.Input, "row %d has %d tokens and its attention mask has %d", r, len(in.Rows[r]), len(mask))
		}
		for _, bit := range mask {
			if bit != 0 && bit != 1 {
				return fault.New(fault.Input, "the attention mask of row %d holds %d, which is neither 0 nor 1", r, bit)
			}
		}
	}
	return nil
}

// verifyEdit checks that an edit has something to edit.
func verifyEdit(g *Graph, i int) *fault.Error {
	switch in := &g.Invokes[i]; {
	case in.Edit && (in.Rows != nil || in.Masks != nil):
		return fault.New(fault.Graph, "an edit has rows of its own")
	case in.Edit && (g.Edited(i) < 0 || g.Invokes[g.Edited(i)].WholeBatch()):
		return fault.New(fault.Graph, "an edit is followed by no invoke with rows")
	}
	return nil
}

// verifier checks what traces and models have in common.
type verifier struct{ nodes []Node }

// node checks the form of a node and that what it uses stands before it.
func (v *verifier) node(id ID) *fault.Error {
	n := &v.nodes[id]
	r := n.Kind.rule()
	if r == nil {
		return fault.New(fault.Graph, "there are no nodes of %s", n.Kind)
	}
	if !r.open {
		if len(n.Args) != len(r.params) || len(n.Kwargs) != 0 {
			return fault.New(fault.Graph, "a node of kind %s has %d arguments instead of %d", n.Kind, len(n.Args)+len(n.Kwargs), len(r.params))
		}
		for i, p := range r.params {
			if !p.kinds.has(n.Args[i].Kind) {
				return fault.New(fault.Graph, "%s is %s instead of %s", p.what, n.Args[i].Kind, p.wanted)
			}
		}
	}
	for i := range n.Args {
		if err := v.arg(&n.Args[i], id, 0); err != nil {
			return err
		}
	}
	for i := range n.Kwargs {
		if k := &n.Kwargs[i]; !isName(k.Name) {
			return fault.New(fault.Graph, "%q is not the name of an argument", k.Name)
		} else if err := v.arg(&k.Arg, id, 0); err != nil {
			return err
		}
	}
	switch n.Kind {
	case KindCall:
		if !isOperator(n.Op) {
			return fault.New(fault.Graph, "%q is not the name of an operator", n.Op).
				WithHint(`Operators are named as in PyTorch's schemas: "aten::add" or "aten::add.Tensor".`)
		}
	case KindTrack:
		if how := n.Args[1].I; how < TrackRead || how > TrackRetain {
			return fault.New(fault.Graph, "it tracks to the degree %d, which there is not", how)
		}
	case KindGrad, KindSetGrad, KindEnd:
		pass := n.Args[0].Ref
		if n.Kind != KindEnd {
			pass = n.Args[1].Ref
		}
		if of := v.nodes[pass].Kind; of != KindBackward {
			return fault.New(fault.Graph, "%%%d, of kind %s, is no backward pass", pass, of)
		}
	case KindItem:
		switch of := v.nodes[n.Args[0].Ref].Kind; of {
		case KindCall, KindModule, KindItem, KindFetch:
		default:
			return fault.New(fault.Graph, "%%%d, of kind %s, has no elements to take", n.Args[0].Ref, of)
		}
	}
	return nil
}

func (v *verifier) arg(a *Arg, id ID, depth int) *fault.Error {
	switch a.Kind {
	case ArgRef:
		if a.Ref < 0 || a.Ref >= id {
			return fault.New(fault.Graph, "it uses value %d, which does not come before it", a.Ref)
		}
		if of := v.nodes[a.Ref].Kind; of.rule().void {
			return fault.New(fault.Graph, "it uses value %d, but a node of kind %s has no value", a.Ref, of)
		}
	case ArgSlice:
		if len(a.L) != 3 {
			return fault.New(fault.Graph, "a slice has %d parts instead of 3", len(a.L))
		}
		for i := range a.L {
			if !aBound.has(a.L[i].Kind) {
				return fault.New(fault.Graph, "a slice is bounded by %s, which is neither an int nor None", a.L[i].Kind)
			}
		}
	case ArgDict:
		if len(a.Keys) != len(a.L) {
			return fault.New(fault.Graph, "a dict has %d keys and %d values", len(a.Keys), len(a.L))
		}
	default:
		if int(a.Kind) >= len(argKindNames) {
			return fault.New(fault.Graph, "there are no arguments of kind %d", a.Kind)
		}
	}
	if len(a.L) > 0 && depth >= MaxNesting {
		return fault.New(fault.Graph, "an argument is nested more than %d deep", MaxNesting)
	}
	for i := range a.L {
		if err := v.arg(&a.L[i], id, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// verifyInTrace checks what a node of a trace says about its surroundings.
func verifyInTrace(g *Graph, m *Model, n *Node, nconsts int) *fault.Error {
	if !n.Kind.rule().trace {
		return fault.New(fault.Graph, "a trace holds no %s nodes", n.Kind)
	}
	if n.Invoke < 0 || int(n.Invoke) >= len(g.Invokes) {
		return fault.New(fault.Graph, "it belongs to invoke %d of %d", n.Invoke, len(g.Invokes))
	}
	if n.Step < 0 {
		return fault.New(fault.Graph, "it names step %d", n.Step)
	}
	later, foreign := NoID, NoID
	n.Refs(func(id ID) {
		from := g.Nodes[id].Invoke
		if from > n.Invoke {
			later = id
		}
		if from != n.Invoke && (g.Invokes[from].Edit || g.Invokes[n.Invoke].Edit) {
			foreign = id
		}
	})
	if foreign != NoID {
		return fault.New(fault.Graph, "values of an edit stay in it, but a line of invoke %d uses value %d", n.Invoke, foreign)
	}
	if later != NoID {
		return fault.New(fault.Graph, "a line of invoke %d uses value %d, which is of invoke %d", n.Invoke, later, g.Nodes[later].Invoke).
			WithHint("Values go from an invoke to later ones only: change the order of the two.")
	}
	switch n.Kind {
	case KindConst:
		if n.Index < 0 || int(n.Index) >= nconsts {
			return fault.New(fault.Graph, "it names constant %d of %d", n.Index, nconsts)
		}
	case KindModule:
		if err := verifyPoint(m, n.Path, PortInput); err != nil {
			return err
		}
		return verifyPoint(m, n.Path, PortOutput)
	case KindRead, KindWrite:
		if n.Port > PortOutput {
			return fault.New(fault.Graph, "modules have no %s", n.Port)
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
	var e *fault.Error
	if m.HasModule(path) {
		e = fault.New(fault.ModulePath, "module %q never runs by itself in a forward pass, so it has no %s", path, port).
			WithHint("Use the module that contains it, or, for a list of modules, one of its elements.")
	} else {
		e = fault.New(fault.ModulePath, "the model has no module %q", path)
		if near := Nearest(path, m.paths(), 3); len(near) > 0 {
			e.Hint = "Nearest: " + strings.Join(near, ", ") + "."
		}
	}
	e.Path = path
	return e
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
	found := false
	m.Points[p].Tree.Refs(func(id ID) { found = found || m.Nodes[id].Leaf == n.Leaf })
	if found {
		return nil
	}
	var leaves []string
	m.Points[p].Tree.Refs(func(id ID) { leaves = append(leaves, m.Nodes[id].Leaf) })
	var e *fault.Error
	switch {
	case len(leaves) == 0:
		e = fault.New(fault.ModulePath, "the %s of %q holds no tensors", n.Port, n.Path)
	case slices.Contains(leaves, ""):
		e = fault.New(fault.ModulePath, "the %s of %q is a bare tensor and has no element %q", n.Port, n.Path, n.Leaf)
	case n.Leaf == "":
		e = fault.New(fault.ModulePath, "the %s of %q is not a bare tensor", n.Port, n.Path)
	default:
		e = fault.New(fault.ModulePath, "the %s of %q has no tensor %q", n.Port, n.Path, n.Leaf)
	}
	if len(leaves) > 0 && leaves[0] != "" {
		e.Hint = "It has: " + strings.Join(leaves, ", ") + "."
	}
	e.Path = n.Path
	return e
}

// isName says whether a string can name an argument. A NUL, above all, must not get through: names
// cross to C one after another with NULs between.
func isName(s string) bool {
	for i, c := range s {
		if c != '_' && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != ""
}

// isOperator says whether a string looks like "namespace::name" or "namespace::name.overload".
func isOperator(s string) bool {
	namespace, name, ok := strings.Cut(s, "::")
	name, overload, dotted := strings.Cut(name, ".")
	return ok && isName(namespace) && isName(name) && (!dotted || isName(overload))
}
