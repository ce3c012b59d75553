// Package guard decides which graphs of strangers may run.
//
// A graph is data, but what it names is run: this package holds each one to a list of operators that do
// nothing but compute, to what these may be given, and to a size. It looks at the graph alone, before there
// is a run of it. What only a run can know (whose memory a line writes to, how much it takes) is up to those
// who run it: host.Native.Protect and aten.CapMemory.
package guard

import (
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Limits bound a graph; a zero means no limit beyond those of the wire form.
type Limits struct {
	Nodes     int // lines
	Invokes   int
	Tokens    int // of all rows
	Arguments int // of all lines, elements of containers included
	Steps     int // the highest step that a line may name, from 0
}

// Default is what a server takes unless it was told otherwise: more than a sweep over every layer, position
// and head of a large model has, and less than planning takes seconds for.
var Default = Limits{Nodes: 1 << 17, Invokes: 1 << 13, Tokens: 1 << 20, Arguments: 1 << 20, Steps: 1 << 14}

// Check holds a graph to the lists and to [Default].
func Check(g *graph.Graph) error { return Default.Check(g) }

// Check holds a graph to the lists and to these limits. An error has code Remote, and tells the operator and
// the user's line.
func (l Limits) Check(g *graph.Graph) error {
	if err := l.sizes(g); err != nil {
		return err
	}
	arguments := 0
	for i := range g.Nodes {
		n := &g.Nodes[i]
		err := l.node(n)
		if err == nil {
			arguments += len(n.Kwargs)
			each(n, func(*graph.Arg) { arguments++ })
			err = most(arguments, l.Arguments, "arguments")
		}
		if err != nil {
			err.Node, err.Invoke, err.Pos = i, int(n.Invoke), g.PosOf(n)
			return err
		}
	}
	return nil
}

func (l Limits) sizes(g *graph.Graph) error {
	for _, x := range []*fault.Error{
		most(len(g.Nodes), l.Nodes, "lines"), most(len(g.Invokes), l.Invokes, "invokes"), most(g.Tokens(), l.Tokens, "tokens"),
	} {
		if x != nil {
			return x
		}
	}
	return nil
}

func most(n, limit int, what string) *fault.Error {
	if limit == 0 || n <= limit {
		return nil
	}
	return fault.New(fault.Remote, "the trace has more than the %d %s that this server takes at once", limit, what).
		WithHint("Split it into several.")
}

func (l Limits) node(n *graph.Node) *fault.Error {
	if l.Steps > 0 && int(n.Step) > l.Steps {
		return fault.New(fault.Remote, "step %d is beyond the %d that this server looks at", n.Step, l.Steps)
	}
	if err := values(n); err != nil {
		return err
	}
	if n.Kind != graph.KindCall {
		return nil
	}
	err := operator(n)
	if err != nil {
		err.Op = n.Op
	}
	return err
}

// operator holds a call to the lists.
func operator(n *graph.Node) *fault.Error {
	base, _, _ := strings.Cut(n.Op, ".")
	names, ok := allowed[base]
	if !ok {
		return refusal(base)
	}
	for i := range n.Kwargs {
		name := n.Kwargs[i].Name
		if names[name] {
			continue
		}
		if err := withheld(base, name); err != nil {
			return err
		}
		return fault.New(fault.Remote, "%s has no argument %q", base, name)
	}
	if names["device"] { // which may be given as text
		if err := devices(n); err != nil {
			return err
		}
	}
	for _, check := range checksOf(base) {
		if err := check(n); err != nil {
			return err
		}
	}
	return nil
}

// each calls f for every argument of a node, elements of containers included.
func each(n *graph.Node, f func(*graph.Arg)) {
	var walk func(a *graph.Arg)
	walk = func(a *graph.Arg) {
		f(a)
		for i := range a.L {
			walk(&a.L[i])
		}
	}
	for i := range n.Args {
		walk(&n.Args[i])
	}
	for i := range n.Kwargs {
		walk(&n.Kwargs[i].Arg)
	}
}
