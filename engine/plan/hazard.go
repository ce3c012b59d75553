package plan

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// hazards says which nodes of other invokes a node must wait for beside those whose values it
// uses. Invokes share a forward pass, so their nodes are not run in the order they were written;
// where they use one tensor and one of them changes it in place, that order must hold all the same.
// A save does not wait: what it keeps is the tensor, as it is when the run ends.
func hazards(g *graph.Graph, m *graph.Model) [][]graph.ID {
	waits := make([][]graph.ID, len(g.Nodes))
	crosses, mutates := false, false
	for n := range g.Nodes {
		g.Nodes[n].Refs(func(id graph.ID) { crosses = crosses || g.Nodes[id].Invoke != g.Nodes[n].Invoke })
		mutates = mutates || mutated(&g.Nodes[n]) != nil
	}
	if !crosses || !mutates {
		return waits
	}
	alias := sharing(g, m)
	shared := map[graph.ID]bool{} // groups that several invokes use
	changed := map[graph.ID]bool{}
	for n := range g.Nodes {
		node := &g.Nodes[n]
		node.Refs(func(id graph.ID) {
			if g.Nodes[id].Invoke != node.Invoke {
				shared[alias.find(id)] = true
			}
		})
		if arg := mutated(node); arg != nil {
			arg.Refs(func(id graph.ID) { changed[alias.find(id)] = true })
		}
	}
	type touch struct {
		node    graph.ID
		mutates bool
	}
	touched := map[graph.ID][]touch{}
	bound := map[graph.ID][]holder{} // by group: who has assigned it to an access point
	for n := range g.Nodes {
		node := &g.Nodes[n]
		var written []graph.ID
		if arg := mutated(node); arg != nil {
			arg.Refs(func(id graph.ID) { written = append(written, alias.find(id)) })
		}
		if node.Kind == graph.KindSave {
			continue
		}
		var groups []graph.ID
		node.Refs(func(id graph.ID) {
			if r := alias.find(id); shared[r] && changed[r] && !slices.Contains(groups, r) {
				groups = append(groups, r)
			}
		})
		for _, r := range groups {
			now := touch{graph.ID(n), slices.Contains(written, r)}
			for _, before := range touched[r] {
				if (before.mutates || now.mutates) && g.Nodes[before.node].Invoke != node.Invoke {
					waits[n] = append(waits[n], before.node)
				}
			}
			if node.Kind == graph.KindWrite && !slices.ContainsFunc(bound[r], func(h holder) bool { return h.invoke == node.Invoke }) {
				bound[r] = append(bound[r], holder{node.Invoke, graph.ID(n)})
			}
			if now.mutates {
				for i := range bound[r] { // what was assigned is in use for as long as that invoke goes on
					if h := &bound[r][i]; h.invoke != node.Invoke {
						waits[n] = append(waits[n], h.until(g, n)...)
					}
				}
				// it comes after all that touched before, so to wait for it is to wait for them
				touched[r] = touched[r][:0]
			}
			touched[r] = append(touched[r], now)
		}
	}
	return waits
}

// holder is an invoke that has assigned a value to an access point, and the node that those have waited up to that changed
// it since: who comes after them waits for them.
type holder struct {
	invoke int32
	from   graph.ID
}

// until gives the nodes of the invoke that nobody has waited for yet and that stand before node n.
func (h *holder) until(g *graph.Graph, n int) (ids []graph.ID) {
	for k := h.from + 1; int(k) < n; k++ {
		if g.Nodes[k].Invoke == h.invoke && g.Nodes[k].Kind != graph.KindSave {
			ids = append(ids, k)
		}
	}
	h.from = graph.ID(n)
	return ids
}

// sharing groups the user's values that may share storage.
func sharing(g *graph.Graph, m *graph.Model) aliases {
	alias := newAliases(len(g.Nodes))
	type bound struct {
		mark  graph.ID
		value graph.ID
	}
	bounds := map[int32][]bound{} // what access points of an invoke hold: values read or written there
	for n := range g.Nodes {
		node := &g.Nodes[n]
		switch node.Kind {
		case graph.KindCall, graph.KindIndex, graph.KindItem, graph.KindModule:
			shares(node, func(id graph.ID) { alias.join(graph.ID(n), id) })
		case graph.KindRead, graph.KindWrite:
			mark := markOf(m, node)
			if mark == graph.NoID {
				continue
			}
			if node.Kind == graph.KindWrite {
				node.Refs(func(id graph.ID) { bounds[node.Invoke] = append(bounds[node.Invoke], bound{mark, id}) })
				continue
			}
			for _, b := range bounds[node.Invoke] {
				if holds(m, mark, b.mark) || holds(m, b.mark, mark) {
					alias.join(graph.ID(n), b.value)
				}
			}
			bounds[node.Invoke] = append(bounds[node.Invoke], bound{mark, graph.ID(n)})
		}
	}
	return alias
}

// markOf finds the mark a Read or Write names, or NoID.
func markOf(m *graph.Model, node *graph.Node) graph.ID {
	found := graph.NoID
	if point, ok := m.Point(node.Path, node.Port); ok {
		m.Points[point].Tree.Refs(func(id graph.ID) {
			if m.Nodes[id].Leaf == node.Leaf {
				found = id
			}
		})
	}
	return found
}

// holds reports whether a model node's value may be the tensor of an earlier mark, or a view of it.
func holds(m *graph.Model, id, mark graph.ID) bool {
	if id == mark {
		return true
	}
	n := &m.Nodes[id]
	if id < mark || n.Kind == graph.KindCall && isFresh(n.Op) {
		return false
	}
	found := false
	n.Refs(func(ref graph.ID) { found = found || holds(m, ref, mark) })
	return found
}
