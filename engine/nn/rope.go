package nn

import "math"

// Rope says at which frequencies rotary position embeddings turn. Fields are named as in
// Hugging Face's rope_parameters.
type Rope struct {
	Type              string  // "default", "linear", "dynamic", "llama3" or "yarn"
	Theta             float64 // base of the wavelengths
	Factor            float64
	LowFreqFactor     float64 // llama3
	HighFreqFactor    float64 // llama3
	OriginalContext   float64 // llama3, yarn: positions the model was first trained on
	AttentionFactor   float64 // yarn: 0 where it is to be inferred
	BetaFast          float64 // yarn
	BetaSlow          float64 // yarn
	MScale            float64 // yarn, 0 where absent
	MScaleAllDim      float64 // yarn, 0 where absent
	TruncateYarnRange bool    // yarn
}

// RopeTypes lists the kinds of scaling there are.
func RopeTypes() []string { return []string{"default", "linear", "dynamic", "llama3", "yarn"} }

// InvFreq gives the dim/2 inverse frequencies of a head of dim sizes. Each step is rounded to
// float32 as PyTorch rounds it, since a position multiplies what is lost here.
//
// The dynamic kind differs from the default one only beyond the model's context, where no input
// gets.
func (r Rope) InvFreq(dim int64) []float32 {
	scale := make([]float32, dim/2) // how many positions turn by one radian
	out := make([]float32, dim/2)
	for i := range out {
		exponent := float32(2*i) / float32(dim)
		scale[i] = float32(math.Pow(float64(float32(r.Theta)), float64(exponent)))
		out[i] = 1 / scale[i]
	}
	switch r.Type {
	case "linear":
		for i := range out {
			out[i] /= float32(r.Factor)
		}
	case "llama3":
		for i := range out {
			out[i] = r.llama3(out[i])
		}
	case "yarn":
		r.yarn(out, scale, float64(dim))
	}
	return out
}

// llama3 stretches long wavelengths by Factor, keeps short ones and goes smoothly between them.
func (r Rope) llama3(freq float32) float32 {
	wavelength := float32(2*math.Pi) / freq
	long, short := float32(r.OriginalContext/r.LowFreqFactor), float32(r.OriginalContext/r.HighFreqFactor)
	switch {
	case wavelength > long:
		return freq / float32(r.Factor)
	case wavelength < short:
		return freq
	}
	smooth := (float32(r.OriginalContext)/wavelength - float32(r.LowFreqFactor)) / float32(r.HighFreqFactor-r.LowFreqFactor)
	slow, fast := float32((1-smooth)*freq)/float32(r.Factor), float32(smooth*freq)
	return slow + fast
}

// yarn stretches the frequencies that turn less than BetaSlow times over the original context by
// Factor, keeps those that turn more than BetaFast times, with a ramp between.
func (r Rope) yarn(freqs, scale []float32, dim float64) {
	correction := func(rotations float64) float64 {
		return dim * math.Log(r.OriginalContext/(rotations*2*math.Pi)) / (2 * math.Log(r.Theta))
	}
	low, high := correction(r.BetaFast), correction(r.BetaSlow)
	if r.TruncateYarnRange {
		low, high = math.Floor(low), math.Ceil(high)
	}
	low, high = math.Max(low, 0), math.Min(high, dim-1)
	if low == high {
		high += 0.001 // no division by zero
	}
	for i := range freqs {
		ramp := (float32(i) - float32(low)) / float32(high-low)
		ramp = min(max(ramp, 0), 1)
		keep := 1 - ramp
		stretched := 1 / float32(float32(r.Factor)*scale[i])
		freqs[i] = float32(stretched*float32(1-keep)) + float32(freqs[i]*keep)
	}
}

// Scaling multiplies cosines and sines.
func (r Rope) Scaling() float64 {
	if r.Type != "yarn" {
		return 1
	}
	if r.AttentionFactor != 0 {
		return r.AttentionFactor
	}
	mscale := func(m float64) float64 {
		if r.Factor <= 1 {
			return 1
		}
		return 0.1*m*math.Log(r.Factor) + 1
	}
	if r.MScale != 0 && r.MScaleAllDim != 0 {
		return mscale(r.MScale) / mscale(r.MScaleAllDim)
	}
	return mscale(1)
}

// RotaryEmbedding gives the cosines and sines by which queries and keys are turned.
type RotaryEmbedding struct {
	*Module
	invFreq Param
	scaling float64
}

// NewRotaryEmbedding registers the module with its buffers inv_freq and original_inv_freq [dim/2];
// class is the name it has in the model ("LlamaRotaryEmbedding").
func NewRotaryEmbedding(m *Module, name, class string, dim int64, rope Rope) *RotaryEmbedding {
	r := m.Child(name, class, "")
	compute := func() []float32 { return rope.InvFreq(dim) }
	e := &RotaryEmbedding{Module: r, invFreq: r.Buffer("inv_freq", []int64{dim / 2}, compute), scaling: rope.Scaling()}
	r.Buffer("original_inv_freq", []int64{dim / 2}, compute)
	return e
}

// Forward gives cos and sin, [rows, seq, dim] with the rows of positions ([1, seq] or [batch, seq]),
// computed in float32 and converted to the dtype of x.
func (r *RotaryEmbedding) Forward(x, positions Value) (cos, sin Value) {
	r.Enter(Arg(&x), Kwarg("position_ids", &positions))
	freqs := positions.Unsqueeze(-1).Float().Mul(r.invFreq.Value())
	angles := Cat(-1, freqs, freqs)
	cos, sin = angles.Cos(), angles.Sin()
	if r.scaling != 1 {
		cos, sin = cos.MulScalar(r.scaling), sin.MulScalar(r.scaling)
	}
	cos, sin = cos.TypeAs(x), sin.TypeAs(x)
	r.LeaveTuple(&cos, &sin)
	return cos, sin
}

// Rotate turns queries or keys [batch, heads, seq, dim] by cos and sin [rows, 1, seq, dim], the
// two halves of each head being the two coordinates.
func Rotate(x, cos, sin Value) Value {
	half := x.Size(-1) / 2
	turned := Cat(-1, x.Slice(-1, half, -1).Neg(), x.Slice(-1, 0, half))
	return x.Mul(cos).Add(turned.Mul(sin))
}
