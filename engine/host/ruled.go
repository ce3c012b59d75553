package host

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// ruled are operators that torch knows no sizes of without memory: the shape of what each gives, or nil.
var ruled = map[string]func(in *plan.Instr, sizes [][]int64) []int64{
	"aten::layer_norm": alike, "aten::rms_norm": alike,
	"aten::where": func(in *plan.Instr, sizes [][]int64) []int64 {
		if len(in.Args) != 3 || len(sizes) < 2 || in.Args[0].Kind != graph.ArgRef {
			return nil
		}
		return broadcast(sizes)
	},
	"aten::embedding": func(_ *plan.Instr, sizes [][]int64) []int64 {
		if len(sizes) != 2 || len(sizes[0]) != 2 {
			return nil
		}
		return append(slices.Clone(sizes[1]), sizes[0][1])
	},
	"aten::scaled_dot_product_attention": func(_ *plan.Instr, sizes [][]int64) []int64 {
		if len(sizes) < 3 || len(sizes[0]) < 2 || len(sizes[2]) < 2 {
			return nil
		}
		q, v := sizes[0], sizes[2]
		return append(slices.Clone(q[:len(q)-1]), v[len(v)-1])
	},
	"aten::index_select": func(in *plan.Instr, sizes [][]int64) []int64 {
		if len(sizes) != 2 || len(in.Args) != 3 || len(sizes[1]) > 1 {
			return nil
		}
		axis := in.Args[1].I
		if axis < 0 {
			axis += int64(len(sizes[0]))
		}
		if axis < 0 || axis >= int64(len(sizes[0])) {
			return nil
		}
		out := slices.Clone(sizes[0])
		out[axis] = 1
		for _, n := range sizes[1] {
			out[axis] = n
		}
		return out
	},
	"aten::var": reduced, "aten::std": reduced,
}

func alike(_ *plan.Instr, sizes [][]int64) []int64 {
	if len(sizes) == 0 {
		return nil
	}
	return append([]int64{}, sizes[0]...)
}

// broadcast is the shape that all of these go together in; nil where they do not.
func broadcast(sizes [][]int64) []int64 {
	longest := 0
	for _, s := range sizes {
		longest = max(longest, len(s))
	}
	out := slices.Repeat([]int64{1}, longest)
	for _, s := range sizes {
		for i, n := range s {
			at := longest - len(s) + i
			if n != 1 && out[at] != 1 && out[at] != n {
				return nil
			}
			if n != 1 {
				out[at] = n
			}
		}
	}
	return out
}

// reduced leaves out the axes that a variance is taken over.
func reduced(in *plan.Instr, sizes [][]int64) []int64 {
	if len(sizes) != 1 {
		return nil
	}
	named := func(at int, name string) *graph.Arg { return given(in, aten.Place{At: at, Name: name}) }
	gone := make([]bool, len(sizes[0]))
	dim, keep := named(1, "dim"), named(3, "keepdim")
	var all bool
	switch {
	case dim == nil, dim.Kind == graph.ArgBool, dim.Kind == graph.ArgNone, dim.Kind == graph.ArgList && len(dim.L) == 0:
		all = true
	}
	mark := func(a *graph.Arg) bool {
		axis := a.I
		if axis < 0 {
			axis += int64(len(gone))
		}
		if a.Kind != graph.ArgInt || axis < 0 || axis >= int64(len(gone)) {
			return false
		}
		gone[axis] = true
		return true
	}
	if !all {
		list := []graph.Arg{*dim}
		if dim.Kind == graph.ArgList || dim.Kind == graph.ArgTuple {
			list = dim.L
		}
		for i := range list {
			if !mark(&list[i]) {
				return nil
			}
		}
	}
	out := []int64{}
	for i, n := range sizes[0] {
		switch {
		case !all && !gone[i]:
			out = append(out, n)
		case keep != nil && keep.I != 0:
			out = append(out, 1)
		}
	}
	return out
}
