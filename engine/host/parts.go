package host

import (
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// maxParts bounds how many views an operator may cut a tensor into in a model that is shared. Each takes some
// hundred bytes that are no tensor's elements, so that no cap on those would notice a thousand million of them.
const maxParts = 1 << 16

// cuts lists the operators that give a tensor for every so many places of an axis: which argument says how
// many, unless each gives one, and which is the axis.
var cuts = map[string]struct{ size, dim aten.Place }{
	"aten::unbind": {dim: aten.Place{At: 1, Name: "dim"}}, "aten::unbind_copy": {dim: aten.Place{At: 1, Name: "dim"}},
	"aten::split":      {aten.Place{At: 1, Name: "split_size"}, aten.Place{At: 2, Name: "dim"}},
	"aten::split_copy": {aten.Place{At: 1, Name: "split_size"}, aten.Place{At: 2, Name: "dim"}},
}

// fewParts is the error of a call that would cut a tensor into too many parts.
func (r *Run) fewParts(in *plan.Instr, base string) error {
	cut, ok := cuts[base]
	self := given(in, aten.Place{Name: "self"})
	if !ok || self == nil {
		return nil
	}
	t, err := r.tensor(self)
	if err != nil {
		return nil // the operator says it better
	}
	each := int64(1)
	if cut.size.Name != "" {
		switch size := given(in, cut.size); {
		case size == nil || size.Kind != graph.ArgInt && size.Kind != graph.ArgRef: // a list of sizes, or nonsense
			return nil
		case size.Kind == graph.ArgInt:
			each = max(size.I, 1)
		}
	}
	sizes, longest := t.Shape(), int64(0)
	axis, dim := int64(0), given(in, cut.dim)
	if dim != nil {
		axis = dim.I
	}
	if axis < 0 {
		axis += int64(len(sizes))
	}
	for i, n := range sizes {
		if int64(i) == axis || dim != nil && dim.Kind != graph.ArgInt {
			longest = max(longest, n)
		}
	}
	if longest/each <= maxParts {
		return nil
	}
	return fault.New(fault.Remote, "an axis of %d places would be cut into more than the %d tensors that a server makes at once",
		longest, maxParts).WithHint("Index the places that you look at.")
}
