package host

import (
	"math"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// One operator cannot be interrupted. Most take about as long as their tensors are large, which memory bounds; those
// below may take far longer, and how long shows before they run, in the sizes of what they are given.

// LimitWork bounds the multiplications of each line's operator, in runs that protect the weights; 0 is no bound. A line
// that needs more is an error of code Remote.
func (m *Native) LimitWork(multiplications float64) {
	m.mostWork.Store(math.Float64bits(multiplications))
}

// work estimates multiplications from the sizes of tensors that an operator is given, in their order, and its text.
type work func(sizes [][]int64, text string) float64

// works are by the operator's name without its overload.
var works = map[string]work{
	"aten::mm": product(0), "aten::bmm": product(0), "aten::matmul": product(0), "aten::mv": product(0), "aten::dot": product(0),
	"aten::inner": across, "aten::linear": across, "aten::addmm": product(1), "aten::addbmm": product(1), "aten::baddbmm": product(1),
	"aten::addmv": product(1), "aten::outer": product(0), "aten::einsum": einsum, "aten::tensordot": tensordot, "aten::bilinear": bilinear,
	"nng::linear": layer, "aten::cdist": across, "aten::_cdist_forward": across, "aten::linalg_multi_dot": several, "aten::chain_matmul": several,
	"aten::scaled_dot_product_attention": attention,
	"aten::conv1d":                       convolution, "aten::conv2d": convolution, "aten::conv3d": convolution, "aten::convolution": convolution,
	"aten::conv_transpose1d": convolution, "aten::conv_transpose2d": convolution, "aten::conv_transpose3d": convolution,
	"aten::linalg_svd": cubic(30), "aten::svd": cubic(30), "aten::linalg_svdvals": cubic(15), "aten::linalg_eigh": cubic(20),
	"aten::linalg_eigvalsh": cubic(10), "aten::linalg_eig": cubic(50), "aten::linalg_eigvals": cubic(30), "aten::linalg_inv": cubic(2),
	"aten::inverse": cubic(2), "aten::linalg_pinv": cubic(40), "aten::pinverse": cubic(40), "aten::linalg_det": cubic(1), "aten::det": cubic(1),
	"aten::linalg_slogdet": cubic(1), "aten::slogdet": cubic(1), "aten::logdet": cubic(1), "aten::linalg_qr": cubic(4), "aten::qr": cubic(4),
	"aten::linalg_cholesky": cubic(1), "aten::cholesky": cubic(1), "aten::linalg_matrix_exp": cubic(30), "aten::matrix_exp": cubic(30),
	"aten::linalg_matrix_power": cubic(64), "aten::matrix_power": cubic(64), "aten::linalg_matrix_rank": cubic(30), "aten::linalg_cond": cubic(30),
	"aten::linalg_norm": cubic(30), "aten::linalg_matrix_norm": cubic(30), "aten::nuclear_norm": cubic(30), "aten::linalg_solve": cubic(2),
	"aten::linalg_lstsq": cubic(10), "aten::linalg_solve_triangular": cubic(1), "aten::triangular_solve": cubic(1), "aten::linalg_lu": cubic(1),
	"aten::linalg_lu_factor": cubic(1), "aten::cholesky_solve": cubic(2), "aten::cholesky_inverse": cubic(2), "aten::corrcoef": gram, "aten::cov": gram,
	"aten::pdist": gram,
}

// Spent is how many multiplications a run has done so far, where the work of its lines is bounded.
func (r *Run) Spent() float64 { return r.spent }

// bearable is the error of a call that would take longer than a line may.
func (r *Run) bearable(in *plan.Instr, base string) error {
	most := math.Float64frombits(r.model.mostWork.Load())
	if most == 0 {
		return nil
	}
	estimate, known := works[base]
	if !known {
		return nil
	}
	var sizes [][]int64
	var text string
	var look func(v *aten.Value)
	look = func(v *aten.Value) {
		switch v.Kind {
		case graph.ArgRef:
			sizes = append(sizes, v.T.Shape())
		case graph.ArgString:
			text = v.S
		}
		for i := range v.L {
			look(&v.L[i])
		}
	}
	for i := range in.Args {
		v, err := r.value(&in.Args[i])
		if err != nil {
			return nil // the call says it better
		}
		look(&v)
	}
	for i := range in.Kwargs {
		v, err := r.value(&in.Kwargs[i].Arg)
		if err != nil {
			return nil
		}
		look(&v)
	}
	needs := estimate(sizes, text)
	r.spent += needs
	if needs > most {
		e := fault.New(fault.Remote, "this line takes some %.1e multiplications, and a line may take %.1e here", needs, most).
			WithHint("Do it in smaller pieces, or with what comes back.")
		e.Op = in.Name
		return e
	}
	return nil
}

func count(sizes []int64) float64 {
	n := 1.0
	for _, size := range sizes {
		n *= float64(size)
	}
	return n
}

// last is a size counted from the end, 1 where there is none.
func last(sizes []int64, i int) float64 {
	if i >= len(sizes) {
		return 1
	}
	return float64(sizes[len(sizes)-1-i])
}

// pair gives two of the tensors, if they are there.
func pair(sizes [][]int64, first int, f func(a, b []int64) float64) float64 {
	if first+1 >= len(sizes) {
		return 0
	}
	return f(sizes[first], sizes[first+1])
}

// product is a [..., n, k] times b [..., k, m]: every number of a meets m of b, in all the batches of both.
func product(first int) work {
	return func(sizes [][]int64, _ string) float64 {
		return pair(sizes, first, func(a, b []int64) float64 {
			one := count(a)
			if len(b) < 2 {
				return one
			}
			other := count(b) / (last(b, 0) * last(b, 1))
			own := count(a) / (last(a, 0) * last(a, 1))
			if other > own && own > 0 { // batches of b that a is repeated for
				one *= other / own
			}
			return one * last(b, 0)
		})
	}
}

// across is a [..., n, k] with every row of b [..., m, k].
func across(sizes [][]int64, _ string) float64 {
	return pair(sizes, 0, func(a, b []int64) float64 { return count(a) * count(b) / math.Max(last(b, 0), 1) })
}

// layer is a [..., n, k] with a weight of k times as many columns, whichever way that lies.
func layer(sizes [][]int64, _ string) float64 {
	return pair(sizes, 0, func(a, w []int64) float64 { return count(a) / math.Max(last(a, 0), 1) * count(w) })
}

// several is a product of several matrices.
func several(sizes [][]int64, _ string) (sum float64) {
	for i := 1; i < len(sizes); i++ {
		sum += last(sizes[0], 1) * count(sizes[i])
	}
	return sum
}

// einsum is every combination of indices, as if nothing were summed early.
func einsum(sizes [][]int64, text string) float64 {
	inputs, _, _ := strings.Cut(strings.ReplaceAll(text, " ", ""), "->")
	known := map[rune]float64{}
	rest := 1.0
	for i, letters := range strings.Split(inputs, ",") {
		if i >= len(sizes) {
			break
		}
		names := []rune(letters)
		at := 0
		for n := 0; n < len(names); n++ {
			if names[n] == '.' { // "...": what the letters leave
				hidden := len(sizes[i]) - (len(names) - 3)
				all := 1.0
				for ; hidden > 0 && at < len(sizes[i]); hidden-- {
					all *= float64(sizes[i][at])
					at++
				}
				rest = math.Max(rest, all)
				n += 2
				continue
			}
			if at < len(sizes[i]) {
				known[names[n]] = math.Max(known[names[n]], float64(sizes[i][at]))
				at++
			}
		}
	}
	for _, n := range known {
		rest *= n
	}
	return rest
}

// tensordot sums over one axis at least.
func tensordot(sizes [][]int64, _ string) float64 {
	return pair(sizes, 0, func(a, b []int64) float64 { return count(a) * count(b) / math.Max(largestShared(a, b), 1) })
}

func largestShared(a, b []int64) (most float64) {
	for _, x := range a {
		for _, y := range b {
			if x == y {
				most = math.Max(most, float64(x))
			}
		}
	}
	return most
}

// bilinear is x [..., k] and y [..., l] with w [m, k, l].
func bilinear(sizes [][]int64, _ string) float64 {
	if len(sizes) < 3 {
		return 0
	}
	return count(sizes[0]) / math.Max(last(sizes[0], 0), 1) * count(sizes[2])
}

// attention is q [..., n, d] with k and v [..., m, d].
func attention(sizes [][]int64, _ string) float64 {
	return 2 * pair(sizes, 0, func(q, k []int64) float64 { return count(q) * last(k, 1) })
}

// convolution is at most the whole kernel at each place of the input. x [batch, in, ...], w [out, in, ...].
func convolution(sizes [][]int64, _ string) float64 {
	return pair(sizes, 0, func(x, w []int64) float64 {
		if len(w) < 2 || len(x) < len(w)-1 {
			return 0
		}
		channels := float64(x[len(x)-(len(w)-1)])
		return count(x) * count(w) / math.Max(channels, 1)
	})
}

// cubic is so many times n^3 of a matrix, or n*m*min(n, m), in each of the batch.
func cubic(times float64) work {
	return func(sizes [][]int64, _ string) float64 {
		if len(sizes) == 0 || len(sizes[0]) < 2 {
			return 0
		}
		a := sizes[0]
		if len(sizes) > 1 { // a right side
			return times * (count(a)*math.Min(last(a, 0), last(a, 1)) + count(sizes[1])*last(a, 0))
		}
		return times * count(a) * math.Min(last(a, 0), last(a, 1))
	}
}

// gram is every row with every other.
func gram(sizes [][]int64, _ string) float64 {
	if len(sizes) == 0 {
		return 0
	}
	return count(sizes[0]) * last(sizes[0], 1)
}
