package host

import (
	"math"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// gradients is what a run has done about gradients.
type gradients struct {
	passes   map[graph.ID]*backward
	retained []aten.Tensor     // values that retain their gradients
	owned    []aten.Tensor     // what stands in slots that the machine does not free
	followed bool              // autograd follows a value of the run
	keeps    bool              // and was asked to, so that what is saved keeps its history
	filled   map[graph.ID]bool // passes that have filled the gradients of leaves; planning anew does not undo that
}

// backward is a backward pass that is done in pieces.
type backward struct {
	slots            []plan.Slot // of what was edited
	edited, replaced []aten.Tensor
	least            int64 // the earliest value whose gradient was given
	by               graph.ID
}

// reset forgets all but what cannot be undone.
func (g *gradients) reset() {
	for _, b := range g.passes {
		b.free()
	}
	aten.FreeAll(append(g.retained, g.owned...))
	g.passes, g.retained, g.owned = nil, nil, nil
}

func (b *backward) free() {
	aten.FreeAll(append(b.edited, b.replaced...))
	b.slots, b.edited, b.replaced = nil, nil, nil
}

// pass is the state of a pass.
func (g *gradients) pass(of graph.ID) *backward {
	b := g.passes[of]
	if b == nil {
		if g.passes == nil {
			g.passes = map[graph.ID]*backward{}
		}
		b = &backward{least: math.MaxInt64, by: graph.NoID}
		g.passes[of] = b
	}
	return b
}

// track lets autograd follow what a slot holds.
func (r *Run) track(in *plan.Instr) error {
	t, err := r.tensor(&in.Args[0])
	if err != nil {
		return err
	}
	how, borrowed := in.Args[1].I, in.Args[2].I != 0
	if borrowed && t.RequiresGrad() { // the user's own leaf, which keeps its gradient
		return nil
	}
	out, err := aten.Track(t, how == graph.TrackRetain)
	if err != nil {
		return fault.New(fault.Gradient, "%s", fault.As(err).Message).WithHint("Ask for gradients in a trace outside of it, or of another value.")
	}
	r.machine.Bind(in.Args[0].Ref, value{tensor: out})
	if borrowed {
		r.gradients.owned = append(r.gradients.owned, out)
	} else {
		t.Free()
	}
	r.gradients.followed = true
	r.gradients.keeps = r.gradients.keeps || how >= graph.TrackHistory
	if how == graph.TrackRetain {
		kept, err := out.Share()
		if err != nil {
			return err
		}
		r.gradients.retained = append(r.gradients.retained, kept)
	}
	return nil
}

// tensors gives a list of tensors. They stay the machine's.
func (r *Run) tensors(a *graph.Arg) ([]aten.Tensor, error) {
	out := make([]aten.Tensor, 0, len(a.L))
	for i := range a.L {
		if a.L[i].Kind == graph.ArgNone {
			out = append(out, aten.Tensor{})
			continue
		}
		t, err := r.tensor(&a.L[i])
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

// backward does a backward pass, or as much of one as gives the gradients that are asked for.
func (r *Run) backward(in *plan.Instr) (value, error) {
	var lists [3][]aten.Tensor
	for i := range lists {
		var err error
		if lists[i], err = r.tensors(&in.Args[i]); err != nil {
			return value{}, err
		}
	}
	state := r.gradients.pass(in.Pass.Node)
	work := aten.Backward{Roots: lists[0], Seeds: lists[1], Targets: lists[2], Edited: state.edited, Replaced: state.replaced,
		Retain: in.Pass.Retain, Create: in.Pass.Create, Fill: in.Pass.Fill, Retained: r.gradients.retained}
	if !slices.ContainsFunc(work.Roots, aten.Tensor.RequiresGrad) {
		return value{}, r.unfollowed(work.Roots, in)
	}
	for _, t := range work.Targets {
		state.least = min(state.least, t.GradOrder())
	}
	refill := work.Fill && r.gradients.filled[in.Pass.Node]
	if refill { // leaves have theirs; what the run has made anew does not
		work.Fill = false
		work.Targets = append(slices.Clone(work.Targets), r.gradients.retained...)
	}
	found, err := work.Run()
	if err != nil {
		e := again(err)
		r.at(e, in.Pass.Node)
		return value{}, e
	}
	if in.Pass.Fill {
		if r.gradients.filled == nil {
			r.gradients.filled = map[graph.ID]bool{}
		}
		r.gradients.filled[in.Pass.Node] = true
	}
	if in.Pass.Last {
		state.free()
	}
	ok := false
	defer func() {
		if !ok {
			aten.FreeAll(found)
		}
	}()
	if refill {
		if err := r.refill(found[len(lists[2]):]); err != nil {
			return value{}, err
		}
		found = found[:len(lists[2])]
	}
	storages := map[uintptr]bool{}
	out := aten.Value{Kind: graph.ArgTuple}
	for i, t := range found {
		if t.IsZero() {
			return value{}, r.unreached(in, i, lists[2][i])
		}
		// one tensor may be the gradient of several values, and a line that changes one means that one
		if id := t.StorageID(); !storages[id] && in.Pass.Last {
			storages[id] = true
		} else {
			own, err := aten.Clone(t)
			if err != nil {
				return value{}, err
			}
			t.Free()
			found[i] = own
		}
		out.L = append(out.L, aten.TensorValue(found[i]))
	}
	ok = true
	return value{other: &out}, nil
}

// refill adds gradients to those of the values that retain theirs, and frees them.
func (r *Run) refill(found []aten.Tensor) error {
	defer func() {
		for i, t := range found {
			t.Free()
			found[i] = aten.Tensor{}
		}
	}()
	for i, t := range found {
		if t.IsZero() {
			continue
		}
		op, err := aten.Find("nng::add_grad.default")
		if err != nil {
			return err
		}
		out, err := op.Call([]aten.Value{aten.TensorValue(r.gradients.retained[i]), aten.TensorValue(t)})
		if err != nil {
			return err
		}
		out.Free()
	}
	return nil
}

// again explains why a graph cannot be gone through twice.
func again(err error) *fault.Error {
	e := fault.As(err)
	if strings.Contains(e.Message, "backward through the graph a second time") {
		e.Code, e.Op = fault.Gradient, ""
		e.Message = "an earlier backward pass has gone through this graph and freed it"
		e.Hint = "Keep it for the next one: loss.backward(retain_graph=True)."
	}
	return e
}

// unfollowed explains why a value has no gradients at all.
func (r *Run) unfollowed(roots []aten.Tensor, in *plan.Instr) error {
	e := fault.New(fault.Gradient, "this value has no gradients: nothing that it was computed from takes part in autograd")
	r.at(e, in.Pass.Node)
	switch {
	case len(roots) > 0 && !strings.Contains(roots[0].DType(), "float") && !strings.HasPrefix(roots[0].DType(), "complex"):
		e.Message = "this value has no gradients: it is of dtype " + roots[0].DType()
		return e.WithHint("Only floating point and complex values have gradients: start from logits or a loss, not from indices.")
	case len(r.graph.Invokes) > 0 && r.graph.Invokes[0].Mode() != graph.ModeGrad:
		e.Message += ", since the trace runs under torch.no_grad() or inference mode"
		return e.WithHint("Begin the trace outside of it, or inside of `with torch.enable_grad():`.")
	}
	return e.WithHint("Ask for the gradient of a value that it depends on, in the block of backward() or by h.requires_grad_(). " +
		"The gradient of a part comes from the whole: h.grad[:, -1], not h[:, -1].grad.")
}

// unreached explains why a backward pass has not come to a value.
func (r *Run) unreached(in *plan.Instr, i int, target aten.Tensor) error {
	e := fault.New(fault.Gradient, "the value whose gradient is asked for (%s %v) has no part in what backward() starts from",
		target.DType(), target.Shape())
	if i < len(in.Others) {
		r.at(e, in.Others[i])
	}
	return e.WithHint("A value that was detached, computed under no_grad, or replaced before it was used has none; the gradient " +
		"of a part comes from the whole: h.grad[:, -1], not h[:, -1].grad.")
}

// at puts an error at a node.
func (r *Run) at(e *fault.Error, node graph.ID) {
	n := &r.graph.Nodes[node]
	e.Node, e.Invoke, e.Step, e.Pos = int(node), int(n.Invoke), int(n.Step), r.graph.PosOf(n)
}

// setGrad makes a gradient another one for what a pass goes on to.
func (r *Run) setGrad(in *plan.Instr) error {
	t, err := r.tensor(&in.Args[0])
	if err != nil {
		return err
	}
	v, err := r.tensor(&in.Args[1])
	if err != nil {
		return err
	}
	if !t.RequiresGrad() {
		return fault.New(fault.Gradient, "autograd does not follow this value, so its gradient cannot be set")
	}
	if !slices.Equal(t.Shape(), v.Shape()) || t.DType() != v.DType() {
		return fault.New(fault.Op, "a gradient of %s %v cannot become one of %s %v", t.DType(), t.Shape(), v.DType(), v.Shape()).
			WithHint("A gradient has the sizes and the dtype of its value.")
	}
	state := r.gradients.pass(in.Pass.Node)
	if t.GradOrder() > state.least {
		return fault.New(fault.OutOfOrder, "this gradient is changed after one was read that depends on it").
			WithHint("A backward pass goes from the end of the model to its beginning: change the gradients of later modules first.")
	}
	own, err := v.Share()
	if err != nil {
		return err
	}
	slot := in.Args[0].Ref
	if at := slices.Index(state.slots, slot); at >= 0 {
		state.replaced[at].Free()
		state.replaced[at] = own
		return nil
	}
	target, err := t.Share()
	if err != nil {
		own.Free()
		return err
	}
	state.slots, state.edited, state.replaced = append(state.slots, slot), append(state.edited, target), append(state.replaced, own)
	return nil
}

// history reports whether what the run gives keeps the history that autograd has of it: where the program
// asked for gradients itself, and not only for some of them to be read.
func (r *Run) history() bool {
	if r.gradients.keeps {
		return true
	}
	for _, t := range r.consts {
		if t.RequiresGrad() {
			return true
		}
	}
	return r.model.trained()
}
