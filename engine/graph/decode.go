package graph

import (
	"slices"
	"unicode/utf8"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/tinylib/msgp/msgp"
)

// Decode reads a graph in wire form. The bytes may come from anyone: whatever they are, the result
// is a graph within the limits (MaxNodes and its neighbours) whose references point backwards, or an
// error of code Graph that names the node. It says nothing about a model: see [Verify].
func Decode(data []byte) (*Graph, error) {
	g := &Graph{Nodes: []Node{}, Invokes: []Invoke{}, Positions: []fault.Pos{}}
	if err := DecodeMore(g, data); err != nil {
		return nil, err
	}
	return g, nil
}

// DecodeMore reads what continues a graph: invokes, nodes and positions in wire form, whose numbers go
// on where those of the graph end. Where it fails the graph stays as it was.
func DecodeMore(g *Graph, data []byte) error {
	d := decoder{what: "graph", rest: data, node: NoID}
	more := *g
	d.graph(&more)
	if err := d.end(); err != nil {
		return err
	}
	*g = more
	return nil
}

// DecodeInvokes reads the invokes of a graph in wire form, and gives what follows them: nodes and positions, unread.
func DecodeInvokes(data []byte) ([]Invoke, []byte, error) {
	d := decoder{what: "graph", rest: data, node: NoID}
	g := &Graph{}
	d.head()
	d.invokes(g)
	if d.err != nil {
		return nil, nil, d.err
	}
	for i := range g.Invokes {
		if err := verifyInvoke(&g.Invokes[i]); err != nil {
			return nil, nil, err
		}
	}
	return g.Invokes, d.rest, nil
}

// decoder reads MessagePack from front to back. The first error stops it: from then on every method
// gives zero values and reads nothing.
type decoder struct {
	what   string // what is being read, for errors
	rest   []byte
	node   ID    // the one being read, for errors; NoID elsewhere
	refs   int64 // references must be below it
	args   int   // arguments so far
	tokens int   // tokens and rows so far
	err    *fault.Error
	names  map[string]string // operators and paths recur: one string each
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fault.New(fault.Graph, "the "+d.what+" cannot be read: "+format, args...)
		d.err.Node = int(d.node)
	}
}

// end gives the outcome, once everything should have been read.
func (d *decoder) end() error {
	if d.err == nil && len(d.rest) > 0 {
		d.fail("%d bytes follow its end", len(d.rest))
	}
	if d.err != nil {
		return d.err
	}
	return nil
}

// check notes the error of a read of something, and otherwise goes on behind it.
func (d *decoder) check(what string, rest []byte, err error) bool {
	switch err {
	case nil:
		d.rest = rest
		return true
	case msgp.ErrShortBytes:
		d.fail("it ends in the middle of %s", what)
	default:
		d.fail("something else stands where %s should be", what)
		d.err.Cause = err
	}
	return false
}

// list reads the head of a list whose elements take at least size bytes each, so that a length is
// believed only as far as there are bytes for it.
func (d *decoder) list(what string, limit, size int) int {
	if d.err != nil {
		return 0
	}
	n, rest, err := msgp.ReadArrayHeaderBytes(d.rest)
	if !d.check("the list of "+what, rest, err) {
		return 0
	}
	return d.length(what, n, limit, size)
}

func (d *decoder) length(what string, n uint32, limit, size int) int {
	if int64(n) > int64(limit) {
		d.fail("it has %d %s; %d are allowed", n, what, limit)
		return 0
	}
	if int64(n)*int64(size) > int64(len(d.rest)) {
		d.fail("it is to have %d %s and ends before them", n, what)
		return 0
	}
	return int(n)
}

// parts reads the head of a list of a fixed length.
func (d *decoder) parts(what string, want int) {
	if n := d.list("parts of "+what, 1<<16, 0); d.err == nil && n != want {
		d.fail("%s has %d parts instead of %d", what, n, want)
	}
}

func (d *decoder) isNil() bool {
	if d.err == nil && msgp.IsNil(d.rest) {
		d.rest = d.rest[1:]
		return true
	}
	return false
}

func (d *decoder) bool(what string) bool {
	if d.err != nil {
		return false
	}
	b, rest, err := msgp.ReadBoolBytes(d.rest)
	return d.check(what, rest, err) && b
}

func (d *decoder) int(what string) int64 {
	if d.err != nil {
		return 0
	}
	n, rest, err := msgp.ReadInt64Bytes(d.rest)
	if over, ok := err.(msgp.UintOverflow); ok {
		d.fail("%s is %d, which does not fit 64 bits with a sign", what, over.Value)
		return 0
	}
	if !d.check(what, rest, err) {
		return 0
	}
	return n
}

// small reads an integer of a range.
func (d *decoder) small(what string, low, high int64) int64 {
	n := d.int(what)
	if d.err == nil && (n < low || n > high) {
		d.fail("%s is %d, which is not between %d and %d", what, n, low, high)
	}
	if d.err != nil {
		return low
	}
	return n
}

func (d *decoder) float() float64 {
	if d.err != nil {
		return 0
	}
	f, rest, err := msgp.ReadFloat64Bytes(d.rest)
	d.check("a float", rest, err)
	return f
}

// bytes reads a string, whose bytes stay those of the input.
func (d *decoder) bytes(what string) []byte {
	if d.err != nil {
		return nil
	}
	b, rest, err := msgp.ReadStringZC(d.rest)
	switch {
	case !d.check(what, rest, err):
		return nil
	case len(b) > MaxString:
		d.fail("%s is a string of %d bytes; %d are allowed", what, len(b), MaxString)
	case !utf8.Valid(b):
		d.fail("%s is not UTF-8", what)
	}
	return b
}

// name reads a string that is likely to recur.
func (d *decoder) name(what string) string {
	b := d.bytes(what)
	if s, ok := d.names[string(b)]; ok {
		return s
	}
	if d.names == nil {
		d.names = map[string]string{}
	}
	s := string(b)
	d.names[s] = s
	return s
}

// graph reads the parts of a graph and appends them to g.
func (d *decoder) graph(g *Graph) {
	d.head()
	d.invokes(g)
	d.nodes(g)
}

func (d *decoder) head() {
	d.parts("the graph", 4)
	if v := d.int("the version"); d.err == nil && v != wireVersion {
		d.fail("it is of version %d; this engine reads version %d", v, wireVersion)
		d.err.Hint = "Use the same version of nnsight-go on both sides."
	}
}

func (d *decoder) invokes(g *Graph) {
	n := d.list("invokes", MaxInvokes-len(g.Invokes), minInvoke)
	g.Invokes = slices.Grow(g.Invokes, n)
	for i := 0; i < n && d.err == nil; i++ {
		g.Invokes = append(g.Invokes, d.invoke())
	}
}

func (d *decoder) nodes(g *Graph) {
	n := d.list("nodes", MaxNodes-len(g.Nodes), minNode-1) // a node without parts of its own is refused with its number
	from := len(g.Nodes)
	g.Nodes = append(g.Nodes, make([]Node, n)...)
	for i := from; i < len(g.Nodes) && d.err == nil; i++ {
		d.node, d.refs = ID(i), int64(i)
		d.oneNode(&g.Nodes[i], len(g.Invokes))
	}
	d.node = NoID
	n = d.list("positions", MaxPositions-len(g.Positions), minPosition)
	g.Positions = slices.Grow(g.Positions, n)
	for i := 0; i < n && d.err == nil; i++ {
		d.parts("a position", 3)
		g.Positions = append(g.Positions, fault.Pos{
			File: d.name("a file's name"), Line: int(d.small("a line", 0, 1<<31-1)), Func: d.name("a function's name"),
		})
	}
	for i := from; i < len(g.Nodes) && d.err == nil; i++ {
		if d.node = ID(i); int(g.Nodes[i].Pos) >= len(g.Positions) {
			d.fail("its line is position %d of %d", g.Nodes[i].Pos, len(g.Positions))
		}
	}
	d.node = NoID
}

func (d *decoder) invoke() Invoke {
	parts := d.list("parts of an invoke", 16, 0)
	if d.err == nil && (parts < 2 || parts > 4) {
		d.fail("an invoke has %d parts instead of 2 to 4", parts)
	}
	in := Invoke{Rows: d.rows("rows"), Masks: d.rows("masks")}
	if parts >= 3 {
		in.Edit = d.bool("whether an invoke is an edit")
	}
	if parts == 4 {
		mode := Mode(d.small("the mode of an invoke", 0, int64(ModeGrad|ModeInference)))
		in.NoGrad, in.Inference = mode&ModeGrad == 0, mode&ModeInference != 0
	}
	if d.err == nil && in.Masks != nil && len(in.Masks) != len(in.Rows) {
		d.fail("an invoke has %d rows and %d masks", len(in.Rows), len(in.Masks))
	}
	return in
}

func (d *decoder) rows(what string) [][]int64 {
	if d.err != nil || d.isNil() {
		return nil
	}
	n := d.list(what, MaxTokens, 1)
	d.count(n)
	if d.err != nil {
		return nil
	}
	rows := make([][]int64, 0, n)
	for i := 0; i < n && d.err == nil; i++ {
		k := d.list("tokens", MaxTokens, 1)
		d.count(k)
		if d.err != nil {
			break
		}
		row := make([]int64, k)
		for j := range row {
			row[j] = d.int("a token")
		}
		rows = append(rows, row)
	}
	return rows
}

// count holds rows and tokens to their limit before there is room made for them.
func (d *decoder) count(n int) {
	if d.tokens += n; d.tokens > MaxTokens {
		d.fail("it has more than %d tokens", MaxTokens)
	}
}

// oneNode reads a node: a head of four parts, then what its kind has, by the table of rules.
func (d *decoder) oneNode(n *Node, invokes int) {
	parts := d.list("parts of a node", 16, 1)
	if d.err == nil && parts < 4 {
		d.fail("it has %d parts", parts)
	}
	n.Kind = Kind(d.small("its kind", 0, int64(KindParam)-1))
	if d.err == nil && invokes == 0 {
		d.fail("it belongs to an invoke, and there is none")
	}
	n.Invoke = int32(d.small("its invoke", 0, int64(invokes)-1))
	n.Pos = int32(d.small("its position", -1, MaxPositions-1))
	n.Mode = Mode(d.small("its mode", 0, int64(ModeGrad|ModeInference)))
	r := n.Kind.rule()
	if want := r.parts(n.Kind); d.err == nil && parts != want {
		d.fail("a node of kind %s has %d parts instead of %d", n.Kind, parts, want)
	}
	if d.err != nil {
		return
	}
	switch n.Kind {
	case KindCall:
		n.Op = d.name("an operator")
	case KindModule:
		n.Path = d.name("a module's path")
	case KindConst:
		n.Index = int32(d.small("the number of a constant", 0, MaxNodes-1))
	}
	if r.place {
		n.Path = d.name("a module's path")
		n.Port = Port(d.small("a port", int64(PortInput), int64(PortOutput)))
		n.Step = int32(d.small("a step", 0, MaxSteps))
		n.Leaf = d.name("the name of a tensor")
	}
	if r.open {
		n.Args = d.items(d.list("arguments", MaxArgs, 1), 0)
		n.Kwargs = d.kwargs()
		return
	}
	n.Args = d.items(len(r.params), 0)
}

// parts is how many parts a node of a kind has in wire form, its head included.
func (r *rule) parts(k Kind) int {
	n := 4 + len(r.params)
	if r.place {
		n += 4
	}
	if r.open {
		n += 2
	}
	if k == KindCall || k == KindModule || k == KindConst {
		n++
	}
	return n
}

func (d *decoder) kwargs() []Kwarg {
	if d.err != nil || d.isNil() {
		return nil
	}
	n, rest, err := msgp.ReadMapHeaderBytes(d.rest)
	if !d.check("the named arguments", rest, err) {
		return nil
	}
	k := d.length("named arguments", n, MaxArgs, 2)
	if !d.room(k) || k == 0 {
		return nil
	}
	out := make([]Kwarg, k)
	names := make([]string, k)
	for i := 0; i < k && d.err == nil; i++ {
		names[i] = d.name("the name of an argument")
		out[i] = Kwarg{Name: names[i], Arg: d.arg(0)}
	}
	d.distinct(names)
	return out
}

// distinct refuses names that are there twice, which each reader would understand in its own way.
func (d *decoder) distinct(names []string) {
	if d.err != nil || len(names) < 2 {
		return
	}
	seen := make(map[string]bool, len(names))
	for _, s := range names {
		if seen[s] {
			d.fail("the name %q is there twice", s)
			return
		}
		seen[s] = true
	}
}

// room counts n more arguments, and says whether they are allowed.
func (d *decoder) room(n int) bool {
	if d.args += n; d.args > MaxArgs {
		d.fail("it has more than %d arguments", MaxArgs)
	}
	return d.err == nil
}

// items reads n arguments, n being no more than the bytes that are left.
func (d *decoder) items(n, depth int) []Arg {
	if !d.room(n) || n == 0 {
		return nil
	}
	out := make([]Arg, n)
	for i := 0; i < n && d.err == nil; i++ {
		out[i] = d.arg(depth)
	}
	return out
}

// arg reads an argument that has been counted.
func (d *decoder) arg(depth int) Arg {
	if d.err != nil {
		return Arg{}
	}
	if len(d.rest) == 0 {
		d.fail("it ends in the middle of an argument")
		return Arg{}
	}
	switch t := msgp.NextType(d.rest); t {
	case msgp.NilType:
		d.rest = d.rest[1:]
		return Arg{}
	case msgp.BoolType:
		b, rest, err := msgp.ReadBoolBytes(d.rest)
		d.check("a bool", rest, err)
		return Bool(b)
	case msgp.IntType, msgp.UintType:
		return Int(d.int("an int"))
	case msgp.Float32Type, msgp.Float64Type:
		return Float(d.float())
	case msgp.StrType:
		return String(string(d.bytes("a string")))
	case msgp.ArrayType:
		if depth >= MaxNesting {
			d.fail("an argument is nested more than %d deep", MaxNesting)
			return Arg{}
		}
		return d.tagged(depth)
	default:
		d.fail("an argument cannot be a MessagePack %s", t)
		return Arg{}
	}
}

func (d *decoder) tagged(depth int) Arg {
	n := d.list("parts of an argument", 2*MaxArgs, 1)
	if d.err == nil && n == 0 {
		d.fail("an argument is a list without a tag")
	}
	tag := d.small("a tag", tagRef, tagObject)
	if d.err != nil {
		return Arg{}
	}
	switch tag {
	case tagRef:
		d.exactly(n, 2, tag)
		id := d.int("a reference")
		if d.err == nil && (id < 0 || id >= d.refs) {
			if d.node == NoID {
				d.fail("it speaks of tensor %d of %d", id, d.refs)
			} else {
				d.fail("it uses value %d, which does not come before it", id)
			}
			return Arg{}
		}
		return Ref(ID(id))
	case tagList:
		return Arg{Kind: ArgList, L: d.items(n-1, depth+1)}
	case tagTuple:
		return Arg{Kind: ArgTuple, L: d.items(n-1, depth+1)}
	case tagDict:
		return d.pairs("", n-1, depth)
	case tagObject:
		if n < 2 {
			d.fail("an object has no class")
			return Arg{}
		}
		class := d.name("the class of an object")
		if d.err == nil && class == "" {
			d.fail("the class of an object has no name")
		}
		return d.pairs(class, n-2, depth)
	case tagSlice:
		d.exactly(n, 4, tag)
		return Arg{Kind: ArgSlice, L: d.items(3, depth+1)}
	case tagEllipsis:
		d.exactly(n, 1, tag)
		return Arg{Kind: ArgEllipsis}
	case tagDType:
		return d.text(n, ArgDType, tag)
	case tagDevice:
		return d.text(n, ArgDevice, tag)
	case tagLayout:
		return d.text(n, ArgLayout, tag)
	case tagMemoryFormat:
		return d.text(n, ArgMemoryFormat, tag)
	default: // tagComplex
		d.exactly(n, 3, tag)
		return Arg{Kind: ArgComplex, F: d.float(), G: d.float()}
	}
}

func (d *decoder) exactly(n, want int, tag int64) {
	if d.err == nil && n != want {
		d.fail("an argument with tag %d has %d parts instead of %d", tag, n, want)
	}
}

func (d *decoder) text(n int, kind ArgKind, tag int64) Arg {
	d.exactly(n, 2, tag)
	return Arg{Kind: kind, S: d.name("the name of " + kind.String())}
}

func (d *decoder) pairs(class string, n, depth int) Arg {
	a := Arg{Kind: ArgDict, S: class}
	if d.err == nil && n%2 != 0 {
		d.fail("a dictionary has a key without a value")
	}
	if !d.room(n/2) || n == 0 {
		return a
	}
	a.Keys, a.L = make([]string, n/2), make([]Arg, n/2)
	for i := 0; i < n/2 && d.err == nil; i++ {
		a.Keys[i] = d.name("a key")
		a.L[i] = d.arg(depth + 1)
	}
	d.distinct(a.Keys)
	return a
}
