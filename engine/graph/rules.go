package graph

import "fmt"

// kindSet is a set of argument kinds.
type kindSet uint32

func kinds(ks ...ArgKind) (s kindSet) {
	for _, k := range ks {
		s |= 1 << k
	}
	return s
}

func (s kindSet) has(k ArgKind) bool { return s&(1<<k) != 0 }

var (
	anything = ^kindSet(0)
	aValue   = kinds(ArgRef)
	aKey     = kinds(ArgInt, ArgString)
	// What stands between the brackets of a tensor, and in tuples and lists there.
	anIndex = kinds(ArgNone, ArgBool, ArgInt, ArgFloat, ArgString, ArgRef, ArgList, ArgTuple, ArgSlice, ArgEllipsis)
	// What the elements of a tensor can be set to.
	aFill = kinds(ArgRef, ArgBool, ArgInt, ArgFloat, ArgComplex)
	// What a backward pass starts from, and with.
	aRoot = kinds(ArgRef, ArgList)
	aSeed = kinds(ArgNone, ArgRef, ArgList)
	aBool = kinds(ArgBool)
	// What bounds a slice.
	aBound = kinds(ArgNone, ArgBool, ArgInt, ArgRef)
)

// param is one argument of a kind of node.
type param struct {
	what   string // for messages: "its target"
	kinds  kindSet
	wanted string // for messages: "a value"
}

// rule says what nodes of one kind look like. The verifier, the printer, the encoder and the decoder
// go by this table, so that a new kind is one row here.
type rule struct {
	name   string  // as printed
	params []param // the arguments there must be, unless open
	open   bool    // any arguments, also by name (a call)
	place  bool    // names an access point: Path, Port, Step, Leaf
	trace  bool    // may stand in a trace, and has a wire form
	model  bool    // may stand in a model
	void   bool    // defines no value that another node could use
}

var rules = [...]rule{
	KindCall: {name: "call", open: true, trace: true, model: true},
	KindIndex: {name: "index", trace: true, model: true, params: []param{
		{"its target", aValue, "a value"},
		{"its index", anIndex, "something that a tensor can be indexed with"},
	}},
	KindSetIndex: {name: "set index", trace: true, void: true, params: []param{
		{"its target", aValue, "a value"},
		{"its index", anIndex, "something that a tensor can be indexed with"},
		{"what it sets", aFill, "a value or a number"},
	}},
	KindItem: {name: "item", trace: true, model: true, params: []param{
		{"its target", aValue, "a value"},
		{"its key", aKey, "a number or a string"},
	}},
	KindRead: {name: "read", place: true, trace: true},
	KindWrite: {name: "write", place: true, trace: true, void: true, params: []param{
		{"what it writes", aValue, "a value"},
	}},
	KindModule: {name: "module call", open: true, trace: true},
	KindConst:  {name: "const", trace: true},
	KindSave: {name: "save", trace: true, void: true, params: []param{
		{"what it saves", anything, "anything"},
	}},
	KindTrack: {name: "track", trace: true, void: true, params: []param{
		{"what it follows", aValue, "a value"},
		{"how far it does", kinds(ArgInt), "a number"},
	}},
	KindBackward: {name: "backward", trace: true, params: []param{
		{"what it starts from", aRoot, "a value or a list of values"},
		{"the gradient it starts with", aSeed, "a value, a list of them, or None"},
		{"whether the graph is retained", aBool, "a bool"},
		{"whether gradients get a graph", aBool, "a bool"},
		{"whether it fills what leaves keep", aBool, "a bool"},
		{"whether lines follow in it", aBool, "a bool"},
	}},
	KindGrad: {name: "grad", trace: true, params: []param{
		{"the value whose gradient it is", aValue, "a value"},
		{"its backward pass", aValue, "a value"},
	}},
	KindSetGrad: {name: "set grad", trace: true, void: true, params: []param{
		{"the value whose gradient it sets", aValue, "a value"},
		{"its backward pass", aValue, "a value"},
		{"what it sets", aValue, "a value"},
	}},
	KindEnd: {name: "backward end", trace: true, void: true, params: []param{
		{"its backward pass", aValue, "a value"},
	}},
	KindParam: {name: "param", model: true},
	KindInput: {name: "input", model: true},
	KindFetch: {name: "fetch", model: true},
	KindMark: {name: "mark", place: true, model: true, params: []param{
		{"what it marks", aValue, "a value"},
	}},
}

// rule gives the row of a kind, or nil for a number that is no kind.
func (k Kind) rule() *rule {
	if int(k) < len(rules) {
		return &rules[k]
	}
	return nil
}

// String is the kind's name: "call", "set index".
func (k Kind) String() string {
	if r := k.rule(); r != nil {
		return r.name
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

var portNames = [...]string{PortInput: "input", PortOutput: "output"}

// String is the port's name: "input" or "output".
func (p Port) String() string {
	if int(p) < len(portNames) {
		return portNames[p]
	}
	return fmt.Sprintf("port %d", uint8(p))
}

var argKindNames = [...]string{
	ArgNone: "None", ArgBool: "a bool", ArgInt: "an int", ArgFloat: "a float", ArgString: "a string", ArgRef: "a value",
	ArgList: "a list", ArgTuple: "a tuple", ArgDict: "a dict", ArgSlice: "a slice", ArgEllipsis: "an Ellipsis",
	ArgDType: "a dtype", ArgDevice: "a device", ArgLayout: "a layout", ArgMemoryFormat: "a memory format",
	ArgComplex: "a complex number",
}

// String names the kind as messages do: "an int", "a list".
func (k ArgKind) String() string {
	if int(k) < len(argKindNames) {
		return argKindNames[k]
	}
	return fmt.Sprintf("argument kind %d", uint8(k))
}
