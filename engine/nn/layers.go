package nn

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Embedding is a table with one row a token or position.
type Embedding struct {
	*Module
	Weight  Param
	padding int64
}

// NewEmbedding registers an Embedding with weight [n, dim]. padding is the row whose gradient stays
// zero, nil for none; negative counts from the end.
func NewEmbedding(m *Module, name string, n, dim int64, padding *int64) *Embedding {
	extra, pad := fmt.Sprintf("%d, %d", n, dim), int64(-1)
	if padding != nil {
		if pad = *padding; pad < 0 {
			pad += n
		}
		if pad < 0 || pad >= n {
			m.b.fail("padding token %d is not among the %d rows of %s", *padding, n, join(m.path, name))
		}
		extra += fmt.Sprintf(", padding_idx=%d", pad)
	}
	e := m.Child(name, "Embedding", extra)
	return &Embedding{Module: e, Weight: e.Param("weight", n, dim), padding: pad}
}

// Forward looks ids up: int64 [...] gives [..., dim].
func (e *Embedding) Forward(ids Value) Value {
	e.Enter(Arg(&ids))
	w := e.Weight.Value()
	out := e.b.call("embedding", append(slices.Clone(ids.shape), w.shape[1]), w.dtype,
		[]graph.Arg{w.arg(), ids.arg(), graph.Int(e.padding), graph.Bool(false), graph.Bool(false)})
	e.Leave(&out)
	return out
}

// Linear is x Wᵀ + b.
type Linear struct {
	*Module
	Weight, Bias Param
	bias         bool
}

// NewLinear registers a Linear with weight [out, in] and, if bias, bias [out].
func NewLinear(m *Module, name string, in, out int64, bias bool) *Linear {
	return newLinear(m, name, in, out, bias, "")
}

// NewTiedLinear registers a Linear without bias whose weight [out, in] is another parameter's tensor.
func NewTiedLinear(m *Module, name string, in, out int64, tied Param) *Linear {
	return newLinear(m, name, in, out, false, tied.Name())
}

func newLinear(m *Module, name string, in, out int64, bias bool, tied string) *Linear {
	l := &Linear{bias: bias}
	l.Module = m.Child(name, "Linear", fmt.Sprintf("in_features=%d, out_features=%d, bias=%s", in, out, pyBool(bias)))
	l.Weight = l.TiedParam("weight", tied, out, in)
	if bias {
		l.Bias = l.Param("bias", out)
	}
	return l
}

// Forward maps [..., in] to [..., out].
func (l *Linear) Forward(x Value) Value {
	l.Enter(Arg(&x))
	w, b := l.Weight.Value(), None
	if l.bias {
		b = l.Bias.Value()
	}
	out := linear(x, w, b, false)
	l.Leave(&out)
	return out
}

// LinearOp is aten::linear with ways of its own on the CPU (pybind/linear.h). Its arguments are the input,
// the weight, the bias or None, and whether the weight is [in, out] rather than [out, in]. PackedLinearOp
// takes the pieces of a packed weight as well. GELUOp is aten::gelu in the same sense, to be called where a graph
// has that.
const (
	LinearOp       = "nng::linear"
	PackedLinearOp = "nng::linear_packed"
	GELUOp         = "nng::gelu"
)

func linear(x, w, b Value, transposed bool) Value {
	out, in := w.shape[0], w.shape[1]
	if transposed {
		out, in = in, out
	}
	if x.shape[x.axis(-1)] != in {
		x.b.fail("a layer of %d features is given %s", in, shapeText(x.shape))
	}
	shape := slices.Clone(x.shape)
	shape[len(shape)-1] = out
	return x.b.call(LinearOp, shape, x.dtype, []graph.Arg{x.arg(), w.arg(), b.arg(), graph.Bool(transposed)})
}

// Conv1D is transformers' layer of that name, which GPT-2 uses: x W + b.
type Conv1D struct {
	*Module
	Weight, Bias Param
}

// NewConv1D registers a Conv1D with weight [in, out] and bias [out].
func NewConv1D(m *Module, name string, in, out int64) *Conv1D {
	c := m.Child(name, "Conv1D", fmt.Sprintf("nf=%d, nx=%d", out, in))
	return &Conv1D{Module: c, Weight: c.Param("weight", in, out), Bias: c.Param("bias", out)}
}

// Forward maps [..., in] to [..., out]. transformers flattens to two axes and calls addmm; linear
// does the same product and takes tensors of any rank.
func (c *Conv1D) Forward(x Value) Value {
	c.Enter(Arg(&x))
	out := linear(x, c.Weight.Value(), c.Bias.Value(), true)
	c.Leave(&out)
	return out
}

// LayerNorm normalises the last axis to mean 0 and variance 1, then scales and shifts.
type LayerNorm struct {
	*Module
	Weight, Bias Param
	eps          float64
}

// NewLayerNorm registers a LayerNorm with weight and bias [dim].
func NewLayerNorm(m *Module, name string, dim int64, eps float64) *LayerNorm {
	extra := fmt.Sprintf("(%d,), eps=%s, elementwise_affine=True, bias=True", dim, pyFloat(eps))
	l := m.Child(name, "LayerNorm", extra)
	return &LayerNorm{Module: l, Weight: l.Param("weight", dim), Bias: l.Param("bias", dim), eps: eps}
}

// Forward keeps the shape [..., dim].
func (l *LayerNorm) Forward(x Value) Value {
	l.Enter(Arg(&x))
	w := l.Weight.Value()
	if x.shape[x.axis(-1)] != w.shape[0] {
		x.b.fail("a norm of %d features is given %s", w.shape[0], shapeText(x.shape))
	}
	out := x.map1("layer_norm", ints(int64(w.shape[0])), w.arg(), l.Bias.Value().arg(), graph.Float(l.eps))
	l.Leave(&out)
	return out
}

// RMSNorm divides by the root mean square of the last axis, then scales.
type RMSNorm struct {
	*Module
	Weight Param
	eps    float64
}

// NewRMSNorm registers an RMSNorm with weight [dim]; class is the name it has in the model
// ("LlamaRMSNorm").
func NewRMSNorm(m *Module, name, class string, dim int64, eps float64) *RMSNorm {
	r := m.Child(name, class, fmt.Sprintf("(%d,), eps=%s", dim, pyFloat(eps)))
	return &RMSNorm{Module: r, Weight: r.Param("weight", dim), eps: eps}
}

// Forward keeps the shape [..., dim]. It is transformers' sequence of operations: the mean is taken
// in float32 and the weight applied in the model's dtype. aten::rms_norm applies the weight before
// it rounds, which in half precision is another number.
func (r *RMSNorm) Forward(x Value) Value {
	r.Enter(Arg(&x))
	w := r.Weight.Value()
	if x.shape[x.axis(-1)] != w.shape[0] {
		x.b.fail("a norm of %d features is given %s", w.shape[0], shapeText(x.shape))
	}
	h := x.Float()
	variance := h.Pow(2).MeanLast()
	h = h.Mul(variance.AddScalar(r.eps).Rsqrt())
	out := w.Mul(h.TypeAs(x))
	r.Leave(&out)
	return out
}

// Dropout sets elements to zero in training. Else it does nothing, but has its access points.
type Dropout struct {
	*Module
	p float64
}

// NewDropout registers a Dropout with probability p, as the config has it.
func NewDropout(m *Module, name string, p json.Number) *Dropout {
	d := &Dropout{Module: m.Child(name, "Dropout", "p="+pyNumber(p)+", inplace=False")}
	d.p = m.b.probability(p)
	return d
}

// P is its probability.
func (d *Dropout) P() float64 { return d.p }

// probability is a number of the config between 0 and 1.
func (b *Builder) probability(p json.Number) float64 {
	f, err := p.Float64()
	if err != nil || f < 0 || f > 1 {
		b.fail("a dropout of probability %s", p)
	}
	return f
}

// Forward gives x itself, but in training.
func (d *Dropout) Forward(x Value) Value {
	d.Enter(Arg(&x))
	out := x.dropout(d.p)
	d.Leave(&out)
	return out
}

// dropout sets elements to zero with probability p, and scales the others up, where the model trains.
func (v Value) dropout(p float64) Value {
	if !v.b.variant.Training || p == 0 {
		return v
	}
	out := v
	v.b.varying(func() { out = v.map1("dropout", graph.Float(p), graph.Bool(true)) })
	return out
}

// pyBool prints a bool as Python does.
func pyBool(b bool) string {
	if b {
		return "True"
	}
	return "False"
}

// pyFloat prints a float as Python's repr does: the shortest digits that read back, with an
// exponent below 1e-4 and from 1e16 on.
func pyFloat(f float64) string {
	e := strconv.FormatFloat(f, 'e', -1, 64)
	if at := strings.IndexByte(e, 'e'); at >= 0 {
		if exp, err := strconv.Atoi(e[at+1:]); err == nil && (exp < -4 || exp >= 16) {
			return e
		}
	}
	s := strconv.FormatFloat(f, 'f', -1, 64)
	if !strings.ContainsAny(s, ".nN") {
		s += ".0"
	}
	return s
}

// pyNumber prints a number of a JSON file as Python would print what it read: an int stays one.
func pyNumber(n json.Number) string {
	s := string(n)
	if !strings.ContainsAny(s, ".eE") {
		return s
	}
	f, err := n.Float64()
	if err != nil {
		return s
	}
	return pyFloat(f)
}
