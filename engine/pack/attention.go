package pack

import (
	"math/bits"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// group is some queries of a row, and the keys that the last of them looks at. Each query looks at the first of
// them, as many as limits says.
type group struct {
	queries []token
	limits  []int
	keys    []token
}

// groups puts the queries of each row together. A query that is padding looks at itself beside what is before it,
// and is a group of its own.
func groups(sp *space, queries []token) []group {
	queries = slices.Clone(queries)
	slices.Sort(queries)
	var out []group
	row := -1
	for _, q := range queries {
		keys := sp.seen(q)
		r := int(q) / sp.toks
		if r != row || !sp.isReal(q) {
			out = append(out, group{})
			row = r
			if !sp.isReal(q) {
				row = -1
			}
		}
		g := &out[len(out)-1]
		g.queries, g.limits, g.keys = append(g.queries, q), append(g.limits, len(keys)), keys
	}
	return out
}

// buckets puts groups of about equally many queries together, to be done at once.
func buckets(all []group) [][]group {
	var out [][]group
	at := map[int]int{}
	for _, g := range all {
		size := bits.Len(uint(len(g.queries) - 1))
		k, ok := at[size]
		if !ok {
			k = len(out)
			at[size] = k
			out = append(out, nil)
		}
		out[k] = append(out[k], g)
	}
	return out
}

// attend writes attention for the queries that are wanted, each over the keys and values of the row where it
// stands first.
func (w *writer) attend(s *step) {
	q, k, v := s.arg(&s.in.Args[0]), s.arg(&s.in.Args[1]), s.arg(&s.in.Args[2])
	s.out.nowhere()
	for _, bucket := range buckets(groups(q.space, s.out.list())) {
		w.attendTogether(s, q, k, v, bucket)
	}
}

func (w *writer) attendTogether(s *step, q, k, v *activation, bucket []group) {
	nq, nk := 0, 0
	for _, g := range bucket {
		nq, nk = max(nq, len(g.queries)), max(nk, len(g.keys))
	}
	var queries, keys []token
	var limits []int64
	free, causal := true, true // all queries look at all keys; query i at the first i + 1
	for _, g := range bucket {
		for i := range nq {
			from := min(i, len(g.queries)-1) // beyond the last one come copies of it, which nobody looks at
			queries = append(queries, g.queries[from])
			limits = append(limits, int64(g.limits[from]))
			free = free && g.limits[from] == nk
			causal = causal && g.limits[from] == i+1 && nq == nk
		}
		for i := range nk {
			keys = append(keys, g.keys[min(i, len(g.keys)-1)])
		}
	}
	unpack := func(x *activation, tokens []token, n int) graph.Arg {
		packed := w.gather(s.in, x, tokens)
		return graph.Ref(w.add(s.in, plan.Instr{Op: plan.OpUnpack, Args: []graph.Arg{graph.Ref(packed)}, Window: x.window(len(bucket), n)}))
	}
	args := slices.Clone(s.in.Args)
	args[0], args[1], args[2] = unpack(q, queries, nq), unpack(k, keys, nk), unpack(v, keys, nk)
	kwargs := slices.Clone(s.in.Kwargs)
	args[3], args[5] = graph.Null(), graph.Bool(causal && !free)
	if !free && !causal {
		args[3] = graph.Ref(w.add(s.in, plan.Instr{Op: plan.OpMask, Tokens: limits, Window: plan.Window{Rows: int64(len(bucket)), Toks: int64(nk)}}))
		if heads := q.shape[1] / k.shape[1]; heads > 1 { // the fused kernel knows grouped heads without a mask alone
			for i := 1; i <= 2; i++ {
				args[i] = graph.Ref(w.add(s.in, plan.Instr{Op: plan.OpCall, Name: "aten::repeat_interleave.self_int",
					Args: []graph.Arg{args[i], graph.Int(int64(heads)), graph.Int(1)}, Fresh: true}))
			}
			kwargs = slices.DeleteFunc(kwargs, func(kw graph.Kwarg) bool { return kw.Name == "enable_gqa" })
		}
	}
	z := w.add(s.in, plan.Instr{Op: plan.OpCall, Name: s.in.Name, Args: args, Kwargs: kwargs, Fresh: true})
	var tokens []token
	var index []int64
	for r, g := range bucket {
		for i, t := range g.queries {
			tokens, index = append(tokens, t), append(index, int64(r*nq+i))
		}
	}
	slot := w.add(s.in, plan.Instr{Op: plan.OpPack, Args: []graph.Arg{graph.Ref(z)}, Tokens: index, Window: s.out.window(0, 0)})
	w.length[slot] = len(tokens)
	s.out.hold(slot, tokens)
}
