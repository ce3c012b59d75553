package graph

import (
	"fmt"
	"strings"
)

// maxLabel is how many characters of a statement a box of a chart shows.
const maxLabel = 80

// Mermaid gives a trace as a Mermaid flowchart: a box a node, grouped by invoke, and an arrow from
// each value to where it is used. Reads are rounded, writes slanted, saves have double sides and
// constants are drums. Whatever names the graph holds, none is more than text in a label.
func (g *Graph) Mermaid() string {
	var b strings.Builder
	b.WriteString("flowchart TD\n")
	var order []int32
	members := map[int32][]ID{}
	for i := range g.Nodes {
		in := g.Nodes[i].Invoke
		if _, ok := members[in]; !ok {
			order = append(order, in)
		}
		members[in] = append(members[in], ID(i))
	}
	for k, in := range order {
		fmt.Fprintf(&b, "  subgraph i%d[\"%s\"]\n", k, label(g.invokeText(in)))
		for _, id := range members[in] {
			n := &g.Nodes[id]
			open, end := box(n.Kind)
			fmt.Fprintf(&b, "    n%d%s\"%s\"%s\n", id, open, label(n.text(id)), end)
		}
		b.WriteString("  end\n")
	}
	for i := range g.Nodes {
		drawn := map[ID]bool{}
		g.Nodes[i].Refs(func(id ID) {
			if id >= 0 && int(id) < len(g.Nodes) && !drawn[id] {
				drawn[id] = true
				fmt.Fprintf(&b, "  n%d --> n%d\n", id, i)
			}
		})
	}
	return b.String()
}

// box gives the brackets that Mermaid draws a shape for.
func box(k Kind) (open, end string) {
	switch k {
	case KindRead:
		return "([", "])"
	case KindWrite:
		return "[/", "/]"
	case KindSave:
		return "[[", "]]"
	case KindConst:
		return "[(", ")]"
	}
	return "[", "]"
}

// Two percent signs begin a comment or a directive in Mermaid, a backtick Markdown, and the others
// would end the label or be taken for HTML.
var escapes = strings.NewReplacer("%%", "#37;#37;", `"`, "#quot;", "#", "#35;", "<", "#lt;", ">", "#gt;", "&", "#amp;", "`", "#96;")

// label makes a text fit between the quotes of a Mermaid label.
func label(s string) string {
	if r := []rune(s); len(r) > maxLabel {
		s = string(r[:maxLabel-1]) + "…"
	}
	return escapes.Replace(s)
}
