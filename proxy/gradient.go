package proxy

import "github.com/nnsight-go/nnsight-go/engine/graph"

// Backward is a backward pass, in which gradients can be read and changed. It ends with [Backward.End], or
// with the trace.
//
//	b := loss.Backward(proxy.BackwardOptions{})
//	grad := b.Grad(hidden).Save()
//
// Gradients can be read in any order. Changes go from the end of the model to its beginning: one that comes
// after a gradient was read that depends on it is an error.
type Backward struct {
	pass  *Value
	ended bool
}

// BackwardOptions are those of torch's backward. The zero value starts with a gradient of one, which only a
// scalar has, and frees what the pass needs of the forward pass.
type BackwardOptions struct {
	Gradient    any  // a value or a tensor: what the pass starts with
	RetainGraph bool // another pass may go the same way
	CreateGraph bool // gradients have gradients of their own
}

// Backward begins a backward pass from v.
func (v *Value) Backward(o BackwardOptions) *Backward {
	in := v.invoke
	b := &Backward{pass: in.add(graph.Node{Kind: graph.KindBackward, Args: []graph.Arg{graph.Ref(v.id), in.arg(o.Gradient),
		graph.Bool(o.RetainGraph || o.CreateGraph), graph.Bool(o.CreateGraph), graph.Bool(true), graph.Bool(true)}})}
	in.trace.passes = append(in.trace.passes, b)
	return b
}

// Grad is the gradient of a value in the pass, of the value's sizes. Changed in place, it is what the pass
// goes on with.
func (b *Backward) Grad(of *Value) *Value {
	return b.pass.invoke.add(graph.Node{Kind: graph.KindGrad, Args: b.args(of)})
}

// SetGrad makes the gradient of a value another one, of the same sizes.
func (b *Backward) SetGrad(of *Value, gradient any) {
	b.pass.invoke.add(graph.Node{Kind: graph.KindSetGrad, Args: append(b.args(of), b.pass.invoke.arg(gradient))})
}

func (b *Backward) args(of *Value) []graph.Arg {
	return append(b.pass.invoke.args([]any{of}), graph.Ref(b.pass.id))
}

// End ends the pass. Leaves, tensors of the program that require gradients, then have theirs.
func (b *Backward) End() {
	if b.ended {
		return
	}
	b.ended = true
	b.pass.invoke.add(graph.Node{Kind: graph.KindEnd, Args: []graph.Arg{graph.Ref(b.pass.id)}})
}

// RetainGrad lets the value keep the gradients of backward passes: after Run, Tensor().Grad() gives their
// sum, if the value was saved. Saved values of the trace then keep their history, for passes after it.
func (v *Value) RetainGrad() *Value {
	v.invoke.add(graph.Node{Kind: graph.KindTrack, Args: []graph.Arg{graph.Ref(v.id), graph.Int(graph.TrackRetain)}})
	return v
}

// endPasses ends what the program left open.
func (t *Trace) endPasses() {
	for _, b := range t.passes {
		b.End()
	}
}
