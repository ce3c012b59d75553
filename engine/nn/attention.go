package nn

import (
	"fmt"
	"math"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// heads is the name below an attention module's own under which its internal values stand. They are
// the same for every architecture, and named as in TransformerLens:
//
//	q        [batch, heads, seq, dim]    queries, rotated where the architecture rotates them
//	k, v     [batch, kvHeads, seq, dim]  keys (rotated) and values
//	scores   [batch, heads, seq, seq]    q kᵀ scaled, -inf where a query may not look
//	pattern  [batch, heads, seq, seq]    their softmax over the last axis
//	z        [batch, heads, seq, dim]    what each head gives, before the output projection
const heads = "heads."

// Attention is scaled dot-product attention of queries [batch, heads, seq, dim] over keys and values
// [batch, kvHeads, seq, dim], where kvHeads divides heads: causal where mask is [None], else by a
// boolean mask [batch, 1, seq, seq]. In training elements of the pattern are set to zero with probability
// dropout. The result is [batch, heads, seq, dim].
//
// One fused operator does it; in the explicit variant it is done step by step.
func (m *Module) Attention(q, k, v, mask Value, scale, dropout float64) Value {
	if !m.b.variant.Training {
		dropout = 0
	}
	groups, kvHeads := q.Size(1), k.Size(1)
	if kvHeads < 1 || groups%kvHeads != 0 || v.Size(1) != kvHeads || q.Size(-1) != k.Size(-1) {
		q.b.fail("attention of %s over %s and %s", shapeText(q.shape), shapeText(k.shape), shapeText(v.shape))
	}
	m.Internal(heads+"q", &q)
	m.Internal(heads+"k", &k)
	m.Internal(heads+"v", &v)
	if m.b.variant.Cached {
		m.b.varying(func() { k, v = m.b.remember(k, v) })
	}
	var z Value
	if m.b.variant.Explicit {
		z = m.explicit(q, k, v, mask, scale, dropout)
	} else {
		z = m.fused(q, k, v, mask, scale, dropout)
	}
	m.Internal(heads+"z", &z)
	return z
}

// varying runs part of a forward pass whose operators are not those of every variant.
func (b *Builder) varying(f func()) {
	b.own = true
	f()
	b.own = false
}

func (m *Module) fused(q, k, v, mask Value, scale, dropout float64) Value {
	groups := q.Size(1) / k.Size(1)
	causal := mask.IsNone() && !m.b.variant.Decode // a single token looks at all before it
	kwargs := []graph.Kwarg{{Name: "scale", Arg: graph.Float(scale)}}
	if groups > 1 {
		// The fused kernels know grouped heads only without a mask and up to 256 sizes a head;
		// elsewhere they would fall back to a slower one than repeating costs.
		if mask.IsNone() && k.Size(-1) == v.Size(-1) && k.Size(-1) <= 256 {
			kwargs = append(kwargs, graph.Kwarg{Name: "enable_gqa", Arg: graph.Bool(true)})
		} else {
			m.b.varying(func() { k, v = k.RepeatHeads(groups), v.RepeatHeads(groups) })
		}
	}
	square := graph.Shape{graph.DimBatch, graph.Dim(q.Size(1)), graph.DimSeq, graph.DimSeq}
	m.hidden(heads+"scores", square, q.dtype)
	m.hidden(heads+"pattern", square, q.dtype)
	shape := slices.Clone(q.shape)
	shape[len(shape)-1] = graph.Dim(v.Size(-1))
	args := []graph.Arg{q.arg(), k.arg(), v.arg(), mask.arg(), graph.Float(dropout), graph.Bool(causal)}
	return q.b.call("scaled_dot_product_attention", shape, q.dtype, args, kwargs...)
}

// remember puts keys and values into the next layer's cache, and gives those of all tokens so far. The
// first step looks at its own alone, but where rows are padded.
func (b *Builder) remember(k, v Value) (Value, Value) {
	layer := b.caches
	b.caches++
	out := [2]Value{k, v}
	for i, name := range []string{"k", "v"} {
		x := out[i]
		room := graph.Shape{graph.DimBatch, x.shape[1], graph.DimRoom, x.shape[3]}
		cache := b.input(fmt.Sprintf("cache.%d.%s", layer, name), x.dtype, room)
		now := b.call("narrow", x.shape, x.dtype, []graph.Arg{cache.arg(), graph.Int(2), b.number("past"), b.number("seq")})
		b.call("copy_", x.shape, x.dtype, []graph.Arg{now.arg(), x.arg()})
		if b.variant.Decode {
			all := graph.Shape{graph.DimBatch, x.shape[1], graph.DimTotal, x.shape[3]}
			out[i] = b.call("narrow", all, x.dtype, []graph.Arg{cache.arg(), graph.Int(2), graph.Int(0), b.number("total")})
		}
	}
	return out[0], out[1]
}

func (m *Module) explicit(q, k, v, mask Value, scale, dropout float64) Value {
	groups := q.Size(1) / k.Size(1)
	if mask.IsNone() {
		mask = m.b.causalMask()
	}
	var scores, pattern, z Value
	m.b.varying(func() {
		k, v = k.RepeatHeads(groups), v.RepeatHeads(groups)
		scores = q.MatMul(k.Transpose(-2, -1)).MulScalar(scale).MaskTo(mask, math.Inf(-1))
	})
	m.Internal(heads+"scores", &scores)
	m.b.varying(func() { pattern = scores.SoftmaxLast() })
	m.Internal(heads+"pattern", &pattern)
	pattern = pattern.dropout(dropout)
	m.b.varying(func() { z = pattern.MatMul(v) })
	return z
}
