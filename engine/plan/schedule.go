// Package plan turns a recorded trace and a model into a schedule: a flat list of instructions
// over slots, which package exec walks.
//
// Phases: [New] begins a plan, and [Plan.Extend] plans what has been added to the program since. Each
// time it decides which invokes share a forward pass (order.go) and where their rows lie (layout.go),
// walks every invoke's program in order and advances each pass just far enough for the access points it
// names (splice.go; rows.go, write.go and call.go for what invokes share, assign and call), drops what
// nobody can observe and says where each value dies (live.go). All of it is pure: no tensors, no cgo,
// the same input gives the same schedule.
package plan

import (
	"fmt"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Slot is a place that holds one value while a schedule runs. In the arguments of an [Instr] a
// reference (graph.ArgRef) names a slot.
type Slot = graph.ID

// NoSlot is no place.
const NoSlot Slot = graph.NoID

// Op says what an instruction does.
type Op uint8

// The instructions.
const (
	OpCall     Op = iota // the ATen call Name on Args and Kwargs
	OpIndex              // Args[0][Args[1]]
	OpSetIndex           // Args[0][Args[1]] = Args[2]
	OpItem               // element Args[1] of the container Args[0]
	OpRows               // a copy of the Window of Args[0]: what one invoke sees of a batch
	OpPut                // writes Args[1] into the Window of Args[0]
	OpSpread             // a copy of Args[0], which all rows shared, with Window.Batch rows of its own
	OpClone              // a copy of Args[0]
	OpExpect             // notes whether Args[0] has the sizes Want, for the message of a later failure
	OpGuard              // fails if Args[0] shares storage with one of Args[1:], whose time has passed
	OpTrack              // what Args[0] holds becomes what autograd follows, as far as Args[1] says; Args[2]: it is not the run's own
	OpBackward           // a backward pass from the list Args[0], with gradients Args[1]: gives those of Args[2]
	OpFetch              // the tensors of an access point of a hosted model
	OpGive               // Args[0] is what is to stand at the access point of a hosted model that Args[1] was fetched from
	OpSetGrad            // the gradient of Args[0] is Args[1] in what a backward pass goes on to
	OpPack               // tokens Tokens of Args[0], whose axes Window names: one a row of the result (package pack)
	OpTake               // rows Tokens of the values Args, one after the other
	OpUnpack             // Args[0], a row a token, with Window.Rows and Window.Toks for its first axis
	OpMask               // bool [Window.Rows, 1, n, Window.Toks]: query i of a row looks at the first Tokens[i] keys
)

var opNames = [...]string{"call", "index", "setindex", "item", "rows", "put", "spread", "clone", "expect", "guard", "track", "backward", "fetch", "give", "setgrad", "pack", "take", "unpack", "mask"}

func (o Op) String() string { return opNames[o] }

// Window is the part of a batched tensor that belongs to one invoke. An axis of -1 is not cut.
type Window struct {
	Batch     int64 // rows of the whole batch
	BatchAxis int
	Row, Rows int64 // first row and number of rows
	SeqAxes   []int
	Tok, Toks int64 // first token and number of tokens
}

// Instr is one step of a schedule.
type Instr struct {
	Op     Op
	Name   string // Call: the operator
	Args   []graph.Arg
	Kwargs []graph.Kwarg
	Out    Slot       // where the result goes, or NoSlot
	Frees  []Slot     // slots that are dead after this instruction
	Mode   graph.Mode // autograd state it runs under
	Window Window
	Node   graph.ID    // the user's node this comes from, or NoID
	Want   []int64     // Expect: the sizes the model computed there; Put: those a replacement must have
	Others []graph.ID  // for messages, user's nodes: Guard: which made the model move on; Backward: which ask
	Path   string      // innermost module it belongs to
	Mutate bool        // changes its first argument in place
	Fresh  bool        // its result shares no storage with its arguments
	Pass   Pass        // Backward, SetGrad: which pass
	Place  Place       // Fetch, Give: where
	Shape  graph.Shape // sizes that the model gives its result, where that is known; Expect: those of what is replaced
	DType  string      // and its dtype, where that is another than the model's
	Of     int         // which forward pass it belongs to, where Shape is known
	Main   bool        // it is the forward pass's own, and not of a module that a line calls
	Tokens []int64     // Pack, Take, Unpack, Mask
	Strict bool        // Expect: the rest of the schedule relies on it
}

// Place is an access point of a hosted model.
type Place struct {
	Forward int // which forward pass
	Point   int // number of the access point
	Leaf    int // Give: number of the tensor there
}

// Pass is a backward pass, or a part of one.
type Pass struct {
	Node   graph.ID // the user's node that begins it
	Retain bool     // the graph can be gone through again
	Create bool     // gradients have a history of their own
	Fill   bool     // leaves get their gradients
	Last   bool     // nothing more comes of it
}

// CachePrefix begins the names of inputs that outlive a run: the keys and values of earlier steps.
const CachePrefix = "cache."

// Source says where the value of a slot comes from before a run starts.
type Source struct {
	Slot    Slot
	Kind    graph.Kind  // KindParam, KindInput or KindConst
	Name    string      // parameter or input
	Index   int32       // number of the constant
	Forward int         // Input: which forward pass
	Shape   graph.Shape // Param, Input
}

// Saved is a value the user keeps: a tree whose references are slots.
type Saved struct {
	Node  graph.ID
	Value graph.Arg
}

// Schedule is a run, ready to be walked.
type Schedule struct {
	Slots    int
	Freed    []Slot   // slots of an earlier schedule of the run that are dead before this one begins
	Sources  []Source // those that no earlier schedule of the run has had
	Instrs   []Instr
	Saved    []Saved
	Forwards []Forward
	Borrowed []bool // by slot: parameters and constants, which a run never frees
	Groups   []Slot // by slot: those that may share storage have the same; nil but where this is the whole program

	used []bool // by slot: an instruction names it
}

// String prints the schedule, one instruction a line.
func (s *Schedule) String() string {
	var b strings.Builder
	for _, src := range s.Sources {
		switch src.Kind {
		case graph.KindParam:
			fmt.Fprintf(&b, "$%d = param %s\n", src.Slot, src.Name)
		case graph.KindInput:
			fmt.Fprintf(&b, "$%d = input %s of forward %d\n", src.Slot, src.Name, src.Forward)
		default:
			fmt.Fprintf(&b, "$%d = const %d\n", src.Slot, src.Index)
		}
	}
	for i := range s.Instrs {
		b.WriteString(s.Instrs[i].String())
		b.WriteByte('\n')
	}
	for _, v := range s.Saved {
		fmt.Fprintf(&b, "save %%%d = %s\n", v.Node, argText(&v.Value))
	}
	return b.String()
}

// String prints one instruction.
func (in *Instr) String() string {
	var b strings.Builder
	if in.Out != NoSlot {
		fmt.Fprintf(&b, "$%d = ", in.Out)
	}
	if in.Op == OpCall {
		b.WriteString(in.Name)
	} else {
		b.WriteString(in.Op.String())
	}
	b.WriteByte('(')
	for i := range in.Args {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(argText(&in.Args[i]))
	}
	for i := range in.Kwargs {
		if i > 0 || len(in.Args) > 0 {
			b.WriteString(", ")
		}
		fmt.Fprintf(&b, "%s=%s", in.Kwargs[i].Name, argText(&in.Kwargs[i].Arg))
	}
	b.WriteByte(')')
	if w := in.Window; in.Op == OpRows || in.Op == OpPut {
		fmt.Fprintf(&b, " rows %d:%d tokens %d:%d", w.Row, w.Row+w.Rows, w.Tok, w.Tok+w.Toks)
	}
	if in.Path != "" {
		fmt.Fprintf(&b, "  # %s", in.Path)
	}
	if len(in.Frees) > 0 {
		b.WriteString("  free")
		for _, f := range in.Frees {
			fmt.Fprintf(&b, " $%d", f)
		}
	}
	return b.String()
}

func argText(a *graph.Arg) string {
	switch a.Kind {
	case graph.ArgRef:
		return fmt.Sprintf("$%d", a.Ref)
	case graph.ArgNone:
		return "None"
	case graph.ArgBool:
		if a.I != 0 {
			return "True"
		}
		return "False"
	case graph.ArgInt:
		return fmt.Sprint(a.I)
	case graph.ArgFloat:
		return fmt.Sprint(a.F)
	case graph.ArgComplex:
		return fmt.Sprint(complex(a.F, a.G))
	case graph.ArgEllipsis:
		return "..."
	case graph.ArgString:
		return fmt.Sprintf("%q", a.S)
	case graph.ArgSlice:
		return strings.ReplaceAll(argText(&a.L[0])+":"+argText(&a.L[1])+":"+argText(&a.L[2]), "None", "")
	case graph.ArgList, graph.ArgTuple, graph.ArgDict:
		parts := make([]string, len(a.L))
		for i := range a.L {
			parts[i] = argText(&a.L[i])
			if a.Kind == graph.ArgDict {
				parts[i] = a.Keys[i] + "=" + parts[i]
			}
		}
		open, end := "[", "]"
		switch a.Kind {
		case graph.ArgTuple:
			open, end = "(", ")"
		case graph.ArgDict:
			open, end = a.S+"{", "}"
		}
		return open + strings.Join(parts, ", ") + end
	default:
		return a.S
	}
}
