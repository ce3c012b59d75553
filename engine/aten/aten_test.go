package aten

import (
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
	torch "github.com/wangkuiyi/gotorch"
)

// TestMain pins the tests to one thread, whose grad mode they change, and holds the count of
// handles to zero at the end.
func TestMain(m *testing.M) {
	code := m.Run()
	if n := Live(); n != 0 && code == 0 {
		println("tensors left at the end:", n)
		code = 1
	}
	os.Exit(code)
}

func floats(t testing.TB, data []float32, shape ...int64) Tensor {
	x, err := FromFloat32s(data, shape...)
	require.NoError(t, err)
	t.Cleanup(x.Free)
	return x
}

func call(t testing.TB, name string, args ...Value) Tensor {
	x, err := run(name, args...)
	require.NoError(t, err, name)
	t.Cleanup(x.Free)
	return x
}

// drawn is normal numbers of a dtype.
func drawn(t testing.TB, dtype string, sizes ...int64) Tensor {
	return call(t, "aten::to.dtype", TensorValue(call(t, "aten::randn", IntsValue(sizes...))), Value{Kind: graph.ArgDType, S: dtype})
}

// drawnLayer is a weight for nng::linear, which may be transposed, the same for aten::linear, and a bias or none.
func drawnLayer(t testing.TB, r *rand.Rand, dtype string, in, out int64) (weight Tensor, transposed bool, asLinear, bias Value) {
	weight, transposed, bias = drawn(t, dtype, out, in), r.IntN(2) == 0, Value{Kind: graph.ArgNone}
	asLinear = TensorValue(weight)
	if transposed {
		weight = drawn(t, dtype, in, out)
		asLinear = TensorValue(call(t, "aten::t", TensorValue(weight)))
	}
	if r.IntN(2) == 0 {
		bias = TensorValue(drawn(t, dtype, out))
	}
	return weight, transposed, asLinear, bias
}

// largest is the largest size of a number in x.
func largest(t *testing.T, x Tensor) float64 {
	return sumOf(t, floats32(t, call(t, "aten::max", TensorValue(call(t, "aten::abs", TensorValue(x))))))
}

// distance is the largest one between two numbers at the same place.
func distance(t *testing.T, a, b Tensor) float64 {
	return largest(t, call(t, "aten::sub", TensorValue(a), TensorValue(b)))
}

func wantFloats(t testing.TB, want []float32, x Tensor) {
	t.Helper()
	got, err := x.Float32s()
	require.NoError(t, err)
	require.InDeltaSlice(t, want, got, 1e-5)
}

func TestOverloads(t *testing.T) {
	x := floats(t, []float32{1, 2, 3, 4}, 2, 2)
	half := call(t, "aten::to", TensorValue(x), Value{Kind: graph.ArgDType, S: "bfloat16"})
	require.Equal(t, "bfloat16", half.DType())
	require.Equal(t, "bfloat16", call(t, "aten::maximum", TensorValue(half), FloatValue(2)).DType(), "a number is wrapped")
	wantFloats(t, []float32{3, 4, 5, 6}, call(t, "aten::add", TensorValue(x), IntValue(2)))
	wantFloats(t, []float32{2, 4, 6, 8}, call(t, "aten::add", TensorValue(x), TensorValue(x)))
	wantFloats(t, []float32{1, 4, 9, 16}, call(t, "aten::pow", TensorValue(x), IntValue(2)))
	wantFloats(t, []float32{2, 4, 8, 16}, call(t, "aten::pow", IntValue(2), TensorValue(x)))
	wantFloats(t, []float32{10}, call(t, "aten::sum", TensorValue(x)))
	wantFloats(t, []float32{3, 7}, call(t, "aten::sum", TensorValue(x), IntValue(-1)))
	wantFloats(t, []float32{4, 6}, call(t, "aten::sum", TensorValue(x), IntsValue(0)))
	wantFloats(t, []float32{1, 2, 3, 4}, call(t, "aten::view", TensorValue(x), IntValue(-1)))
	require.Equal(t, []int64{1, 2, 2}, call(t, "aten::view", TensorValue(x), IntValue(1), IntValue(2), IntValue(2)).Shape())
	require.Equal(t, []int64{4, 1}, call(t, "aten::reshape", TensorValue(x), IntsValue(4, 1)).Shape())
	wantFloats(t, []float32{2, 4}, call(t, "aten::amax", TensorValue(x), IntsValue(1)))
	wantFloats(t, []float32{1, 0, 0, 4}, call(t, "aten::mul", TensorValue(x), TensorValue(call(t, "aten::eye", IntValue(2)))))
	wantFloats(t, []float32{2, 2, 3, 4}, call(t, "aten::clamp", TensorValue(x), IntValue(2)))

	op, err := Find("aten::max")
	require.NoError(t, err)
	v, err := op.Call([]Value{TensorValue(x), IntValue(1)})
	require.NoError(t, err)
	require.Equal(t, graph.ArgTuple, v.Kind)
	wantFloats(t, []float32{2, 4}, v.L[0].T)
	indices, err := v.L[1].T.Int64s()
	require.NoError(t, err)
	require.Equal(t, []int64{1, 1}, indices)
	v.Free()

	op, err = Find("aten::add")
	require.NoError(t, err)
	out := call(t, "aten::zeros_like", TensorValue(x))
	v, err = op.Call([]Value{TensorValue(x), TensorValue(x)}, Named{"alpha", IntValue(3)}, Named{"out", TensorValue(out)})
	require.NoError(t, err)
	v.Free()
	wantFloats(t, []float32{4, 8, 12, 16}, out)
}

func TestErrors(t *testing.T) {
	x := floats(t, []float32{1, 2, 3, 4}, 2, 2)
	y := floats(t, []float32{1, 2, 3}, 3)
	for name, c := range map[string]struct {
		op   string
		args []Value
		says string
	}{
		"no such op":       {"aten::no_such_op", nil, "no operator aten::no_such_op"},
		"no such overload": {"aten::add.Nope", nil, "no operator aten::add.Nope"},
		"not a name":       {"add", nil, "not the name of an operator"},
		"shapes":           {"aten::add", []Value{TensorValue(x), TensorValue(y)}, "must match the size of tensor b"},
		"nothing fits":     {"aten::add", []Value{TensorValue(x), {Kind: graph.ArgString, S: "s"}}, "does not take (Tensor, str)"},
		"bool is no dtype": {"aten::view", []Value{TensorValue(x), BoolValue(true)}, "does not take"},
		"too many":         {"aten::relu", []Value{TensorValue(x), IntValue(1)}, "does not take"},
		"no dtype":         {"aten::to", []Value{TensorValue(x), {Kind: graph.ArgDType, S: "float31"}}, `no dtype "float31"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := run(c.op, c.args...)
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "frame #", "no C++ backtrace")
		})
	}
}

func TestIndexing(t *testing.T) {
	x := floats(t, []float32{0, 1, 2, 3, 4, 5}, 2, 3)
	none := Value{}
	span := func(a, b, c Value) Value { return Value{Kind: graph.ArgSlice, L: []Value{a, b, c}} }
	tuple := func(v ...Value) Value { return Value{Kind: graph.ArgTuple, L: v} }
	list := func(v ...Value) Value { return Value{Kind: graph.ArgList, L: v} }
	get := func(index Value) Tensor {
		out, err := IndexGet(x, index)
		require.NoError(t, err)
		t.Cleanup(out.Free)
		return out
	}
	wantFloats(t, []float32{3, 4, 5}, get(IntValue(-1)))
	wantFloats(t, []float32{2, 5}, get(tuple(span(none, none, none), IntValue(-1))))
	wantFloats(t, []float32{0, 2, 3, 5}, get(tuple(Value{Kind: graph.ArgEllipsis}, span(none, none, IntValue(2)))))
	wantFloats(t, []float32{5, 4}, get(tuple(IntValue(1), IntsValue(2, 1))))
	wantFloats(t, []float32{3, 4, 5, 3, 4, 5}, get(IntsValue(1, 1)))
	wantFloats(t, []float32{0, 1, 2}, get(list(BoolValue(true), BoolValue(false))))
	require.Equal(t, []int64{2, 1, 3}, get(tuple(span(none, none, none), none)).Shape())
	big := call(t, "aten::gt", TensorValue(x), IntValue(3))
	wantFloats(t, []float32{4, 5}, get(TensorValue(big)))

	y := call(t, "aten::clone", TensorValue(x))
	require.NoError(t, IndexSet(y, tuple(span(none, none, none), IntValue(0)), FloatValue(9)))
	require.NoError(t, IndexSet(y, TensorValue(big), IntValue(7)))
	require.NoError(t, IndexSet(y, tuple(IntValue(0), span(IntValue(1), none, none)), TensorValue(get(tuple(IntValue(0), span(none, IntValue(2), none))))))
	wantFloats(t, []float32{9, 0, 1, 9, 7, 7}, y)
	_, err := IndexGet(x, IntValue(2))
	require.ErrorContains(t, err, "out of bounds")
	_, err = IndexGet(x, span(none, none, IntValue(-1)))
	require.ErrorContains(t, err, "step must be greater than zero")
	require.Error(t, IndexSet(x, IntValue(0), Value{Kind: graph.ArgString, S: "a"}))
}

func TestModes(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	outer := GradEnabled()
	defer SetGradEnabled(outer)
	SetGradEnabled(true)
	require.True(t, GradEnabled())
	SetGradEnabled(false)
	require.Zero(t, CurrentMode()&graph.ModeGrad)
	leave := InferenceMode(true)
	require.NotZero(t, CurrentMode()&graph.ModeInference)
	leave()
	require.Zero(t, CurrentMode()&graph.ModeInference)
}

func TestOwnership(t *testing.T) {
	before := Live()
	data := []float32{1, 2, 3, 4}
	released := 0
	var pin runtime.Pinner
	pin.Pin(&data[0])
	defer pin.Unpin()
	x, err := FromBlob(pointer(data), []int64{4}, "float32", func() { released++ })
	require.NoError(t, err)
	view, err := Narrow(x, 0, 1, 2)
	require.NoError(t, err)
	require.Equal(t, x.StorageID(), view.StorageID())
	x.Free()
	require.Zero(t, released, "a view still uses the memory")
	wantFloats(t, []float32{2, 3}, view)
	view.Free()
	require.Equal(t, 1, released)
	_, err = FromBlob(pointer(data), []int64{4}, "float31", nil)
	require.Error(t, err)
	require.Equal(t, before, Live())
}

func TestFill(t *testing.T) {
	x, err := FillInt64s(func(e []int64) { e[1], e[3] = 5, 7 }, 2, 2)
	require.NoError(t, err)
	defer x.Free()
	got, err := x.Int64s()
	require.NoError(t, err)
	require.Equal(t, []int64{0, 5, 0, 7}, got)
	y, err := FillBools(func(e []bool) { require.Empty(t, e) }, 3, 0)
	require.NoError(t, err)
	defer y.Free()
	require.Equal(t, "bool", y.DType())
	for _, shape := range [][]int64{{1 << 46}, {1 << 62, 1 << 62}, {-1}} {
		_, err := FillBools(func([]bool) { t.Error("there is nothing to fill") }, shape...)
		require.Error(t, err, shape)
	}
}

// A shared value has handles of its own, at any depth.
func TestShareValue(t *testing.T) {
	before := Live()
	x, err := FillInt64s(func([]int64) {}, 2)
	require.NoError(t, err)
	v := Value{Kind: graph.ArgTuple, L: []Value{IntValue(1), {Kind: graph.ArgList, L: []Value{TensorValue(x), TensorValue(Tensor{})}}}}
	w, err := v.Share()
	require.NoError(t, err)
	require.Equal(t, before+2, Live())
	v.Free()
	require.Equal(t, []int64{2}, w.L[1].L[0].T.Shape())
	require.Equal(t, int64(1), w.L[0].I)
	w.Free()
	require.Equal(t, before, Live())
}

func TestGotorch(t *testing.T) {
	g := torch.RandN([]int64{2, 3}, false)
	x, err := FromGotorch(g)
	require.NoError(t, err)
	require.Equal(t, []int64{2, 3}, x.Shape())
	sum := call(t, "aten::sum", TensorValue(x))
	back := x.Gotorch()
	require.Equal(t, g.Shape(), back.Shape())
	require.InDelta(t, sumOf(t, sum), float64(torch.Sum(back).Item().(float32)), 1e-5)
	_, err = FromGotorch(torch.Tensor{})
	require.Error(t, err)
}

func sumOf(t *testing.T, x Tensor) float64 {
	v, err := x.Float32s()
	require.NoError(t, err)
	return float64(v[0])
}

func TestFindConcurrently(t *testing.T) {
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			for _, name := range []string{"aten::add", "aten::mul.Tensor", "aten::softmax", "aten::linear"} {
				op, err := Find(name)
				if err != nil || op.Name() != name {
					t.Error(name, err)
				}
			}
		})
	}
	wait.Wait()
}

// A few rows have kernels of their own; they give what aten::linear gives, of which each output is a sum in
// another order.
func TestLinearOfFewRows(t *testing.T) {
	ours, err := Find("nng::linear")
	require.NoError(t, err)
	r := rand.New(rand.NewPCG(3, 4))
	made := func(name string, args ...Value) Value { return TensorValue(call(t, name, args...)) }
	double := Value{Kind: graph.ArgDType, S: "float64"}
	check := func(dtype string, rows, in, out int64, variant int) {
		normal := func(sizes ...int64) Value { return TensorValue(drawn(t, dtype, sizes...)) }
		x, w, bias := normal(1, rows, in), normal(out, in), Value{Kind: graph.ArgNone}
		if variant&1 != 0 {
			w = made("aten::t", normal(in, out))
		}
		if variant&2 != 0 {
			bias = normal(out)
		}
		if variant&4 != 0 { // as a slice of more
			x = made("aten::narrow", normal(1, rows+2, in), IntValue(1), IntValue(1), IntValue(rows))
		}
		got, err := ours.Call([]Value{x, w, bias})
		require.NoError(t, err)
		defer got.Free()
		exact := []Value{made("aten::to.dtype", x, double), made("aten::to.dtype", w, double), bias}
		if variant&2 != 0 {
			exact[2] = made("aten::to.dtype", bias, double)
		}
		want := call(t, "aten::linear.default", exact...)
		require.Equal(t, []int64{1, rows, out}, got.T.Shape())
		require.Equal(t, dtype, got.T.DType())
		// relative to what the sums are made of
		scale := math.Sqrt(float64(in)) + 1
		tolerance := map[string]float64{"float32": 1e-5, "bfloat16": 3e-2, "float64": 1e-12}[dtype]
		require.LessOrEqual(t, distance(t, got.T, want), tolerance*scale, "%s, %d rows, %d to %d, %d", dtype, rows, in, out, variant)
	}
	for _, dtype := range []string{"float32", "bfloat16", "float64"} {
		for _, sizes := range [][2]int64{{1, 1}, {3, 5}, {64, 64}, {65, 129}, {768, 768}, {2304, 768}, {7, 4000}, {5003, 3}} {
			for variant := range 8 {
				check(dtype, 1, sizes[1], sizes[0], variant)
			}
		}
		for range 150 {
			check(dtype, 1+r.Int64N(70), 1+r.Int64N(700), 1+r.Int64N(700), r.IntN(8))
		}
	}
}

// Numbers that are none stay where they are: in their row, or in the outputs of their weights.
func TestLinearOfFewRowsKeepsWhatIsNoNumberApart(t *testing.T) {
	for _, dtype := range []string{"float32", "bfloat16"} {
		for _, rows := range []int64{2, 7, 12} {
			for variant := range 4 {
				full := func(sizes ...int64) Tensor {
					x := call(t, "aten::ones", IntsValue(sizes...))
					return call(t, "aten::to.dtype", TensorValue(x), Value{Kind: graph.ArgDType, S: dtype})
				}
				const in, out = 70, 90
				x, w := full(rows, in), full(out, in)
				if variant&1 != 0 {
					w = call(t, "aten::t", TensorValue(full(in, out)))
				}
				infinite := Value{Kind: graph.ArgFloat, F: math.Inf(1)}
				row := call(t, "aten::select.int", TensorValue(x), IntValue(0), IntValue(1))
				of, bad := row, int64(out)
				if variant&2 != 0 {
					of, bad = call(t, "aten::select.int", TensorValue(w), IntValue(0), IntValue(64)), rows
				}
				call(t, "aten::fill_.Scalar", TensorValue(call(t, "aten::narrow", TensorValue(of), IntValue(0), IntValue(66), IntValue(2))), infinite)
				got := call(t, "nng::linear", TensorValue(x), TensorValue(w))
				count := call(t, "aten::sum", TensorValue(call(t, "aten::isfinite", TensorValue(got))))
				require.Equal(t, float64(rows*out-bad), sumOf(t, floats32(t, count)), "%s %d %d", dtype, rows, variant)
			}
		}
	}
}

// Autograd follows such a product where its weight is frozen, and the gradients that it gives.
func TestLinearOfFewRowsIsFollowed(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer SetGradEnabled(GradEnabled())
	r := rand.New(rand.NewPCG(7, 8))
	for range 60 {
		dtype := []string{"float32", "bfloat16", "float64"}[r.IntN(3)]
		rows, in, out := 1+r.Int64N(70), 1+r.Int64N(200), 1+r.Int64N(200)
		x := drawn(t, dtype, rows, in)
		w, transposed, asLinear, bias := drawnLayer(t, r, dtype, in, out)
		// The gradient of a sum of squares, and that of such a sum of the gradient.
		var first, second [2]Tensor
		for i, name := range []string{"nng::linear", "aten::linear.default"} {
			SetGradEnabled(true)
			leaf, err := Track(call(t, "aten::clone", TensorValue(x)), false)
			require.NoError(t, err)
			t.Cleanup(leaf.Free)
			args := []Value{TensorValue(leaf), TensorValue(w), bias, BoolValue(transposed)}
			if i == 1 {
				args = []Value{TensorValue(leaf), asLinear, bias}
			}
			y := call(t, name, args...)
			for _, gradient := range []*[2]Tensor{&first, &second} {
				loss := call(t, "aten::sum", TensorValue(call(t, "aten::mul.Tensor", TensorValue(y), TensorValue(y))))
				found, err := (&Backward{Roots: []Tensor{loss}, Targets: []Tensor{leaf}, Create: true, Retain: true}).Run()
				require.NoError(t, err)
				t.Cleanup(found[0].Free)
				gradient[i], y = found[0], found[0]
			}
			SetGradEnabled(false)
		}
		for _, g := range [][2]Tensor{first, second} {
			require.Equal(t, g[1].Shape(), g[0].Shape())
			tolerance := map[string]float64{"float32": 1e-4, "bfloat16": 6e-2, "float64": 1e-10}[dtype]
			require.LessOrEqual(t, distance(t, g[0], g[1]), tolerance*largest(t, g[1]), "%s, %d rows, %d to %d", dtype, rows, in, out)
		}
	}
}

// GELU has a kernel of its own, which gives what torch's gives.
func TestGELU(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	gelu := func(name string, x Tensor) Tensor {
		op, err := Find(name)
		require.NoError(t, err)
		y, err := op.Call([]Value{TensorValue(x)}, Named{Name: "approximate", Value: Value{Kind: graph.ArgString, S: "tanh"}})
		require.NoError(t, err)
		t.Cleanup(y.Free)
		return y.T
	}
	for dtype, tolerance := range map[string]float64{"float32": 1e-6, "bfloat16": 1e-2, "float64": 1e-12} {
		for range 40 {
			x := call(t, "aten::randn", IntsValue(r.Int64N(4), 1+r.Int64N(9), 1+r.Int64N(1000)))
			x = call(t, "aten::mul.Scalar", TensorValue(x), Value{Kind: graph.ArgFloat, F: math.Pow(10, 4*r.Float64()-2)})
			x = call(t, "aten::to.dtype", TensorValue(x), Value{Kind: graph.ArgDType, S: dtype})
			if r.IntN(3) == 0 { // with gaps
				x = call(t, "aten::transpose.int", TensorValue(x), IntValue(1), IntValue(2))
			}
			got, want := gelu("nng::gelu", x), gelu("aten::gelu", x)
			require.Equal(t, want.Shape(), got.Shape())
			require.Equal(t, dtype, got.DType())
			if want.Numel() == 0 {
				continue
			}
			require.LessOrEqual(t, distance(t, want, got), tolerance*(1+largest(t, want)))
		}
	}
	x := floats(t, []float32{float32(math.Inf(1)), float32(math.NaN()), -1e30, 1e30, -90, 0}, 6)
	got, err := gelu("nng::gelu", x).Float32s()
	require.NoError(t, err)
	require.True(t, math.IsInf(float64(got[0]), 1) && math.IsNaN(float64(got[1])), got)
	require.Equal(t, []float32{0, 1e30, 0, 0}, got[2:])
}

// The kernels of processors that know less than this one.
func TestKernelsOfOtherProcessors(t *testing.T) {
	if os.Getenv("ATEN_CPU_CAPABILITY") != "" {
		t.Skip("this is one")
	}
	for _, capability := range []string{"default", "avx2"} { // torch takes no more than there is
		other := exec.Command(os.Args[0], "-test.run=TestLinearOfFewRows|TestGELU")
		other.Env = append(os.Environ(), "ATEN_CPU_CAPABILITY="+capability)
		out, err := other.CombinedOutput()
		require.NoError(t, err, "%s: %s", capability, out)
	}
}

// A packed weight, in one piece or several, gives what aten::linear gives; where oneDNN has no place, the
// weight itself is multiplied.
func TestPackedLinear(t *testing.T) {
	op, err := Find("nng::linear_packed")
	require.NoError(t, err)
	r := rand.New(rand.NewPCG(1, 2))
	for _, dtype := range []string{"float32", "bfloat16", "float64"} {
		for range 40 {
			out, in := 1+r.Int64N(300), 1+r.Int64N(300)
			weight, transposed, asLinear, bias := drawnLayer(t, r, dtype, in, out)
			x := drawn(t, dtype, r.Int64N(3), 1+r.Int64N(70), in)
			if r.IntN(2) == 0 { // with gaps
				x = call(t, "aten::transpose.int", TensorValue(drawn(t, dtype, x.Shape()[0], in, x.Shape()[1])), IntValue(1), IntValue(2))
			}
			pieces := Value{Kind: graph.ArgList}
			for from := int64(0); from < out; {
				to := min(from+64*(1+r.Int64N(4)), out)
				piece, err := Prepack(weight, transposed, from, to)
				require.NoError(t, err)
				require.Equal(t, dtype == "float64", piece.IsZero())
				if piece.IsZero() {
					break
				}
				t.Cleanup(piece.Free)
				pieces.L = append(pieces.L, TensorValue(piece))
				from = to
			}
			got, err := op.Call([]Value{TensorValue(x), TensorValue(weight), bias, BoolValue(transposed), pieces})
			require.NoError(t, err)
			t.Cleanup(got.Free)
			want := call(t, "aten::linear.default", TensorValue(x), asLinear, bias)
			require.Equal(t, want.Shape(), got.T.Shape())
			require.Equal(t, dtype, got.T.DType())
			if want.Numel() == 0 {
				continue
			}
			tolerance := map[string]float64{"float32": 1e-5, "bfloat16": 2e-2, "float64": 0}[dtype]
			require.LessOrEqual(t, distance(t, want, got.T), tolerance*largest(t, want))
		}
	}
}

// floats32 is a tensor in single precision, as reading it wants it.
func floats32(t *testing.T, x Tensor) Tensor {
	y, err := To(x, "cpu", "float32")
	require.NoError(t, err)
	t.Cleanup(func() { y.Free() })
	return y
}

func TestSchemas(t *testing.T) {
	lines, err := Schemas("aten::add")
	require.NoError(t, err)
	require.Contains(t, strings.Join(lines, "\n"), "aten::add.Tensor(Tensor self, Tensor other")
}

func BenchmarkAdd(b *testing.B) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	x := floats(b, make([]float32, 8), 1, 8)
	for _, name := range []string{"aten::add.Tensor", "aten::add"} {
		op, err := Find(name)
		require.NoError(b, err)
		b.Run(name, func(b *testing.B) {
			var f Frame
			b.ReportAllocs()
			for b.Loop() {
				f.Reset()
				f.Tensor(x)
				f.Tensor(x)
				v, err := op.CallFrame(&f, 2, nil)
				if err != nil {
					b.Fatal(err)
				}
				v.T.Free()
			}
		})
	}
}

func pointer(data []float32) unsafe.Pointer { return unsafe.Pointer(&data[0]) }
