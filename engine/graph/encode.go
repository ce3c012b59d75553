package graph

import "github.com/tinylib/msgp/msgp"

// Encode writes a graph in wire form. The same graph always gives the same bytes. A node of a kind
// that stands only in models has no wire form: Encode panics, as that is a mistake in the program.
// An argument that a node's kind wants and that is not there is written as None.
func Encode(g *Graph) []byte {
	b := make([]byte, 0, 64+32*len(g.Nodes))
	b = msgp.AppendArrayHeader(b, 4)
	b = msgp.AppendInt(b, wireVersion)
	b = msgp.AppendArrayHeader(b, uint32(len(g.Invokes)))
	for i := range g.Invokes {
		n := 2 // what is as it mostly is may be left out
		switch in := &g.Invokes[i]; {
		case in.Mode() != ModeGrad:
			n = 4
		case in.Edit:
			n = 3
		}
		b = msgp.AppendArrayHeader(b, uint32(n))
		b = appendRows(b, g.Invokes[i].Rows)
		b = appendRows(b, g.Invokes[i].Masks)
		if n > 2 {
			b = msgp.AppendBool(b, g.Invokes[i].Edit)
		}
		if n > 3 {
			b = msgp.AppendInt(b, int(g.Invokes[i].Mode()))
		}
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
	r := n.Kind.rule()
	if r == nil || !r.trace {
		panic("graph: a node of kind " + n.Kind.String() + " has no wire form")
	}
	b = msgp.AppendArrayHeader(b, uint32(r.parts(n.Kind)))
	b = msgp.AppendInt(b, int(n.Kind))
	b = msgp.AppendInt32(b, n.Invoke)
	b = msgp.AppendInt32(b, n.Pos)
	b = msgp.AppendInt(b, int(n.Mode))
	switch n.Kind {
	case KindCall:
		b = msgp.AppendString(b, n.Op)
	case KindModule:
		b = msgp.AppendString(b, n.Path)
	case KindConst:
		b = msgp.AppendInt32(b, n.Index)
	}
	if r.place {
		b = msgp.AppendString(b, n.Path)
		b = msgp.AppendInt(b, int(n.Port))
		b = msgp.AppendInt32(b, n.Step)
		b = msgp.AppendString(b, n.Leaf)
	}
	if !r.open {
		for i := range r.params {
			b = appendArg(b, n.arg(i))
		}
		return b
	}
	b = msgp.AppendArrayHeader(b, uint32(len(n.Args)))
	for i := range n.Args {
		b = appendArg(b, &n.Args[i])
	}
	if len(n.Kwargs) == 0 {
		return msgp.AppendNil(b)
	}
	b = msgp.AppendMapHeader(b, uint32(len(n.Kwargs)))
	for i := range n.Kwargs {
		b = msgp.AppendString(b, n.Kwargs[i].Name)
		b = appendArg(b, &n.Kwargs[i].Arg)
	}
	return b
}

// arg is argument i, None where there is none.
func (n *Node) arg(i int) *Arg {
	if i < len(n.Args) {
		return &n.Args[i]
	}
	return &Arg{}
}

func appendArg(b []byte, a *Arg) []byte {
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
		return msgp.AppendInt32(appendTag(b, 2, tagRef), int32(a.Ref))
	case ArgList:
		return appendItems(b, tagList, a.L)
	case ArgTuple:
		return appendItems(b, tagTuple, a.L)
	case ArgSlice:
		return appendItems(b, tagSlice, a.L)
	case ArgDict:
		if a.S == "" {
			b = appendTag(b, 1+2*len(a.L), tagDict)
		} else {
			b = msgp.AppendString(appendTag(b, 2+2*len(a.L), tagObject), a.S)
		}
		for i := range a.L {
			b = appendArg(msgp.AppendString(b, a.Keys[i]), &a.L[i])
		}
		return b
	case ArgEllipsis:
		return appendTag(b, 1, tagEllipsis)
	case ArgDType:
		return msgp.AppendString(appendTag(b, 2, tagDType), a.S)
	case ArgDevice:
		return msgp.AppendString(appendTag(b, 2, tagDevice), a.S)
	case ArgLayout:
		return msgp.AppendString(appendTag(b, 2, tagLayout), a.S)
	case ArgMemoryFormat:
		return msgp.AppendString(appendTag(b, 2, tagMemoryFormat), a.S)
	case ArgComplex:
		return msgp.AppendFloat64(msgp.AppendFloat64(appendTag(b, 3, tagComplex), a.F), a.G)
	}
	return msgp.AppendNil(b)
}

// appendTag begins a list of n parts whose first is a tag.
func appendTag(b []byte, n, tag int) []byte {
	return msgp.AppendInt(msgp.AppendArrayHeader(b, uint32(n)), tag)
}

func appendItems(b []byte, tag int, items []Arg) []byte {
	b = appendTag(b, 1+len(items), tag)
	for i := range items {
		b = appendArg(b, &items[i])
	}
	return b
}
