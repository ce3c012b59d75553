package pack

import (
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// An operator that treats each token by itself can be given a matrix of tokens in the place of a batch, if the axes
// that its arguments name are counted anew. rules knows such operators; the arguments of all of them that
// are activations have the same number of axes.
type rule struct {
	// shape is what the operator gives for activations of these sizes, nil where it does not
	// treat tokens by themselves.
	shape func(c *call) graph.Shape
	// args rewrites the arguments that are no activations; nil: they stay.
	args func(c *call)
	// same: the packed result is the packed argument.
	same func(c *call) bool
	// several results: a container.
	several bool
}

// call is an operator's use.
type call struct {
	in     *plan.Instr
	tokens []*activation // its activations, in the order in which its arguments name them first
	sizes  func(a *graph.Arg) (graph.Shape, bool)
	out    []graph.Arg // rewritten arguments
}

// first is the shape of its first activation.
func (c *call) first() graph.Shape { return c.tokens[0].shape }

func (c *call) seq() int { return c.tokens[0].seq }

// axis is an argument that counts axes of a shape with that many.
func (c *call) axis(i, rank int) (int, bool) {
	if i >= len(c.in.Args) || c.in.Args[i].Kind != graph.ArgInt {
		return 0, false
	}
	a := int(c.in.Args[i].I)
	if a < 0 {
		a += rank
	}
	return a, a >= 0 && a < rank
}

// own is an axis that is not of rows or tokens.
func (c *call) own(i int) (int, bool) {
	a, ok := c.axis(i, len(c.first()))
	return a, ok && a != 0 && a != c.seq()
}

// recount gives argument i the number that its axis has once packed.
func (c *call) recount(indices ...int) {
	for _, i := range indices {
		a, _ := c.axis(i, len(c.first()))
		c.out[i] = graph.Int(int64(packedAxis(a, c.seq())))
	}
}

// broadcast is the shape of an element-wise operation. What is no activation must lie behind the tokens.
func broadcast(c *call) graph.Shape {
	out := slices.Clone(c.first())
	for _, x := range c.tokens[1:] {
		if len(x.shape) != len(out) || x.seq != c.seq() {
			return nil
		}
		for i, d := range x.shape {
			switch {
			case out[i] == d || d == 1:
			case out[i] == 1:
				out[i] = d
			default:
				return nil
			}
		}
	}
	if len(c.in.Args) == 0 || c.in.Args[0].Kind != graph.ArgRef {
		return nil
	}
	for i := range c.in.Args {
		a := &c.in.Args[i]
		shape, tensor := c.sizes(a)
		if !tensor {
			continue
		}
		if shape == nil || len(shape) > len(out)-c.seq()-1 {
			return nil
		}
		for k, d := range shape {
			if at := len(out) - len(shape) + k; out[at] != d && d != 1 {
				return nil
			}
		}
	}
	return out
}

// alike keeps the sizes of one activation.
func alike(c *call) graph.Shape {
	if len(c.tokens) != 1 {
		return nil
	}
	return c.first()
}

var (
	elementwise = rule{shape: broadcast}
	unary       = rule{shape: alike}
)

// rules are by the operator's name without overload.
var rules = map[string]rule{
	"aten::add": elementwise, "aten::sub": elementwise, "aten::mul": elementwise, "aten::div": elementwise,
	"aten::neg": unary, "aten::pow": {shape: scalarPower}, "aten::rsqrt": unary, "aten::sqrt": unary, "aten::cos": unary, "aten::sin": unary,
	"aten::exp": unary, "aten::sigmoid": unary, "aten::silu": unary, "aten::gelu": unary, "aten::relu": unary, "aten::relu6": unary,
	"aten::tanh": unary, "aten::mish": unary, "aten::hardswish": unary, "aten::leaky_relu": unary, "aten::clone": {shape: plainClone},
	"aten::to": {shape: toDType}, "aten::type_as": {shape: typeAs},
	"aten::layer_norm": {shape: layerNorm}, "nng::linear": {shape: linear}, "aten::mean": {shape: meanLast},
	"aten::softmax": {shape: lastAxis}, "aten::log_softmax": {shape: lastAxis},
	"aten::embedding": {shape: embedding},
	"aten::transpose": {shape: transposed, same: sameOrder},
	"aten::unsqueeze": {shape: unsqueezed, args: func(c *call) {
		a, _ := c.axis(1, len(c.first())+1)
		seq := c.seq()
		if a <= seq {
			seq++
		}
		c.out[1] = graph.Int(int64(packedAxis(a, seq)))
	}},
	"aten::unflatten": {shape: unflattened, args: func(c *call) { c.recount(1) }},
	"aten::flatten":   {shape: flattened, args: func(c *call) { c.recount(1, 2) }},
	"aten::slice":     {shape: sliced, args: func(c *call) { c.recount(1) }},
	"aten::cat":       {shape: joined, args: func(c *call) { c.recount(1) }},
	"aten::expand": {shape: expanded, args: func(c *call) {
		sizes := graph.List(graph.Int(-1))
		for axis := range c.in.Args[1].L {
			if axis != 0 && axis != c.seq() {
				sizes.L = append(sizes.L, c.in.Args[1].L[axis])
			}
		}
		c.out[1] = sizes
	}},
	"aten::split": {shape: cut, args: func(c *call) { c.recount(2) }, several: true},
}

// baseOf is an operator's name without its overload.
func baseOf(name string) string {
	base, _, _ := strings.Cut(name, ".")
	return base
}

const attention = "aten::scaled_dot_product_attention"

func scalarPower(c *call) graph.Shape {
	if len(c.in.Args) != 2 || c.in.Args[1].Kind == graph.ArgRef {
		return nil
	}
	return alike(c)
}

// plainClone has no memory format, of which a packed copy would know nothing.
func plainClone(c *call) graph.Shape {
	if len(c.in.Kwargs) > 0 || len(c.in.Args) != 1 {
		return nil
	}
	return alike(c)
}

func toDType(c *call) graph.Shape {
	if len(c.in.Args) != 2 || c.in.Args[1].Kind != graph.ArgDType || len(c.in.Kwargs) > 0 {
		return nil
	}
	return alike(c)
}

// typeAs wants nothing of its second argument but its dtype.
func typeAs(c *call) graph.Shape {
	if len(c.in.Args) != 2 || c.in.Args[0].Kind != graph.ArgRef || c.in.Args[0].Ref != c.tokens[0].slot {
		return nil
	}
	return c.first()
}

func layerNorm(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil || c.seq() == len(shape)-1 || len(c.in.Args) < 2 || len(c.in.Args[1].L) != 1 ||
		c.in.Args[1].L[0].I != int64(shape[len(shape)-1]) {
		return nil
	}
	return shape
}

func linear(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil || c.seq() == len(shape)-1 || len(c.in.Args) < 2 {
		return nil
	}
	w, _ := c.sizes(&c.in.Args[1])
	if len(w) != 2 {
		return nil
	}
	features, outputs := w[1], w[0]
	if len(c.in.Args) > 3 && c.in.Args[3].I != 0 {
		features, outputs = outputs, features
	}
	if features != shape[len(shape)-1] {
		return nil
	}
	out := slices.Clone(shape)
	out[len(out)-1] = outputs
	return out
}

func meanLast(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil || c.seq() == len(shape)-1 || len(c.in.Args) != 3 || len(c.in.Args[1].L) != 1 || c.in.Args[1].L[0].I != -1 ||
		c.in.Args[2].I != 1 {
		return nil
	}
	out := slices.Clone(shape)
	out[len(out)-1] = 1
	return out
}

// lastAxis is over the last axis.
func lastAxis(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil || c.seq() == len(shape)-1 || len(c.in.Args) < 2 || c.in.Args[1].Kind != graph.ArgInt || c.in.Args[1].I != -1 {
		return nil
	}
	return shape
}

func embedding(c *call) graph.Shape {
	if len(c.tokens) != 1 || len(c.in.Args) < 2 || c.in.Args[1].Kind != graph.ArgRef || c.in.Args[1].Ref != c.tokens[0].slot {
		return nil
	}
	w, _ := c.sizes(&c.in.Args[0])
	if len(w) != 2 {
		return nil
	}
	return append(slices.Clone(c.first()), w[1])
}

func transposed(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil {
		return nil
	}
	a, ok := c.axis(1, len(shape))
	b, fine := c.axis(2, len(shape))
	if !ok || !fine || a == 0 || b == 0 {
		return nil
	}
	out := slices.Clone(shape)
	out[a], out[b] = out[b], out[a]
	if !sameOrder(c) {
		return nil
	}
	return out
}

// sameOrder reports whether the axes beside the tokens keep their order: the packed tensor stays as it is.
func sameOrder(c *call) bool {
	a, _ := c.axis(1, len(c.first()))
	b, _ := c.axis(2, len(c.first()))
	return a == b || (a == c.seq() || b == c.seq()) && max(a, b)-min(a, b) == 1
}

func unsqueezed(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil {
		return nil
	}
	a, ok := c.axis(1, len(shape)+1)
	if !ok || a == 0 {
		return nil
	}
	return slices.Insert(slices.Clone(shape), a, 1)
}

func unflattened(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil {
		return nil
	}
	a, ok := c.own(1)
	if !ok || len(c.in.Args) != 3 {
		return nil
	}
	total, known, hole := shape[a], graph.Dim(1), -1
	parts := make(graph.Shape, len(c.in.Args[2].L))
	for i := range parts {
		if parts[i] = graph.Dim(c.in.Args[2].L[i].I); parts[i] == -1 {
			hole = i
			continue
		}
		known *= parts[i]
	}
	if hole >= 0 && known > 0 {
		parts[hole] = total / known
		known *= parts[hole]
	}
	if known != total {
		return nil
	}
	return slices.Concat(shape[:a], parts, shape[a+1:])
}

func flattened(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil {
		return nil
	}
	a, ok := c.own(1)
	b, fine := c.own(2)
	if !ok || !fine || b < a || a < c.seq() && c.seq() < b {
		return nil
	}
	total := graph.Dim(1)
	for k := a; k <= b; k++ {
		total *= shape[k]
	}
	return slices.Concat(shape[:a], graph.Shape{total}, shape[b+1:])
}

func sliced(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil {
		return nil
	}
	a, ok := c.own(1)
	if !ok || len(c.in.Args) != 4 || c.in.Args[2].Kind != graph.ArgInt {
		return nil
	}
	start, end := graph.Dim(c.in.Args[2].I), shape[a]
	if c.in.Args[3].Kind == graph.ArgInt {
		end = graph.Dim(c.in.Args[3].I)
	}
	if start < 0 || end < start || end > shape[a] {
		return nil
	}
	out := slices.Clone(shape)
	out[a] = end - start
	return out
}

func joined(c *call) graph.Shape {
	if len(c.in.Args) != 2 || c.in.Args[0].Kind != graph.ArgList {
		return nil
	}
	a, ok := c.own(1)
	if !ok {
		return nil
	}
	out := slices.Clone(c.first())
	out[a] = 0
	for i := range c.in.Args[0].L { // one may be there twice
		at := slices.IndexFunc(c.tokens, func(x *activation) bool { return x.slot == c.in.Args[0].L[i].Ref })
		if at < 0 || len(c.tokens[at].shape) != len(out) {
			return nil
		}
		x := c.tokens[at]
		for i, d := range x.shape {
			if i != a && d != out[i] {
				return nil
			}
		}
		out[a] += x.shape[a]
	}
	return out
}

func expanded(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil || len(c.in.Args) != 2 || len(c.in.Args[1].L) != len(shape) || len(c.in.Kwargs) > 0 {
		return nil
	}
	out := slices.Clone(shape)
	for i := range shape {
		n := c.in.Args[1].L[i]
		if n.Kind != graph.ArgInt {
			return nil
		}
		switch {
		case n.I == -1:
		case i == 0 || i == c.seq() || n.I < 0:
			return nil
		default:
			out[i] = graph.Dim(n.I)
		}
	}
	return out
}

// cut gives the sizes of the whole: pieces have their own.
func cut(c *call) graph.Shape {
	shape := alike(c)
	if shape == nil || len(c.in.Args) != 3 || c.in.Args[1].Kind != graph.ArgInt {
		return nil
	}
	if _, ok := c.own(2); !ok {
		return nil
	}
	return shape
}

// span is the part of the tokens that an index looks at, and which of its elements says so.
type span struct {
	lo, hi int
	at     int
}

// spanOf reads an index [rows, tokens, ...] of plain numbers and slices.
func spanOf(key *graph.Arg, rank, seq, toks int) (span, bool) {
	if key.Kind != graph.ArgTuple {
		return span{}, false
	}
	named := 0
	for i := range key.L {
		if key.L[i].Kind != graph.ArgEllipsis {
			named++
		}
	}
	axis := 0
	for i := range key.L {
		a := &key.L[i]
		switch a.Kind {
		case graph.ArgEllipsis:
			axis += rank - named
			continue
		case graph.ArgInt:
			if axis == seq {
				p := int(a.I)
				if p < 0 {
					p += toks
				}
				return span{p, p + 1, i}, p >= 0 && p < toks && plain(key)
			}
		case graph.ArgSlice:
			if axis == seq {
				lo, hi, ok := bounds(a, toks)
				return span{lo, hi, i}, ok && lo < hi && plain(key)
			}
		default:
			return span{}, false
		}
		axis++
	}
	return span{}, false
}

// plain reports whether an index has numbers and slices alone.
func plain(key *graph.Arg) bool {
	for i := range key.L {
		if k := key.L[i].Kind; k != graph.ArgInt && k != graph.ArgSlice && k != graph.ArgEllipsis {
			return false
		}
	}
	return true
}

// bounds are those of a slice with step 1.
func bounds(a *graph.Arg, n int) (lo, hi int, ok bool) {
	place := func(a *graph.Arg, none int) int {
		if a.Kind != graph.ArgInt {
			return none
		}
		i := int(a.I)
		if i < 0 {
			i += n
		}
		return min(max(i, 0), n)
	}
	for i := range a.L {
		if k := a.L[i].Kind; k != graph.ArgInt && k != graph.ArgNone {
			return 0, 0, false
		}
	}
	if a.L[2].Kind == graph.ArgInt && a.L[2].I != 1 {
		return 0, 0, false
	}
	return place(&a.L[0], 0), place(&a.L[1], n), true
}

// shifted is an index into tokens from lo on.
func shifted(key *graph.Arg, s span, lo int) graph.Arg {
	out := *key
	out.L = slices.Clone(key.L)
	if key.L[s.at].Kind == graph.ArgInt {
		out.L[s.at] = graph.Int(int64(s.lo - lo))
		return out
	}
	out.L[s.at] = graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{graph.Int(int64(s.lo - lo)), graph.Int(int64(s.hi - lo)), graph.Null()}}
	return out
}
