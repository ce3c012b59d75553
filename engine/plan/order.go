package plan

import (
	"maps"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// accessPoint finds the access point a Read, Write or Module node names.
func accessPoint(m *graph.Model, n *graph.Node) (int, error) {
	if p, ok := m.Point(n.Path, n.Port); ok {
		return p, nil
	}
	if !m.HasModule(n.Path) {
		return 0, fault.New(fault.ModulePath, "the model has no module %q", n.Path)
	}
	return 0, fault.New(fault.ModulePath, "module %q never runs in a forward pass", n.Path)
}

// orderInvokes decides how many forward passes the trace needs: forwardOf[i] is the pass of
// invoke i. Invokes share a pass unless an invoke would have to write at a layer the pass has
// left behind by the time a value of an earlier invoke is there.
//
// Only the members are placed, in passes from base on; the others stand in earlier ones already, or
// wait. depth[n] is how far its pass has gone, in access points, when node n can run, and across[n] how
// far passes from base on have gone by then because it waits for them: an invoke that began early may
// go on with values of one that begins now, and hand its own to a third.
func orderInvokes(g *graph.Graph, m *graph.Model, waits [][]graph.ID, forwardOf, members []int, base int) error {
	depth := make([]int, len(g.Nodes))
	across := make([]map[int]int, len(g.Nodes))
	origins := make([][]int, len(g.Nodes)) // access points whose value a node's result may alias
	at := make([]int, len(forwardOf))      // how far each invoke's pass has gone
	own := make([][]int, len(forwardOf))   // the nodes of each invoke
	for n := range g.Nodes {
		own[g.Nodes[n].Invoke] = append(own[g.Nodes[n].Invoke], n)
	}
	alias := newAliases(len(g.Nodes)) // values that may share storage
	uses := func(n int, f func(graph.ID)) {
		g.Nodes[n].Refs(f)
		for _, id := range waits[n] {
			f(id)
		}
	}
	wait := func(n int, gone map[int]int) map[int]int {
		uses(n, func(id graph.ID) {
			from := g.Nodes[id].Invoke
			if from == g.Nodes[n].Invoke {
				return
			}
			if forwardOf[from] >= base {
				gone = raise(gone, forwardOf[from], depth[id])
			}
			for forward, far := range across[id] {
				gone = raise(gone, forward, far)
			}
		})
		across[n] = gone
		return gone
	}
	place := func(invoke int32) error {
		at[invoke] = -1
		var gone map[int]int
		var bound []binding
		waited := -1 // how far the pass has gone when the values it takes from other invokes are there
		for _, n := range own[invoke] {
			node := &g.Nodes[n]
			gone = wait(n, gone)
			if far, ok := gone[forwardOf[invoke]]; ok {
				waited = far
			}
			at[invoke] = max(at[invoke], waited)
			var written []int
			switch node.Kind {
			case graph.KindRead:
				p, err := accessPoint(m, node)
				if err != nil {
					return locate(err, g, n)
				}
				at[invoke] = max(at[invoke], p)
				origins[n] = []int{p}
			case graph.KindWrite:
				p, err := accessPoint(m, node)
				if err != nil {
					return locate(err, g, n)
				}
				written = []int{p}
				bound = append(bound, binding{p, node.Args[0].Ref})
			case graph.KindSetIndex, graph.KindCall, graph.KindIndex, graph.KindItem, graph.KindModule:
				if arg := mutated(node); arg != nil {
					arg.Refs(func(id graph.ID) {
						if g.Nodes[id].Invoke == invoke {
							written = union(written, origins[id])
						}
						for _, b := range bound { // what is no activation by itself may have become one
							if len(origins[id]) == 0 && alias.find(b.value) == alias.find(id) {
								written = union(written, []int{b.point})
							}
						}
					})
				}
				shares(node, func(id graph.ID) {
					origins[n] = union(origins[n], origins[id])
					alias.join(graph.ID(n), id)
				})
			}
			for _, p := range written {
				if p < waited { // it stands past p because it waited, not by its own reads
					return errNextForward
				}
				at[invoke] = max(at[invoke], p)
			}
			depth[n] = at[invoke]
		}
		return nil
	}
	begun := 0
	for _, i := range members {
		for ; begun < i; begun++ { // those before it that stand in earlier passes
			var gone map[int]int
			for _, n := range own[begun] {
				if forwardOf[begun] >= 0 && forwardOf[begun] < base {
					gone = wait(n, gone)
				}
			}
		}
		forwardOf[i] = base
		for _, n := range own[i] {
			uses(n, func(id graph.ID) { forwardOf[i] = max(forwardOf[i], forwardOf[g.Nodes[id].Invoke]) })
		}
		err := place(int32(i))
		if err == errNextForward {
			forwardOf[i]++
			err = place(int32(i))
		}
		if err == errNextForward { // its own order, which Splice reports with both lines
			err = nil
		}
		if err != nil {
			return err
		}
	}
	later := slices.IndexFunc(members, func(i int) bool { return forwardOf[i] != base })
	whole := slices.IndexFunc(members, func(i int) bool { return g.Invokes[i].WholeBatch() })
	if later >= 0 && whole >= 0 {
		later, whole = members[later], members[whole]
		e := fault.New(fault.Input, "invoke %d has no input and so sees the whole batch, "+
			"but invoke %d needs a forward pass of its own", whole, later).
			WithHint("It writes at a layer that lies before the value it takes from another invoke; "+
				"give invoke %d a prompt, or use a second trace.", whole)
		e.Invoke = whole
		return e
	}
	return nil
}

// raise gives a map in which the value of a key is at least as large as this one. Nodes share maps, so
// a larger value makes a new one.
func raise(m map[int]int, key, value int) map[int]int {
	if old, ok := m[key]; ok && old >= value {
		return m
	}
	next := maps.Clone(m)
	if next == nil {
		next = map[int]int{}
	}
	next[key] = value
	return next
}

// binding is an access point that a line assigned a value to: to change the value in place is to
// write there once more.
type binding struct {
	point int
	value graph.ID
}

var errNextForward = fault.New(fault.Internal, "needs the next forward pass")

// locate adds a node's place to an error.
func locate(err error, g *graph.Graph, n int) error {
	if err == ErrRestart {
		return err
	}
	e := fault.As(err)
	node := &g.Nodes[n]
	e.Node, e.Invoke, e.Step = n, int(node.Invoke), int(node.Step)
	if e.Path == "" {
		e.Path = node.Path
	}
	if e.Pos.IsZero() {
		e.Pos = g.PosOf(node)
	}
	return e
}

func union(a, b []int) []int {
next:
	for _, x := range b {
		for _, y := range a {
			if x == y {
				continue next
			}
		}
		a = append(a, x)
	}
	return a
}
