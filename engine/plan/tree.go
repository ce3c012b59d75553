package plan

import (
	"strconv"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Trees: arguments and structured values, and what becomes of them when references are replaced.

// leaves calls f for each leaf of a tree, named by its keys joined by dots.
func leaves(name string, a *graph.Arg, f func(string, *graph.Arg)) {
	switch a.Kind {
	case graph.ArgList, graph.ArgTuple:
		for i := range a.L {
			leaves(join(name, strconv.Itoa(i)), &a.L[i], f)
		}
	case graph.ArgDict:
		for i := range a.L {
			leaves(join(name, a.Keys[i]), &a.L[i], f)
		}
	default:
		f(name, a)
	}
}

func join(name, key string) string {
	if name == "" {
		return key
	}
	return name + "." + key
}

// pick takes an element out of a tree.
func pick(of, key *graph.Arg) (*graph.Arg, error) {
	switch {
	case key.Kind == graph.ArgInt:
		i := key.I
		if i < 0 {
			i += int64(len(of.L))
		}
		if i >= 0 && i < int64(len(of.L)) {
			return &of.L[i], nil
		}
	case key.Kind == graph.ArgString && of.Kind == graph.ArgDict:
		for i, k := range of.Keys {
			if k == key.S {
				return &of.L[i], nil
			}
		}
	}
	return nil, fault.New(fault.Op, "there is no element %s in %s", argText(key), argText(of))
}
