package host

import (
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Protect has no run write to the parameters and buffers from now on, by whatever way it comes to a view of
// them: a model that strangers share. It loads the weights.
//
// What is looked at is memory, when a line is about to write: schemas do not tell which operators return what
// they were given. That an operator writes is told by its name, as PyTorch has it ("add_"), so whoever lets
// strangers in holds them to operators of which that is true (package guard).
func (m *Native) Protect() error {
	if err := m.Load(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	weights := make(map[uintptr]string, len(m.params))
	for name, t := range m.params {
		weights[t.StorageID()] = name
	}
	m.protected.Store(&weights)
	return nil
}

// refuseWrite is the error of a line that is about to write to a weight of a protected model.
func (r *Run) refuseWrite(in *plan.Instr, weights map[uintptr]string) error {
	if in.Node == graph.NoID || !writes(in) {
		return nil
	}
	check := func(a *graph.Arg) error {
		t, err := r.tensor(a)
		if err != nil {
			return nil // no tensor: the operator says what is wrong with it
		}
		name, shared := weights[t.StorageID()]
		if !shared || t.StorageID() == 0 {
			return nil
		}
		return fault.New(fault.Remote, "this line writes to the weights of the model (%s), which others share", name).
			WithHint("Change a copy: weight.clone().")
	}
	args := in.Args
	if !isOut(in.Name) {
		args = args[:min(1, len(args))] // in place is what stands first
	}
	for i := range args {
		if err := check(&args[i]); err != nil {
			return err
		}
	}
	for i := range in.Kwargs {
		if err := check(&in.Kwargs[i].Arg); in.Kwargs[i].Name == "out" && err != nil {
			return err
		}
	}
	return nil
}

// writes reports whether an instruction may write to what it is given.
func writes(in *plan.Instr) bool {
	switch in.Op {
	case plan.OpSetIndex, plan.OpPut, plan.OpTrack, plan.OpSetGrad:
		return true
	case plan.OpCall:
		return isInPlace(in.Name) || isOut(in.Name)
	}
	return false
}

// isInPlace reports whether an operator writes to what it is given first, or to the gradient that this keeps.
func isInPlace(op string) bool {
	base, _, _ := strings.Cut(op, ".")
	return strings.HasSuffix(base, "_") || base == "nng::set_grad" || base == "nng::add_grad"
}

// isOut reports whether an operator is an overload that writes to arguments called out, wherever they stand.
func isOut(op string) bool {
	_, overload, _ := strings.Cut(op, ".")
	return strings.HasSuffix(overload, "out")
}
