package guard

import (
	_ "embed"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// The operators that may be called, one a line, each with the names of its arguments: those of all its
// overloads that give their results, rather than write them somewhere.
//
//go:embed operators.txt
var operatorsText string

// Operators that somebody decided against, each with the reason: a key of reasons. One that stands in neither
// list is refused as well; this one is for the message, and so that a test can tell a decision from an oversight.
//
//go:embed refused.txt
var refusedText string

var (
	allowed = parse(operatorsText, func(fields []string) map[string]bool {
		names := map[string]bool{}
		for _, name := range fields {
			names[name] = true
		}
		return names
	})
	refused = parse(refusedText, func(fields []string) string { return fields[0] })
	ordered = func() (names []string) {
		for name := range allowed {
			names = append(names, name)
		}
		slices.Sort(names)
		return names
	}()
)

func parse[T any](text string, of func(fields []string) T) map[string]T {
	list := map[string]T{}
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) > 0 {
			list[fields[0]] = of(fields[1:])
		}
	}
	return list
}

// reason is why operators are refused, and what to do.
type reason struct{ why, hint string }

var reasons = map[string]reason{
	"memory": {"it looks at a tensor's memory, or changes it, past the tensor's own sizes",
		"Use indexing, reshape or unfold."},
	"uninitialised": {"its values are whatever the server's memory held before", "Use zeros, zeros_like or new_zeros."},
	"draws": {"it draws random numbers, and those of a trace are drawn where it is written",
		"Draw them outside, and use the tensor."},
	"sparse":     {"sparse, nested and oneDNN tensors stay where they were made", "Use a dense tensor."},
	"quantized":  {"quantized tensors stay where they were made", "Use a tensor of float32 or bfloat16."},
	"device":     {"it is about the server's devices", "Leave it out: values are where the model is."},
	"statistics": {"it changes what several runs share", "Compute the statistics in the trace, or outside."},
	"leaf":       {"it changes what autograd knows of a tensor that others may use", "Use detach(), which gives a new one."},
	"inner":      {"it is a part of other operators, and checks little of what it is given", "Use the function it is a part of."},
	"unchecked":  {"it does not check what it is given, and could end the server", "Save its arguments, and call it on what comes back."},
}

// refusal is the error of an operator that is not allowed.
func refusal(name string) *fault.Error {
	if why, ok := reasons[refused[name]]; ok {
		return fault.New(fault.Remote, "a server does not run %s: %s", name, why.why).WithHint("%s", why.hint)
	}
	e := fault.New(fault.Remote, "%s is not among the operators that a server runs", name)
	return e.WithHint("Nearest: %s. Or save its arguments, and call it on what comes back.",
		strings.Join(graph.Nearest(name, ordered, 3), ", "))
}
