package graph

import (
	"fmt"
	"path"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	maxItems  = 32 // elements of a container that are printed
	maxColumn = 64 // comments stand no further to the right, but behind longer lines
)

// String prints a trace for people: one node a line, in program order, under the invoke it belongs
// to, with the user's source line.
//
//	trace of 1 invoke and 3 nodes
//	invoke 0: 1 row of 10 tokens
//	  %0 = read transformer.h.5.output[0]  # demo.py:12
//	  %1 = aten::mul(%0, 2)                # demo.py:13
//	  %2: save %1                          # demo.py:13
//
// A node that defines no value has a colon. It prints any graph, also one that Verify refuses.
func (g *Graph) String() string {
	t := &table{}
	t.add(0, "trace of %s and %s", plural(len(g.Invokes), "invoke"), plural(len(g.Nodes), "node"))
	invoke, mode := int32(-1), ModeGrad
	for i := range g.Nodes {
		n := &g.Nodes[i]
		if i == 0 || n.Invoke != invoke {
			invoke = n.Invoke
			t.add(0, "%s", g.invokeText(invoke))
		}
		if n.Mode != mode {
			mode = n.Mode
			t.add(1, "(%s)", modeText(mode))
		}
		t.add(1, "%s", n.text(ID(i)))
		if pos := g.PosOf(n); !pos.IsZero() {
			t.comment("%s:%d", clean(path.Base(pos.File)), pos.Line)
		}
	}
	return t.String()
}

// String prints a model for people: one node a line with the symbolic sizes of its value, inside
// the module whose forward pass it belongs to. B is the number of rows and S of tokens.
func (m *Model) String() string {
	t := &table{}
	t.add(0, "model of %s, %s and %s", plural(len(m.Modules), "module"), plural(len(m.Points), "access point"),
		plural(len(m.Nodes), "node"))
	classes := make(map[string]string, len(m.Modules))
	for i := range m.Modules {
		classes[m.Modules[i].Path] = m.Modules[i].Class
	}
	next, depth, leaving := 0, 0, false
	leave := func() {
		if leaving {
			depth, leaving = max(depth-1, 0), false
		}
	}
	for i := range m.Nodes {
		n := &m.Nodes[i]
		for ; next < len(m.Points) && int(m.Points[next].At) <= i; next++ {
			leave()
			p := &m.Points[next]
			if p.Port == PortInput {
				t.add(depth, "%s: %s", pathText(p.Path), clean(classes[p.Path]))
				depth++
			} else {
				leaving = true // after its marks, which come next
			}
		}
		if n.Kind != KindMark {
			leave()
		}
		t.add(depth, "%s", n.text(ID(i)))
		if n.Shape != nil {
			t.comment("%s", strings.TrimSpace(n.Shape.String()+" "+clean(n.DType)))
		}
	}
	return t.String()
}

// String prints a shape with its symbolic sizes: "[B, S, 768]".
func (s Shape) String() string {
	parts := make([]string, len(s))
	for i, d := range s {
		switch d {
		case DimBatch:
			parts[i] = "B"
		case DimSeq:
			parts[i] = "S"
		default:
			parts[i] = strconv.FormatInt(int64(d), 10)
		}
	}
	return "[" + strings.Join(parts, ", ") + "]"
}

// text prints a node as one statement.
func (n *Node) text(id ID) string {
	if r := n.Kind.rule(); r != nil && r.void {
		return fmt.Sprintf("%%%d: %s", id, n.statement())
	}
	return fmt.Sprintf("%%%d = %s", id, n.statement())
}

// statement prints what a node does, without the value it defines.
func (n *Node) statement() string {
	switch n.Kind {
	case KindCall:
		return clean(n.Op) + n.argsText()
	case KindIndex:
		return n.arg(0).String() + "[" + n.arg(1).indexText() + "]"
	case KindSetIndex:
		return n.arg(0).String() + "[" + n.arg(1).indexText() + "] = " + n.arg(2).String()
	case KindItem:
		return "item " + n.arg(0).String() + "[" + n.arg(1).String() + "]"
	case KindRead:
		return "read " + n.placeText()
	case KindWrite:
		return "write " + n.placeText() + " = " + n.arg(0).String()
	case KindModule:
		return "call " + pathText(n.Path) + n.argsText()
	case KindConst:
		return fmt.Sprintf("const %d", n.Index)
	case KindSave:
		return "save " + n.arg(0).String()
	case KindTrack:
		return "track " + n.arg(0).String() + [...]string{"", ", with history", ", and retain its gradient"}[min(max(n.arg(1).I, 0), TrackRetain)]
	case KindBackward:
		return "backward " + n.arg(0).String()
	case KindGrad:
		return "grad of " + n.arg(0).String() + " in " + n.arg(1).String()
	case KindSetGrad:
		return "grad of " + n.arg(0).String() + " in " + n.arg(1).String() + " = " + n.arg(2).String()
	case KindEnd:
		return "end of " + n.arg(0).String()
	case KindParam:
		return "param " + clean(n.Op)
	case KindInput:
		return "input " + clean(n.Op)
	case KindFetch:
		return fmt.Sprintf("fetch point %d", n.Index)
	case KindMark:
		return "mark " + n.placeText() + " = " + n.arg(0).String()
	}
	return n.Kind.String() + n.argsText()
}

func (n *Node) argsText() string {
	parts := make([]string, 0, len(n.Args)+len(n.Kwargs))
	for i := range n.Args {
		parts = append(parts, n.Args[i].String())
	}
	for i := range n.Kwargs {
		parts = append(parts, clean(n.Kwargs[i].Name)+"="+n.Kwargs[i].Arg.String())
	}
	return "(" + strings.Join(parts, ", ") + ")"
}

// placeText prints an access point's tensor as one would write it: "transformer.h.5.output[0]".
func (n *Node) placeText() string {
	var b strings.Builder
	b.WriteString(pathText(n.Path))
	b.WriteByte('.')
	b.WriteString(n.Port.String())
	if n.Leaf != "" {
		for _, key := range strings.Split(n.Leaf, ".") {
			if _, err := strconv.ParseUint(key, 10, 32); err == nil {
				b.WriteString("[" + key + "]")
			} else {
				b.WriteString("." + clean(key))
			}
		}
	}
	if n.Step != 0 {
		fmt.Fprintf(&b, " at step %d", n.Step)
	}
	return b.String()
}

func pathText(p string) string {
	if p == "" {
		return "(model)"
	}
	return clean(p)
}

// String prints an argument as Python would, with values as %n.
func (a *Arg) String() string {
	switch a.Kind {
	case ArgRef:
		return fmt.Sprintf("%%%d", a.Ref)
	case ArgNone:
		return "None"
	case ArgBool:
		if a.I != 0 {
			return "True"
		}
		return "False"
	case ArgInt:
		return strconv.FormatInt(a.I, 10)
	case ArgFloat:
		return floatText(a.F)
	case ArgComplex:
		sign := ""
		if imaginary := floatText(a.G); imaginary[0] != '-' {
			sign = "+"
		}
		return "(" + floatText(a.F) + sign + floatText(a.G) + "j)"
	case ArgString:
		return strconv.Quote(a.S)
	case ArgEllipsis:
		return "..."
	case ArgSlice:
		return "slice(" + a.itemsText() + ")"
	case ArgList:
		return "[" + a.itemsText() + "]"
	case ArgTuple:
		if len(a.L) == 1 {
			return "(" + a.itemsText() + ",)"
		}
		return "(" + a.itemsText() + ")"
	case ArgDict:
		if a.S != "" {
			return clean(a.S) + "(" + a.itemsText() + ")"
		}
		return "{" + a.itemsText() + "}"
	case ArgDType, ArgLayout, ArgMemoryFormat:
		return "torch." + clean(a.S)
	case ArgDevice:
		return "device(" + strconv.Quote(a.S) + ")"
	}
	return a.Kind.String()
}

// indexText prints what stands between the brackets of a tensor: "0, :-1, ...".
func (a *Arg) indexText() string {
	if a.Kind != ArgTuple || len(a.L) == 0 || len(a.L) > maxItems {
		return a.sliceText()
	}
	parts := make([]string, len(a.L))
	for i := range a.L {
		parts[i] = a.L[i].sliceText()
	}
	if len(parts) == 1 {
		return parts[0] + ","
	}
	return strings.Join(parts, ", ")
}

// sliceText prints a slice with colons, and anything else as String does.
func (a *Arg) sliceText() string {
	if a.Kind != ArgSlice || len(a.L) != 3 {
		return a.String()
	}
	part := func(i int) string {
		if a.L[i].Kind == ArgNone {
			return ""
		}
		return a.L[i].String()
	}
	s := part(0) + ":" + part(1)
	if step := part(2); step != "" {
		s += ":" + step
	}
	return s
}

func (a *Arg) itemsText() string {
	var b strings.Builder
	for i := range a.L {
		if i > 0 {
			b.WriteString(", ")
		}
		if i == maxItems {
			fmt.Fprintf(&b, "and %d more", len(a.L)-i)
			break
		}
		if a.Kind == ArgDict && i < len(a.Keys) {
			if a.S != "" {
				b.WriteString(clean(a.Keys[i]) + "=")
			} else {
				b.WriteString(strconv.Quote(a.Keys[i]) + ": ")
			}
		}
		b.WriteString(a.L[i].String())
	}
	return b.String()
}

// floatText prints a float so that it cannot be taken for an int: "2.0".
func floatText(f float64) string {
	s := strconv.FormatFloat(f, 'g', -1, 64)
	if !strings.ContainsAny(s, ".eIN") {
		s += ".0"
	}
	return s
}

func (g *Graph) invokeText(i int32) string {
	if i < 0 || int(i) >= len(g.Invokes) {
		return fmt.Sprintf("invoke %d of %d", i, len(g.Invokes))
	}
	in := &g.Invokes[i]
	if in.Edit {
		return fmt.Sprintf("invoke %d: an edit of invoke %d", i, g.Edited(int(i)))
	}
	if in.WholeBatch() {
		return fmt.Sprintf("invoke %d: the whole batch", i)
	}
	low, high := len(in.Rows[0]), len(in.Rows[0])
	for _, row := range in.Rows {
		low, high = min(low, len(row)), max(high, len(row))
	}
	s := fmt.Sprintf("invoke %d: %s of %s", i, plural(len(in.Rows), "row"), plural(high, "token"))
	if low != high {
		s = fmt.Sprintf("invoke %d: %s of %d to %d tokens", i, plural(len(in.Rows), "row"), low, high)
	}
	if in.Masks != nil {
		s += ", with masks"
	}
	return s
}

func modeText(m Mode) string {
	switch {
	case m&ModeInference != 0 && m&ModeGrad != 0:
		return "inference mode and grad on from here on"
	case m&ModeInference != 0:
		return "inference mode from here on"
	case m&ModeGrad != 0:
		return "grad on from here on"
	default:
		return "grad off from here on"
	}
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}

// clean prints a name as it is, unless it holds what could be taken for the print's own lines.
func clean(s string) string {
	if !utf8.ValidString(s) {
		return strconv.Quote(s)
	}
	for _, c := range s {
		if !strconv.IsPrint(c) {
			return strconv.Quote(s)
		}
	}
	return s
}

// table collects lines whose comments stand in one column.
type table struct {
	lines    []string
	comments map[int]string
}

func (t *table) add(indent int, format string, args ...any) {
	t.lines = append(t.lines, strings.Repeat("  ", indent)+fmt.Sprintf(format, args...))
}

// comment adds a comment to the latest line.
func (t *table) comment(format string, args ...any) {
	if t.comments == nil {
		t.comments = map[int]string{}
	}
	t.comments[len(t.lines)-1] = fmt.Sprintf(format, args...)
}

func (t *table) String() string {
	column := 0
	for i := range t.comments {
		if n := utf8.RuneCountInString(t.lines[i]); n <= maxColumn {
			column = max(column, n)
		}
	}
	var b strings.Builder
	for i, line := range t.lines {
		b.WriteString(line)
		if c, ok := t.comments[i]; ok {
			b.WriteString(strings.Repeat(" ", max(column-utf8.RuneCountInString(line), 0)))
			b.WriteString("  # " + c)
		}
		b.WriteByte('\n')
	}
	return b.String()
}
