package guard

import (
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// values holds the arguments of a node to what computes: tensors that lie in the memory of a processor, one
// element beside the other.
func values(n *graph.Node) (err *fault.Error) {
	each(n, func(a *graph.Arg) {
		if err != nil {
			return
		}
		switch a.Kind {
		case graph.ArgDevice:
			err = device(a.S)
		case graph.ArgLayout:
			if a.S != "strided" {
				err = fault.New(fault.Remote, "a server keeps no tensors of layout %s", a.S).WithHint("Use a dense tensor.")
			}
		}
	})
	return err
}

// device refuses devices other than processors: on meta there are no values, and others may have none of the
// checks that are relied on here.
func device(name string) *fault.Error {
	switch kind, _, _ := strings.Cut(name, ":"); kind {
	case "cpu", "cuda":
		return nil
	}
	return fault.New(fault.Remote, "a server computes on no device %q", name).
		WithHint("Leave it out: values are where the model is.")
}

// devices refuses the same where a device is given as text, to an operator that takes no other text.
func devices(n *graph.Node) (err *fault.Error) {
	each(n, func(a *graph.Arg) {
		if err == nil && a.Kind == graph.ArgString {
			err = device(a.S)
		}
	})
	return err
}

// withheld is the error of an argument that operators have and a server does not give, or nil.
func withheld(op, name string) *fault.Error {
	switch name {
	case "out":
		return fault.New(fault.Remote, "a server gives results, and writes them to nothing that is given with out=").
			WithHint("Use the result, or copy it: x.copy_(...).")
	case "generator":
		return fault.New(fault.Remote, "%s was given a generator, and random numbers are drawn where a trace is written", op)
	case "pin_memory":
		return fault.New(fault.Remote, "%s was asked for pinned memory, which is the server's own affair", op)
	}
	return nil
}
