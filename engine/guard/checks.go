package guard

import (
	"fmt"
	"math"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// check is what an operator that is allowed must not be given.
type check func(n *graph.Node) *fault.Error

// MaxParts bounds how many tensors one operator may be asked for by a number: each takes some hundred bytes
// that belong to no tensor's memory, and so to none that is counted.
const MaxParts = 1 << 12

const (
	least     = math.MinInt64
	maxTimes  = 1 << 10 // bounds numbers that say how often something is done, whatever the sizes
	maxChosen = 16      // elements of one combination
)

var checks = map[string][]check{
	"batch_norm": {frozen}, "instance_norm": {frozen},
	"div": {truncation}, "div_": {truncation}, "divide": {truncation}, "divide_": {truncation},
	"median": {whole}, "nanmedian": {whole},
	"scaled_dot_product_attention": {number(4, "dropout_p", 0, 0)},

	"chunk": {number(1, "chunks", least, MaxParts)}, "hsplit": {number(1, "sections", least, MaxParts)},
	"vsplit": {number(1, "sections", least, MaxParts)}, "dsplit": {number(1, "sections", least, MaxParts)},
	"tensor_split": {number(1, "sections", least, MaxParts), number(1, "tensor_indices_or_sections", least, MaxParts)},
	"combinations": {number(1, "r", least, maxChosen)},

	"mvlgamma": {number(1, "p", least, maxTimes)}, "mvlgamma_": {number(1, "p", least, maxTimes)},
	"special_multigammaln": {number(1, "p", least, maxTimes)},
	"polygamma":            {number(0, "n", least, maxTimes)}, "polygamma_": {number(1, "n", least, maxTimes)},
	"special_polygamma": {number(0, "n", least, maxTimes)}, "diff": {number(1, "n", least, maxTimes)},
	"linalg_matrix_power": {number(1, "n", -maxTimes, maxTimes)}, "matrix_power": {number(1, "n", -maxTimes, maxTimes)},
}

// checksOf gives the checks of an operator. Polynomials take a step for each degree, of every element.
func checksOf(op string) []check {
	name := strings.TrimPrefix(op, "aten::")
	if strings.Contains(name, "_polynomial_") {
		return []check{number(1, "n", least, maxTimes)}
	}
	return checks[name]
}

// argument is an argument of a call, by place or by name, or nil.
func argument(n *graph.Node, place int, name string) *graph.Arg {
	if place < len(n.Args) {
		return &n.Args[place]
	}
	for i := range n.Kwargs {
		if n.Kwargs[i].Name == name {
			return &n.Kwargs[i].Arg
		}
	}
	return nil
}

// number bounds an argument that is a number. It must be written out: what a value comes to is not known here.
func number(place int, name string, low, most int64) check {
	return func(n *graph.Node) *fault.Error {
		a := argument(n, place, name)
		if a == nil {
			return nil
		}
		var e *fault.Error
		switch a.Kind {
		case graph.ArgInt, graph.ArgBool:
			if a.I >= low && a.I <= most {
				return nil
			}
			e = fault.New(fault.Remote, "its %s is %d", name, a.I)
		case graph.ArgFloat:
			if a.F >= float64(low) && a.F <= float64(most) {
				return nil
			}
			e = fault.New(fault.Remote, "its %s is %v", name, a.F)
		case graph.ArgRef:
			e = fault.New(fault.Remote, "its %s is a value of the trace", name)
		default: // a list of places, or what the operator itself refuses
			return nil
		}
		if low == most {
			e.Message += fmt.Sprintf(", and a server takes %d alone", most)
		} else {
			e.Message += fmt.Sprintf(", and a server takes numbers up to %d", most)
		}
		return e
	}
}

// frozen refuses to update running statistics, which no schema says.
func frozen(n *graph.Node) *fault.Error {
	mean, variance, training := argument(n, 3, "running_mean"), argument(n, 4, "running_var"), argument(n, 5, "training")
	if training == nil {
		training = argument(n, 5, "use_input_stats")
	}
	none := func(a *graph.Arg) bool { return a == nil || a.Kind == graph.ArgNone }
	if none(mean) && none(variance) || training != nil && training.Kind == graph.ArgBool && training.I == 0 {
		return nil
	}
	why := reasons["statistics"]
	return fault.New(fault.Remote, "with running statistics in training, %s", why.why).WithHint("%s", why.hint)
}

// whole refuses medians along an axis: torch 2.15's kernel takes an expanded tensor for a contiguous one, and gives
// what lies in memory behind it.
func whole(n *graph.Node) *fault.Error {
	if argument(n, 1, "dim") == nil {
		return nil
	}
	return fault.New(fault.Remote, "a server takes the median of all elements alone").
		WithHint("Along an axis of n places it is x.kthvalue((n + 1) // 2, dim), and x.sort(dim) has it in the middle.")
}

// truncation refuses a rounding that ends the process where the smallest of all integers is divided by -1.
func truncation(n *graph.Node) *fault.Error {
	mode := argument(n, 2, "rounding_mode")
	if mode == nil || mode.Kind == graph.ArgNone || mode.Kind == graph.ArgString && mode.S == "floor" {
		return nil
	}
	return fault.New(fault.Remote, "a server rounds quotients down, or not at all").
		WithHint(`Use rounding_mode="floor", or torch.trunc of the quotient.`)
}
