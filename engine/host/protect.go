package host

import (
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Weights that several users share. What a line writes to is known when it runs: a value may be a weight by any
// path (a constant, a view, an operator that gives back what it was given), and all that lead there share its
// storage. So a run that protects the weights asks, before each instruction that writes, whose storage it is.

// Protect makes the parameters and buffers read-only for runs that begin from now on, or lets runs write to
// them. A line that would is an error of code Remote, and nothing is written. A model that was opened lets them.
func (m *Native) Protect(on bool) { m.protected.Store(on) }

// protect lets a run that is about to begin keep the weights as they are, if it is to.
func (r *Run) protect() { r.protects = r.model.protected.Load() }

// storages names the parameter that each storage of the model's belongs to. The weights are loaded.
func (m *Native) storages() map[uintptr]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.owned == nil {
		m.owned = make(map[uintptr]string, len(m.params))
		for name, t := range m.params {
			if id := t.StorageID(); id != 0 && (m.owned[id] == "" || name < m.owned[id]) {
				m.owned[id] = name
			}
		}
	}
	return m.owned
}

// considerate is the error of a line that would write to a weight of a model that is shared, or make too many tensors.
func (r *Run) considerate(in *plan.Instr) error {
	switch in.Op {
	case plan.OpCall:
		base, _, _ := strings.Cut(in.Name, ".")
		if err := r.fewParts(in, base); err != nil {
			return err
		}
		if err := r.bearable(in, base); err != nil {
			return err
		}
	case plan.OpBackward:
		if in.Pass.Fill && r.model.trained() {
			return fault.New(fault.Remote, "a backward pass would leave gradients at the weights of a model that is shared").
				WithHint("Ask for the gradients that you want: torch.autograd.grad(loss, values).")
		}
	}
	args, err := r.writes(in)
	if err != nil {
		return err
	}
	for _, a := range args {
		if err := r.keepWeight(a, in.Name); err != nil {
			return err
		}
	}
	return nil
}

// writes lists the arguments that an instruction may change in place.
func (r *Run) writes(in *plan.Instr) (args []*graph.Arg, err error) {
	switch in.Op {
	case plan.OpSetIndex, plan.OpPut:
		return []*graph.Arg{&in.Args[0]}, nil
	case plan.OpCall:
		op, err := r.model.op(in.Name)
		if err != nil {
			return nil, err
		}
		for _, w := range op.Writes() {
			if a := given(in, w); a != nil {
				args = append(args, a)
			}
		}
	}
	return args, nil
}

// given is an argument of an instruction, or nil.
func given(in *plan.Instr, w aten.Place) *graph.Arg {
	if w.At >= 0 && w.At < len(in.Args) {
		return &in.Args[w.At]
	}
	i := slices.IndexFunc(in.Kwargs, func(k graph.Kwarg) bool { return k.Name == w.Name })
	if i < 0 {
		return nil
	}
	return &in.Kwargs[i].Arg
}

// keepWeight is the error of writing to an argument that is, or holds, memory of a weight.
func (r *Run) keepWeight(a *graph.Arg, op string) error {
	v, err := r.value(a)
	if err != nil {
		return err
	}
	name, ok := weightIn(&v, r.weightOf)
	if !ok {
		return nil
	}
	e := fault.New(fault.Remote, "this line would change %s, and the weights of a model that is shared are read-only", name).
		WithHint("Change a copy: .clone().")
	e.Op = op
	return e
}

// weightIn finds a tensor of a value that shares memory with a weight.
func weightIn(v *aten.Value, weights map[uintptr]string) (name string, ok bool) {
	if v.Kind == graph.ArgRef {
		name, ok = weights[v.T.StorageID()]
	}
	for i := range v.L {
		if !ok {
			name, ok = weightIn(&v.L[i], weights)
		}
	}
	return name, ok
}
