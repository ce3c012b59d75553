package graph

import (
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/tinylib/msgp/msgp"
)

// wireVersion is the first element of an encoded graph; docs/wire.md describes the form.
const wireVersion = 1

// Limits on what a decoder accepts. They bound the work and the memory that bytes from a stranger
// can cause; real traces stay far below.
const (
	MaxNodes     = 1 << 20
	MaxInvokes   = 1 << 16
	MaxTokens    = 1 << 24 // of all rows together
	MaxPositions = 1 << 20
	MaxNesting   = 64
	MaxString    = 1 << 20
)

// Tags of arguments that are not plain MessagePack values.
const (
	tagRef = iota
	tagList
	tagTuple
	tagDict
	tagSlice
	tagEllipsis
	tagDType
	tagDevice
	tagLayout
	tagMemoryFormat
	tagComplex
	tagObject
)

// Decode reads a graph in wire form. The bytes may come from anyone: whatever they are, the result
// is a graph whose references point backwards, or an error of code Graph.
func Decode(data []byte) (*Graph, error) {
	d := decoder{rest: data}
	g := d.graph()
	if d.err == nil && len(d.rest) > 0 {
		d.fail("%d bytes follow the end", len(d.rest))
	}
	if d.err != nil {
		return nil, d.err
	}
	return g, nil
}

type decoder struct {
	rest   []byte
	node   ID // the one being read, for errors and for the rule on references
	tokens int
	err    *fault.Error
	names  map[string]string // operators and paths recur: one string each
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fault.New(fault.Graph, "the graph cannot be read: "+format, args...)
		if d.node != NoID {
			d.err.Node = int(d.node)
		}
	}
}

func (d *decoder) check(err error) {
	if err != nil {
		d.fail("%v", err)
	}
}

// list reads the head of a list. Its length is trusted only as far as bytes are left: an element
// takes at least one.
func (d *decoder) list(what string, limit int) int {
	if d.err != nil {
		return 0
	}
	n, rest, err := msgp.ReadArrayHeaderBytes(d.rest)
	d.check(err)
	if d.err == nil && (int64(n) > int64(limit) || int64(n) > int64(len(rest))) {
		d.fail("%d %s are more than the %d allowed or the bytes there are", n, what, limit)
	}
	if d.err != nil {
		return 0
	}
	d.rest = rest
	return int(n)
}

func (d *decoder) isNil() bool {
	if d.err == nil && msgp.IsNil(d.rest) {
		d.rest = d.rest[1:]
		return true
	}
	return false
}

func (d *decoder) int() int64 {
	if d.err != nil {
		return 0
	}
	n, rest, err := msgp.ReadInt64Bytes(d.rest)
	d.check(err)
	d.rest = rest
	return n
}

// small reads an integer of a range.
func (d *decoder) small(what string, low, high int64) int64 {
	n := d.int()
	if d.err == nil && (n < low || n > high) {
		d.fail("%s is %d, which is not between %d and %d", what, n, low, high)
		return low
	}
	return n
}

func (d *decoder) float() float64 {
	if d.err != nil {
		return 0
	}
	var f float64
	var err error
	switch msgp.NextType(d.rest) {
	case msgp.Float32Type:
		var f32 float32
		f32, d.rest, err = msgp.ReadFloat32Bytes(d.rest)
		f = float64(f32)
	case msgp.IntType, msgp.UintType:
		f = float64(d.int())
	default:
		f, d.rest, err = msgp.ReadFloat64Bytes(d.rest)
	}
	d.check(err)
	return f
}

func (d *decoder) bytes() []byte {
	if d.err != nil {
		return nil
	}
	b, rest, err := msgp.ReadStringZC(d.rest)
	d.check(err)
	if len(b) > MaxString {
		d.fail("a string of %d bytes is longer than the %d allowed", len(b), MaxString)
	}
	d.rest = rest
	return b
}

func (d *decoder) string() string { return string(d.bytes()) }

// name reads a string that is likely to recur.
func (d *decoder) name() string {
	b := d.bytes()
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

func (d *decoder) graph() *Graph {
	g := &Graph{}
	d.node = NoID
	if n := d.list("parts", 4); d.err == nil && n != 4 {
		d.fail("there are %d parts instead of 4", n)
	}
	if v := d.int(); d.err == nil && v != wireVersion {
		d.fail("it is of version %d; this engine reads version %d", v, wireVersion)
		d.err.Hint = "Use the same version of nnsight-go on both sides."
	}
	n := d.list("invokes", MaxInvokes)
	for i := 0; i < n && d.err == nil; i++ {
		g.Invokes = append(g.Invokes, d.invoke())
	}
	n = d.list("nodes", MaxNodes)
	for i := 0; i < n && d.err == nil; i++ {
		d.node = ID(i)
		g.Nodes = append(g.Nodes, d.oneNode(len(g.Invokes)))
	}
	d.node = NoID
	n = d.list("positions", MaxPositions)
	for i := 0; i < n && d.err == nil; i++ {
		if k := d.list("parts of a position", 3); d.err == nil && k != 3 {
			d.fail("a position has %d parts instead of 3", k)
		}
		g.Positions = append(g.Positions, fault.Pos{File: d.name(), Line: int(d.small("a line", 0, 1<<31)), Func: d.name()})
	}
	return g
}

func (d *decoder) invoke() Invoke {
	if n := d.list("parts of an invoke", 2); d.err == nil && n != 2 {
		d.fail("an invoke has %d parts instead of 2", n)
	}
	in := Invoke{Rows: d.rows(), Masks: d.rows()}
	if d.err == nil && in.Masks != nil && len(in.Masks) != len(in.Rows) {
		d.fail("an invoke has %d rows and %d masks", len(in.Rows), len(in.Masks))
	}
	return in
}

func (d *decoder) rows() [][]int64 {
	if d.isNil() {
		return nil
	}
	n := d.list("rows", MaxTokens)
	rows := make([][]int64, 0, min(n, 1024))
	for i := 0; i < n && d.err == nil; i++ {
		k := d.list("tokens", MaxTokens)
		if d.tokens += k; d.tokens > MaxTokens {
			d.fail("there are more than %d tokens", MaxTokens)
		}
		row := make([]int64, 0, min(k, 1<<16))
		for j := 0; j < k && d.err == nil; j++ {
			row = append(row, d.int())
		}
		rows = append(rows, row)
	}
	return rows
}

// oneNode reads a node; which parts it has is in the table of docs/wire.md.
func (d *decoder) oneNode(invokes int) Node {
	parts := d.list("parts of a node", 16)
	n := Node{Kind: Kind(d.small("a kind", 0, int64(KindSave)))}
	n.Invoke = int32(d.small("an invoke", 0, max(int64(invokes)-1, 0)))
	n.Pos = int32(d.small("a position", -1, MaxPositions))
	n.Mode = Mode(d.small("a mode", 0, int64(ModeGrad|ModeInference)))
	want := 4
	args := func(k int) {
		for range k {
			n.Args = append(n.Args, d.arg(0))
		}
		want += k
	}
	place := func() {
		n.Path, n.Port = d.name(), Port(d.small("a port", int64(PortInput), int64(PortGrad)))
		n.Step, n.Leaf = int32(d.small("a step", 0, 1<<30)), d.name()
		want += 4
	}
	called := func() {
		k := d.list("arguments", MaxNodes)
		for i := 0; i < k && d.err == nil; i++ {
			n.Args = append(n.Args, d.arg(0))
		}
		n.Kwargs = d.kwargs()
		want += 2
	}
	switch n.Kind {
	case KindCall:
		n.Op = d.name()
		want++
		called()
	case KindIndex, KindItem:
		args(2)
	case KindSetIndex:
		args(3)
	case KindRead:
		place()
	case KindWrite:
		place()
		args(1)
	case KindModule:
		n.Path = d.name()
		want++
		called()
	case KindConst:
		n.Index = int32(d.small("a constant", 0, MaxNodes))
		want++
	case KindSave:
		args(1)
	}
	if d.err == nil && parts != want {
		d.fail("a node of kind %d has %d parts instead of %d", n.Kind, parts, want)
	}
	return n
}

func (d *decoder) kwargs() []Kwarg {
	if d.err != nil || d.isNil() {
		return nil
	}
	n, rest, err := msgp.ReadMapHeaderBytes(d.rest)
	d.check(err)
	if d.err == nil && int64(n) > int64(len(rest)) {
		d.fail("%d named arguments are more than the bytes there are", n)
	}
	if d.err != nil {
		return nil
	}
	d.rest = rest
	var out []Kwarg
	for i := 0; i < int(n) && d.err == nil; i++ {
		out = append(out, Kwarg{Name: d.name(), Arg: d.arg(0)})
	}
	return out
}

func (d *decoder) arg(depth int) Arg {
	if d.err != nil {
		return Arg{}
	}
	if depth > MaxNesting {
		d.fail("an argument is nested more than %d deep", MaxNesting)
		return Arg{}
	}
	switch t := msgp.NextType(d.rest); t {
	case msgp.NilType:
		d.rest = d.rest[1:]
		return Arg{}
	case msgp.BoolType:
		b, rest, err := msgp.ReadBoolBytes(d.rest)
		d.check(err)
		d.rest = rest
		return Bool(b)
	case msgp.IntType, msgp.UintType:
		return Int(d.int())
	case msgp.Float32Type, msgp.Float64Type:
		return Float(d.float())
	case msgp.StrType:
		return String(d.string())
	case msgp.ArrayType:
		return d.tagged(depth)
	default:
		d.fail("an argument cannot be a MessagePack %s", t)
		return Arg{}
	}
}

func (d *decoder) tagged(depth int) Arg {
	n := d.list("parts of an argument", MaxTokens)
	if d.err == nil && n == 0 {
		d.fail("an argument is an empty list")
	}
	tag := d.small("a tag", tagRef, tagObject)
	exactly := func(k int) {
		if d.err == nil && n != k {
			d.fail("an argument with tag %d has %d parts instead of %d", tag, n, k)
		}
	}
	items := func(k int) []Arg {
		out := make([]Arg, 0, min(k, 64))
		for i := 0; i < k && d.err == nil; i++ {
			out = append(out, d.arg(depth+1))
		}
		return out
	}
	text := func(kind ArgKind) Arg { exactly(2); return Arg{Kind: kind, S: d.name()} }
	pairs := func(a Arg, k int) Arg {
		if d.err == nil && k%2 != 0 {
			d.fail("a dictionary has a key without a value")
		}
		for i := 0; i < k/2 && d.err == nil; i++ {
			a.Keys = append(a.Keys, d.name())
			a.L = append(a.L, d.arg(depth+1))
		}
		return a
	}
	switch tag {
	case tagRef:
		exactly(2)
		id := d.int()
		if d.err == nil && (id < 0 || d.node != NoID && id >= int64(d.node)) {
			d.fail("it uses value %d, which does not come before it", id)
			return Arg{}
		}
		return Ref(ID(id))
	case tagList:
		return Arg{Kind: ArgList, L: items(n - 1)}
	case tagTuple:
		return Arg{Kind: ArgTuple, L: items(n - 1)}
	case tagDict:
		return pairs(Arg{Kind: ArgDict}, n-1)
	case tagSlice:
		exactly(4)
		return Arg{Kind: ArgSlice, L: items(3)}
	case tagEllipsis:
		exactly(1)
		return Arg{Kind: ArgEllipsis}
	case tagDType:
		return text(ArgDType)
	case tagDevice:
		return text(ArgDevice)
	case tagLayout:
		return text(ArgLayout)
	case tagMemoryFormat:
		return text(ArgMemoryFormat)
	case tagComplex:
		exactly(3)
		return Arg{Kind: ArgComplex, F: d.float(), G: d.float()}
	default:
		if n < 2 {
			d.fail("an object has no class")
		}
		return pairs(Arg{Kind: ArgDict, S: d.name()}, n-2)
	}
}

// Encode writes a graph in wire form.
func Encode(g *Graph) []byte {
	b := msgp.AppendArrayHeader(nil, 4)
	b = msgp.AppendInt(b, wireVersion)
	b = msgp.AppendArrayHeader(b, uint32(len(g.Invokes)))
	for i := range g.Invokes {
		b = msgp.AppendArrayHeader(b, 2)
		b = appendRows(b, g.Invokes[i].Rows)
		b = appendRows(b, g.Invokes[i].Masks)
	}
	b = msgp.AppendArrayHeader(b, uint32(len(g.Nodes)))
	for i := range g.Nodes {
		b = appendNode(b, &g.Nodes[i])
	}
	b = msgp.AppendArrayHeader(b, uint32(len(g.Positions)))
	for _, p := range g.Positions {
		b = msgp.AppendArrayHeader(b, 3)
		b = msgp.AppendString(b, p.File)
		b = msgp.AppendInt(b, p.Line)
		b = msgp.AppendString(b, p.Func)
	}
	return b
}

func appendRows(b []byte, rows [][]int64) []byte {
	if rows == nil {
		return msgp.AppendNil(b)
	}
	b = msgp.AppendArrayHeader(b, uint32(len(rows)))
	for _, row := range rows {
		b = msgp.AppendArrayHeader(b, uint32(len(row)))
		for _, id := range row {
			b = msgp.AppendInt64(b, id)
		}
	}
	return b
}

func appendNode(b []byte, n *Node) []byte {
	parts := map[Kind]uint32{KindCall: 7, KindIndex: 6, KindSetIndex: 7, KindItem: 6, KindRead: 8, KindWrite: 9,
		KindModule: 7, KindConst: 5, KindSave: 5}
	b = msgp.AppendArrayHeader(b, parts[n.Kind])
	b = msgp.AppendInt(b, int(n.Kind))
	b = msgp.AppendInt32(b, n.Invoke)
	b = msgp.AppendInt32(b, n.Pos)
	b = msgp.AppendInt(b, int(n.Mode))
	called := func() {
		b = msgp.AppendArrayHeader(b, uint32(len(n.Args)))
		for i := range n.Args {
			b = appendArg(b, &n.Args[i])
		}
		if len(n.Kwargs) == 0 {
			b = msgp.AppendNil(b)
			return
		}
		b = msgp.AppendMapHeader(b, uint32(len(n.Kwargs)))
		for i := range n.Kwargs {
			b = msgp.AppendString(b, n.Kwargs[i].Name)
			b = appendArg(b, &n.Kwargs[i].Arg)
		}
	}
	switch n.Kind {
	case KindCall:
		b = msgp.AppendString(b, n.Op)
		called()
	case KindModule:
		b = msgp.AppendString(b, n.Path)
		called()
	case KindRead, KindWrite:
		b = msgp.AppendString(b, n.Path)
		b = msgp.AppendInt(b, int(n.Port))
		b = msgp.AppendInt32(b, n.Step)
		b = msgp.AppendString(b, n.Leaf)
		if n.Kind == KindWrite {
			b = appendArg(b, &n.Args[0])
		}
	case KindConst:
		b = msgp.AppendInt32(b, n.Index)
	default:
		for i := range n.Args {
			b = appendArg(b, &n.Args[i])
		}
	}
	return b
}

func appendArg(b []byte, a *Arg) []byte {
	items := func(tag int) []byte {
		b = msgp.AppendArrayHeader(b, uint32(1+len(a.L)))
		b = msgp.AppendInt(b, tag)
		for i := range a.L {
			b = appendArg(b, &a.L[i])
		}
		return b
	}
	text := func(tag int) []byte {
		b = msgp.AppendArrayHeader(b, 2)
		b = msgp.AppendInt(b, tag)
		return msgp.AppendString(b, a.S)
	}
	switch a.Kind {
	case ArgBool:
		return msgp.AppendBool(b, a.I != 0)
	case ArgInt:
		return msgp.AppendInt64(b, a.I)
	case ArgFloat:
		return msgp.AppendFloat64(b, a.F)
	case ArgString:
		return msgp.AppendString(b, a.S)
	case ArgRef:
		b = msgp.AppendArrayHeader(b, 2)
		b = msgp.AppendInt(b, tagRef)
		return msgp.AppendInt32(b, int32(a.Ref))
	case ArgList:
		return items(tagList)
	case ArgTuple:
		return items(tagTuple)
	case ArgSlice:
		return items(tagSlice)
	case ArgDict:
		if a.S == "" {
			b = msgp.AppendArrayHeader(b, uint32(1+2*len(a.L)))
			b = msgp.AppendInt(b, tagDict)
		} else {
			b = msgp.AppendArrayHeader(b, uint32(2+2*len(a.L)))
			b = msgp.AppendInt(b, tagObject)
			b = msgp.AppendString(b, a.S)
		}
		for i := range a.L {
			b = msgp.AppendString(b, a.Keys[i])
			b = appendArg(b, &a.L[i])
		}
		return b
	case ArgEllipsis:
		return msgp.AppendInt(msgp.AppendArrayHeader(b, 1), tagEllipsis)
	case ArgDType:
		return text(tagDType)
	case ArgDevice:
		return text(tagDevice)
	case ArgLayout:
		return text(tagLayout)
	case ArgMemoryFormat:
		return text(tagMemoryFormat)
	case ArgComplex:
		b = msgp.AppendInt(msgp.AppendArrayHeader(b, 3), tagComplex)
		return msgp.AppendFloat64(msgp.AppendFloat64(b, a.F), a.G)
	}
	return msgp.AppendNil(b)
}

// Result is one saved value: a tree whose references number the tensors that travel beside it.
type Result struct {
	Node  ID
	Value Arg
}

// EncodeResults writes saved values in wire form.
func EncodeResults(results []Result) []byte {
	b := msgp.AppendArrayHeader(nil, uint32(len(results)))
	for i := range results {
		b = msgp.AppendArrayHeader(b, 2)
		b = msgp.AppendInt32(b, int32(results[i].Node))
		b = appendArg(b, &results[i].Value)
	}
	return b
}
