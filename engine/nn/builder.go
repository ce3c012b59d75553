// Package nn lays a model's forward pass down as a graph: PyTorch's layers, written as functions
// that append nodes instead of computing.
//
// Phases, as in PyTorch: an architecture first registers its modules, in the order their
// constructors would ("__init__"), then runs its forward pass once over symbolic values. Between
// [Module.Enter] and [Module.Leave] a module's inputs and outputs become access points; the values
// that come back from them are the marked ones, so an edit of an access point is felt by everything
// that follows.
//
// No size of a batch or a sequence enters the graph: one graph serves inputs of all shapes, and the
// part of it between a module's input and output can be run again on other tensors. The builder
// tracks shapes symbolically all the same, which finds an architecture's mistakes as it is built.
//
// Errors: an architecture that does not fit together (sizes that do not match, a module left
// without being entered) stops the build, and [Build] returns the error. The package holds no
// tensors and knows no libtorch.
package nn

import (
	"fmt"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Variant says which of a model's two graphs is built.
type Variant struct {
	// Masked: rows are padded on the left, so positions differ by row and attention takes a mask.
	// Else every row begins at position 0 and attention is causal.
	Masked bool
	// Explicit: attention is computed step by step, so that its scores and pattern are there.
	Explicit bool
	// Cached: one step of generation. Keys and values go into a cache, and the head sees the last token
	// alone. Decode: the step is not the first, so attention looks into the cache.
	Cached, Decode bool
	// Training: dropout is at work.
	Training bool
}

// ParamSpec is a tensor that a model's graph names: a parameter, or a buffer computed at load.
type ParamSpec struct {
	Name       string           // full name, as in the checkpoint: "transformer.wte.weight"
	Shape      []int64          // sizes
	DType      string           // torch's name; "" is the model's own
	Tied       string           // the parameter it shares its tensor with, or ""
	Persistent bool             // stands in the checkpoint
	Compute    func() []float32 // values, row-major, of a buffer that is not persistent
}

// Builder collects a model while it is built. It is not safe for concurrent use.
type Builder struct {
	variant Variant
	model   graph.Model
	params  []ParamSpec
	known   map[string]int      // parameter name -> index into params
	used    map[string]graph.ID // parameter name -> its node
	inputs  map[string]Value
	paths   map[string]bool
	entered []*Module // modules whose forward pass is under way, outermost first
	caches  int       // attention layers so far that have a cache
	own     bool      // operators go in that only this variant has
	varies  map[graph.ID]bool
}

// buildError carries an error from deep inside a forward pass to Build.
type buildError struct{ err *fault.Error }

// Build runs an architecture's build function and gives the finished graph and the tensors it
// needs, in registration order.
func Build(v Variant, build func(*Builder)) (m *graph.Model, params []ParamSpec, err error) {
	b := &Builder{
		variant: v,
		known:   map[string]int{},
		used:    map[string]graph.ID{},
		inputs:  map[string]Value{},
		paths:   map[string]bool{},
		varies:  map[graph.ID]bool{},
	}
	defer func() {
		if r := recover(); r != nil {
			e, ok := r.(buildError)
			if !ok {
				panic(r)
			}
			m, params, err = nil, nil, e.err
		}
	}()
	build(b)
	if len(b.entered) > 0 {
		b.fail("module %q was entered and never left", b.path())
	}
	for _, p := range b.params {
		if _, ok := b.known[p.Tied]; p.Tied != "" && !ok {
			b.fail("%s is tied to %s, which the model does not have", p.Name, p.Tied)
		}
	}
	b.source()
	b.model.Index()
	return &b.model, b.params, nil
}

// source makes the result of every operator an internal value of the module it runs in, named by the
// operator and its number there: transformer.h.0.mlp.source.add_0. Operators that other variants lack
// are left out, so that names and order are those of all.
func (b *Builder) source() {
	counts := map[string]int{}
	points := make([]graph.Point, 0, len(b.model.Points)+len(b.model.Nodes))
	at := 0
	for id := range b.model.Nodes {
		n := &b.model.Nodes[id]
		if n.Kind != graph.KindCall || b.varies[graph.ID(id)] {
			continue
		}
		_, name, _ := strings.Cut(n.Op, "::")
		name, _, _ = strings.Cut(name, ".")
		key := join(n.Path, "source."+name)
		number := counts[key]
		counts[key]++
		if n.Shape == nil { // several results
			continue
		}
		for at < len(b.model.Points) && int(b.model.Points[at].At) <= id {
			points = append(points, b.model.Points[at])
			at++
		}
		points = append(points, graph.Point{Internal: true, Path: fmt.Sprintf("%s_%d", key, number), Port: graph.PortOutput,
			Tree: graph.Ref(graph.ID(id)), At: graph.ID(id)})
	}
	b.model.Points = append(points, b.model.Points[at:]...)
}

// fail stops the build.
func (b *Builder) fail(format string, args ...any) {
	err := fault.New(fault.ModelLoad, "the model does not fit together: "+format, args...)
	err.Path = b.path()
	panic(buildError{err})
}

// path is the module whose forward pass is under way.
func (b *Builder) path() string {
	if len(b.entered) == 0 {
		return ""
	}
	return b.entered[len(b.entered)-1].path
}

// Variant is the variant being built.
func (b *Builder) Variant() Variant { return b.variant }

// InputIDs is the graph input "input_ids": token ids, int64 [batch, seq].
func (b *Builder) InputIDs() Value {
	return b.input("input_ids", "int64", graph.Shape{graph.DimBatch, graph.DimSeq})
}

// PositionIDs is the graph input "position_ids": int64, [1, seq] in the causal variant, where all
// rows share them, and [batch, seq] in the masked one.
func (b *Builder) PositionIDs() Value {
	rows := graph.Dim(1)
	if b.variant.Masked {
		rows = graph.DimBatch
	}
	return b.input("position_ids", "int64", graph.Shape{rows, graph.DimSeq})
}

// AttentionMask is the graph input "attention_mask": bool [batch, 1, seq, seq], true where a query
// (third axis) may look at a key (fourth). In the causal variant there is none. In generation the last
// axis has all tokens so far.
func (b *Builder) AttentionMask() Value {
	if !b.variant.Masked {
		return None
	}
	if b.variant.Cached {
		return b.input("attention_mask", "bool", graph.Shape{graph.DimBatch, 1, graph.DimSeq, graph.DimTotal})
	}
	return b.input("attention_mask", "bool", graph.Shape{graph.DimBatch, 1, graph.DimSeq, graph.DimSeq})
}

// Number is the graph input of that name that is an int: "past" tokens of earlier steps, "seq" tokens
// of this one, and their sum "total".
func (b *Builder) number(name string) graph.Arg {
	return b.input(name, "", nil).arg()
}

// causalMask is the graph input "causal_mask": bool [1, 1, seq, seq], true where a key (fourth axis)
// does not come after the query (third).
func (b *Builder) causalMask() Value {
	return b.input("causal_mask", "bool", graph.Shape{1, 1, graph.DimSeq, graph.DimSeq})
}

// Internal makes a value in the middle of a module's forward pass an access point of its own, under a
// name below the module's.
func (m *Module) Internal(name string, v *Value) {
	at := len(m.b.model.Nodes)
	own := &Module{b: m.b, path: join(m.path, name)}
	tree := own.mark(graph.PortOutput, "", Arg(v))
	m.b.model.Points = append(m.b.model.Points,
		graph.Point{Internal: true, Path: own.path, Port: graph.PortOutput, Tree: tree, At: graph.ID(at)})
}

// hidden notes an internal value that this variant does not compute.
func (m *Module) hidden(name string, shape graph.Shape, dtype string) {
	m.b.model.Hidden = append(m.b.model.Hidden,
		graph.Hidden{Path: join(m.path, name), At: graph.ID(len(m.b.model.Nodes)), Shape: shape, DType: dtype})
}

func (b *Builder) input(name, dtype string, shape graph.Shape) Value {
	if v, ok := b.inputs[name]; ok {
		return v
	}
	v := b.node(graph.Node{Kind: graph.KindInput, Op: name, Shape: shape, DType: dtype})
	b.inputs[name] = v
	return v
}

// node appends a node and gives its value, whose shape and dtype are the node's.
func (b *Builder) node(n graph.Node) Value {
	n.Pos = -1
	if n.Kind != graph.KindMark {
		n.Path = b.path()
	}
	if b.own {
		b.varies[graph.ID(len(b.model.Nodes))] = true
	}
	b.model.Nodes = append(b.model.Nodes, n)
	return Value{b: b, id: graph.ID(len(b.model.Nodes) - 1), shape: n.Shape, dtype: n.DType}
}

// call appends an ATen call.
func (b *Builder) call(op string, shape graph.Shape, dtype string, args []graph.Arg, kwargs ...graph.Kwarg) Value {
	if !strings.Contains(op, "::") {
		op = "aten::" + op
	}
	return b.node(graph.Node{Kind: graph.KindCall, Op: op, Args: args, Kwargs: kwargs, Shape: shape, DType: dtype})
}

// Param is a parameter or buffer of a module.
type Param struct {
	b     *Builder
	index int
}

// Value is the parameter's tensor, as a value of the graph.
func (p Param) Value() Value {
	spec := &p.b.params[p.index]
	id, ok := p.b.used[spec.Name]
	if !ok {
		shape := make(graph.Shape, len(spec.Shape))
		for i, n := range spec.Shape {
			shape[i] = graph.Dim(n)
		}
		v := p.b.node(graph.Node{Kind: graph.KindParam, Op: spec.Name, Shape: shape, DType: spec.DType})
		p.b.used[spec.Name] = v.id
		return v
	}
	n := &p.b.model.Nodes[id]
	return Value{b: p.b, id: id, shape: n.Shape, dtype: n.DType}
}

// Name is the parameter's full name.
func (p Param) Name() string { return p.b.params[p.index].Name }

func (b *Builder) register(m *Module, name string, spec ParamSpec) Param {
	spec.Name = join(m.path, name)
	if _, ok := b.known[spec.Name]; ok {
		b.fail("there are two parameters named %s", spec.Name)
	}
	for _, n := range spec.Shape {
		if n < 1 {
			b.fail("parameter %s would have sizes %v", spec.Name, spec.Shape)
		}
	}
	b.known[spec.Name] = len(b.params)
	b.params = append(b.params, spec)
	own := &b.model.Modules[m.index].Params
	*own = append(*own, name)
	return Param{b: b, index: len(b.params) - 1}
}

// Module is one module of a model. Architectures and layers embed it.
type Module struct {
	b     *Builder
	path  string
	index int
	ran   [2]bool // by port: it has its access point
}

// Model registers the model itself, whose path is "".
func (b *Builder) Model(class string) *Module { return b.module("", class, "") }

// Child registers a module under another. extra is what PyTorch's repr shows in its parentheses.
// The order of calls is the order of registration.
func (m *Module) Child(name, class, extra string) *Module {
	return m.b.module(join(m.path, name), class, extra)
}

// List registers a ModuleList and fills it: make is called with the list, each index and its name.
func List[T any](m *Module, name string, n int, make func(list *Module, name string, i int) T) []T {
	list := m.Child(name, "ModuleList", "")
	var items []T
	for i := range n {
		items = append(items, make(list, fmt.Sprint(i), i))
	}
	return items
}

func (b *Builder) module(path, class, extra string) *Module {
	if b.paths[path] {
		b.fail("there are two modules named %q", path)
	}
	b.paths[path] = true
	b.model.Modules = append(b.model.Modules, graph.Module{Path: path, Class: class, Extra: extra})
	return &Module{b: b, path: path, index: len(b.model.Modules) - 1}
}

// Path is the module's path, "" for the model itself.
func (m *Module) Path() string { return m.path }

// Param registers a parameter that stands in the checkpoint, of the model's dtype.
func (m *Module) Param(name string, shape ...int64) Param {
	return m.b.register(m, name, ParamSpec{Shape: shape, Persistent: true})
}

// TiedParam registers a parameter that is another parameter's tensor, by its full name.
func (m *Module) TiedParam(name, tied string, shape ...int64) Param {
	return m.b.register(m, name, ParamSpec{Shape: shape, Persistent: true, Tied: tied})
}

// Buffer registers a float32 buffer that does not stand in the checkpoint: compute gives its
// values, row-major, when the model is loaded. It keeps float32 in models of other dtypes.
func (m *Module) Buffer(name string, shape []int64, compute func() []float32) Param {
	return m.b.register(m, name, ParamSpec{Shape: shape, DType: "float32", Compute: compute})
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// Item is one element of what a module is given or gives: a tensor, None, or a tuple of tensors.
type Item struct {
	name   string
	values []*Value
	tuple  bool
}

// Arg is a positional argument. Once marked, *v is the marked value. nil, and a value that is
// [None], stand for Python's None.
func Arg(v *Value) Item { return Item{values: []*Value{v}} }

// Kwarg is an argument by name.
func Kwarg(name string, v *Value) Item { return Item{name: name, values: []*Value{v}} }

// KwargTuple is a tuple of tensors by name.
func KwargTuple(name string, vs ...*Value) Item { return Item{name: name, values: vs, tuple: true} }

// Field is a field of an object that a module returns.
func Field(name string, v *Value) Item { return Item{name: name, values: []*Value{v}} }

// Enter begins a module's forward pass and makes its inputs an access point.
func (m *Module) Enter(items ...Item) {
	m.b.entered = append(m.b.entered, m)
	at := len(m.b.model.Nodes)
	args, kwargs := graph.List(), graph.Arg{Kind: graph.ArgDict}
	for _, it := range items {
		if it.name == "" {
			args.L = append(args.L, m.mark(graph.PortInput, fmt.Sprintf("args.%d", len(args.L)), it))
			continue
		}
		kwargs.Keys = append(kwargs.Keys, it.name)
		kwargs.L = append(kwargs.L, m.mark(graph.PortInput, "kwargs."+it.name, it))
	}
	tree := graph.Arg{Kind: graph.ArgDict, Keys: []string{"args", "kwargs"}, L: []graph.Arg{args, kwargs}}
	m.point(graph.PortInput, tree, at)
}

// Leave ends the forward pass of a module that returns one tensor, and makes it an access point.
func (m *Module) Leave(v *Value) {
	at := len(m.b.model.Nodes)
	m.leave(m.mark(graph.PortOutput, "", Arg(v)), at)
}

// LeaveTuple ends the forward pass of a module that returns a tuple; nil is None.
func (m *Module) LeaveTuple(vs ...*Value) {
	at := len(m.b.model.Nodes)
	tree := graph.Tuple()
	for i, v := range vs {
		tree.L = append(tree.L, m.mark(graph.PortOutput, fmt.Sprint(i), Arg(v)))
	}
	m.leave(tree, at)
}

// LeaveObject ends the forward pass of a module that returns an object with named fields.
func (m *Module) LeaveObject(class string, fields ...Item) {
	at := len(m.b.model.Nodes)
	tree := graph.Arg{Kind: graph.ArgDict, S: class}
	for _, f := range fields {
		tree.Keys = append(tree.Keys, f.name)
		tree.L = append(tree.L, m.mark(graph.PortOutput, f.name, f))
	}
	m.leave(tree, at)
}

func (m *Module) leave(tree graph.Arg, at int) {
	if len(m.b.entered) == 0 || m.b.entered[len(m.b.entered)-1] != m {
		m.b.fail("module %q is left while %q is under way", m.path, m.b.path())
	}
	m.point(graph.PortOutput, tree, at)
	m.b.entered = m.b.entered[:len(m.b.entered)-1]
}

func (m *Module) point(port graph.Port, tree graph.Arg, at int) {
	if ran := &m.ran[port]; *ran {
		m.b.fail("module %q runs twice", m.path)
	} else {
		*ran = true
	}
	m.b.model.Points = append(m.b.model.Points, graph.Point{Path: m.path, Port: port, Tree: tree, At: graph.ID(at)})
}

// mark puts a Mark node on each tensor of an item and makes the caller's variables name the marks.
func (m *Module) mark(port graph.Port, leaf string, it Item) graph.Arg {
	one := func(leaf string, v *Value) graph.Arg {
		if v == nil || v.IsNone() {
			return graph.Null()
		}
		*v = m.b.node(graph.Node{Kind: graph.KindMark, Path: m.path, Port: port, Leaf: leaf,
			Args: []graph.Arg{v.arg()}, Shape: v.shape, DType: v.dtype})
		return v.arg()
	}
	if !it.tuple {
		return one(leaf, it.values[0])
	}
	tuple := graph.Tuple()
	for i, v := range it.values {
		tuple.L = append(tuple.L, one(fmt.Sprintf("%s.%d", leaf, i), v))
	}
	return tuple
}

// shapeText prints a symbolic shape: [B, S, 768].
func shapeText(s graph.Shape) string {
	parts := make([]string, len(s))
	for i, d := range s {
		switch d {
		case graph.DimBatch:
			parts[i] = "B"
		case graph.DimSeq:
			parts[i] = "S"
		case graph.DimTotal:
			parts[i] = "T"
		default:
			parts[i] = fmt.Sprint(int64(d))
		}
	}
	return "[" + strings.Join(parts, ", ") + "]"
}
