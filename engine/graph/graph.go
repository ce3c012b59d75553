// Package graph is the intermediate representation: what a trace records and what a native
// model is built into are the same thing, a list of nodes in program order.
//
// Phases: a recorder (Python, or package proxy) appends nodes to a [Graph]; an architecture
// builds a [Model] once; package plan splices the first into the second. Values are SSA: node i
// defines value i. Mutation is a node, in program order, and aliasing is PyTorch's.
//
// The package is pure Go and holds no tensors: constants are numbered and travel beside the
// graph. A graph is data: it can be printed, verified, stored and sent.
package graph

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// ID names a value: the node that defines it.
type ID int32

// NoID is no value.
const NoID ID = -1

// Kind says what a node does.
type Kind uint8

// The kinds of nodes. Those below KindParam are recorded by users and have a wire form; the
// rest stand only in models.
const (
	KindCall     Kind = iota // an ATen op by name: Op, Args, Kwargs
	KindIndex                // Args[0][Args[1]] with Python's tensor indexing
	KindSetIndex             // Args[0][Args[1]] = Args[2], in place
	KindItem                 // an element of a container or multiple result: Args[0][Args[1]]
	KindRead                 // the value at an access point: Path, Port, Step, Leaf
	KindWrite                // rebinds an access point to Args[0]: Path, Port, Step, Leaf
	KindModule               // calls module Path of the model on Args, Kwargs
	KindConst                // the tensor numbered Index among the constants
	KindSave                 // keeps Args[0] (any tree of values) for the user
	KindTrack                // lets autograd follow Args[0] as Args[1] says: a Track
	KindBackward             // a backward pass: see the rules
	KindGrad                 // the gradient of Args[0] in the backward pass Args[1]
	KindSetGrad              // makes it Args[2] for what the pass goes on to
	KindEnd                  // ends the backward pass Args[0], which was open for lines

	KindParam // model: the parameter or buffer named Op
	KindInput // model: a graph input named Op ("input_ids", "position_ids", "attention_mask")
	KindMark  // model: access point Path, Port, Leaf holds Args[0]; the value is the same tensor
	KindFetch // model: the tensors of access point Index, which somebody else computes and hands over
)

// Track is how far autograd follows a value.
const (
	TrackRead    = 0 // so that gradients can be read in the trace
	TrackHistory = 1 // and what is saved keeps its history
	TrackRetain  = 2 // and the value keeps its gradient
)

// Port is the side of a module an access point lies on.
type Port uint8

// The ports.
const (
	PortInput Port = iota
	PortOutput
)

// ArgKind says what an [Arg] holds.
type ArgKind uint8

// The kinds of arguments. The numbers from ArgRef on are the tags of the wire form.
const (
	ArgNone   ArgKind = iota
	ArgBool           // I: 0 or 1
	ArgInt            // I
	ArgFloat          // F
	ArgString         // S
	ArgRef            // Ref
	ArgList           // L
	ArgTuple          // L
	ArgDict           // Keys, L; S names the class of an object with fields, or is empty
	ArgSlice          // L: start, stop, step
	ArgEllipsis
	ArgDType        // S: "float32"
	ArgDevice       // S: "cuda:0"
	ArgLayout       // S: "strided"
	ArgMemoryFormat // S: "contiguous_format"
	ArgComplex      // F real part, G imaginary part
)

// Arg is an argument of a node: a literal, a value, or a container of arguments.
type Arg struct {
	Kind ArgKind
	Ref  ID
	I    int64
	F, G float64
	S    string
	L    []Arg
	Keys []string
}

// Kwarg is an argument by name.
type Kwarg struct {
	Name string
	Arg  Arg
}

// Mode is the autograd state of the user's line.
type Mode uint8

// Mode bits.
const (
	ModeGrad      Mode = 1 << iota // torch.is_grad_enabled()
	ModeInference                  // torch.is_inference_mode_enabled()
)

// Node is one step of a program. Which fields it uses depends on its kind.
type Node struct {
	Kind   Kind
	Op     string // Call: "aten::add" (overload chosen when it runs) or "aten::add.Tensor"
	Args   []Arg
	Kwargs []Kwarg
	Path   string // module path, "" for the model itself
	Port   Port
	Leaf   string // which tensor of a structured access point: "" if bare, else "0", "1.0", "logits"
	Step   int32  // which call of the module, 0 the first
	Index  int32  // Const: number of the constant
	Invoke int32  // the invoke this line belongs to
	Pos    int32  // index into Graph.Positions, -1 unknown
	Mode   Mode
	Shape  Shape // Mark: symbolic sizes
	DType  string
}

// Invoke is one input of a trace: rows of token ids, which may be of different lengths, or no
// rows at all for an invoke that looks at the whole batch.
type Invoke struct {
	Rows  [][]int64
	Masks [][]int64 // attention masks beside Rows, or nil where every token counts
	// Edit marks a program that the next invoke which is none brings along: it has no rows of its own
	// and works on that one's, where the two meet ahead of it.
	Edit bool
	// The autograd state that the model runs under, where it is not the ordinary one.
	NoGrad, Inference bool
}

// CountTokens is how many tokens rows have together.
func CountTokens(rows [][]int64) (n int) {
	for _, row := range rows {
		n += len(row)
	}
	return n
}

// Tokens is how many the rows of all invokes have together.
func (g *Graph) Tokens() (n int) {
	for i := range g.Invokes {
		n += CountTokens(g.Invokes[i].Rows)
	}
	return n
}

// Mode is the autograd state that the model runs under.
func (v Invoke) Mode() Mode {
	m := ModeGrad
	if v.NoGrad {
		m = 0
	}
	if v.Inference {
		m |= ModeInference
	}
	return m
}

// WholeBatch reports whether the invoke has no input of its own.
func (v Invoke) WholeBatch() bool { return len(v.Rows) == 0 && !v.Edit }

// Edited is the invoke that an edit belongs to, and else the invoke itself; -1 where an edit has none.
func (g *Graph) Edited(invoke int) int {
	for i := invoke; i < len(g.Invokes); i++ {
		if !g.Invokes[i].Edit {
			return i
		}
	}
	return -1
}

// Graph is a recorded trace.
type Graph struct {
	Nodes     []Node
	Invokes   []Invoke
	Positions []fault.Pos
}

// PosOf is the user's line of a node, zero where unknown.
func (g *Graph) PosOf(n *Node) fault.Pos {
	if n.Pos < 0 || int(n.Pos) >= len(g.Positions) {
		return fault.Pos{}
	}
	return g.Positions[n.Pos]
}

// Dim is a size that may depend on the input.
type Dim int64

// Symbolic sizes.
const (
	DimBatch Dim = -1 // number of rows
	DimSeq   Dim = -2 // number of tokens of the longest row
	DimTotal Dim = -3 // number of tokens of the longest row so far, those of earlier steps included
	DimRoom  Dim = -4 // number of tokens that a cache has room for
)

// Shape is a list of sizes.
type Shape []Dim

// Find gives the first axis of a symbolic size, or -1.
func (s Shape) Find(d Dim) int {
	for i, x := range s {
		if x == d {
			return i
		}
	}
	return -1
}

// Concrete replaces symbolic sizes.
func (s Shape) Concrete(batch, seq int64) []int64 {
	out := make([]int64, len(s))
	for i, d := range s {
		switch d {
		case DimBatch:
			out[i] = batch
		case DimSeq:
			out[i] = seq
		default:
			out[i] = int64(d)
		}
	}
	return out
}

// Point is an access point of a model: one port of one module, at its place in the forward pass.
//
// An internal one is no port: it is a value in the middle of a module's forward pass, the output of a
// name below the module's own (transformer.h.0.attn.heads.q, transformer.h.0.mlp.source.add_0).
type Point struct {
	Internal bool
	Path     string
	Port     Port
	Tree     Arg // structure of the value; its refs are the Mark nodes, one a leaf
	At       ID  // first node that runs after the point's value exists
}

// Module describes one module of a model, in registration order.
type Module struct {
	Path   string
	Class  string   // PyTorch's class name
	Extra  string   // what PyTorch's repr shows in the parentheses
	Params []string // names of its own parameters and buffers, without the path
}

// Model is a forward pass as a graph. It does not depend on batch or sequence size.
type Model struct {
	Nodes   []Node
	Points  []Point // in the order the forward pass meets them
	Modules []Module
	Hidden  []Hidden
	points  map[pointKey]int
}

// Hidden is an internal value that the model does not compute, because an operator does more than one
// step at once; another variant of the model has it as an internal point.
type Hidden struct {
	Path  string
	At    ID // the first node that runs after it would be there
	Shape Shape
	DType string
}

type pointKey struct {
	path string
	port Port
}

// Index builds the look-up tables; call it once the model is complete.
func (m *Model) Index() {
	m.points = make(map[pointKey]int, len(m.Points))
	for i, p := range m.Points {
		m.points[pointKey{p.Path, p.Port}] = i
	}
}

// Point finds an access point: its number, or false where the module has none.
func (m *Model) Point(path string, port Port) (int, bool) {
	i, ok := m.points[pointKey{path, port}]
	return i, ok
}

// Hides reports whether a path names a value that only another variant of the model computes.
func (m *Model) Hides(path string) bool {
	return slices.ContainsFunc(m.Hidden, func(h Hidden) bool { return h.Path == path })
}

// HasModule reports whether the model has a module of that path.
func (m *Model) HasModule(path string) bool {
	for i := range m.Modules {
		if m.Modules[i].Path == path {
			return true
		}
	}
	return false
}

// Ref is the argument that names a value.
func Ref(id ID) Arg { return Arg{Kind: ArgRef, Ref: id} }

// Int is an integer argument.
func Int(i int64) Arg { return Arg{Kind: ArgInt, I: i} }

// Float is a floating-point argument.
func Float(f float64) Arg { return Arg{Kind: ArgFloat, F: f} }

// Bool is a boolean argument.
func Bool(b bool) Arg {
	if b {
		return Arg{Kind: ArgBool, I: 1}
	}
	return Arg{Kind: ArgBool}
}

// String is a string argument.
func String(s string) Arg { return Arg{Kind: ArgString, S: s} }

// Null is None.
func Null() Arg { return Arg{} }

// List is a list argument.
func List(items ...Arg) Arg { return Arg{Kind: ArgList, L: items} }

// Tuple is a tuple argument.
func Tuple(items ...Arg) Arg { return Arg{Kind: ArgTuple, L: items} }

// Refs calls f for each value an argument names.
func (a *Arg) Refs(f func(ID)) {
	switch a.Kind {
	case ArgRef:
		f(a.Ref)
	case ArgList, ArgTuple, ArgDict, ArgSlice:
		for i := range a.L {
			a.L[i].Refs(f)
		}
	}
}

// Replaced is the argument with each value it names replaced by what f gives for it.
func (a *Arg) Replaced(f func(ID) Arg) Arg {
	out := *a
	switch a.Kind {
	case ArgRef:
		return f(a.Ref)
	case ArgList, ArgTuple, ArgDict, ArgSlice:
		out.L = make([]Arg, len(a.L))
		for i := range a.L {
			out.L[i] = a.L[i].Replaced(f)
		}
	}
	return out
}

// ReplacedArgs copies arguments with their references replaced.
func ReplacedArgs(args []Arg, f func(ID) Arg) []Arg {
	out := make([]Arg, len(args))
	for i := range args {
		out[i] = args[i].Replaced(f)
	}
	return out
}

// ReplacedKwargs does so with those by name.
func ReplacedKwargs(kwargs []Kwarg, f func(ID) Arg) []Kwarg {
	if len(kwargs) == 0 {
		return nil
	}
	out := make([]Kwarg, len(kwargs))
	for i := range kwargs {
		out[i] = Kwarg{Name: kwargs[i].Name, Arg: kwargs[i].Arg.Replaced(f)}
	}
	return out
}

// Refs calls f for each value a node uses.
func (n *Node) Refs(f func(ID)) {
	for i := range n.Args {
		n.Args[i].Refs(f)
	}
	for i := range n.Kwargs {
		n.Kwargs[i].Arg.Refs(f)
	}
}
