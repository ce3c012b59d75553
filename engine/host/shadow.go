package host

import (
	"cmp"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// What an estimate knows of the values of a schedule, and counts of them.

// sure promises what comes of an instruction, where that is known without asking torch.
func (x *shadow) sure(in *plan.Instr) bool {
	if in.Out == plan.NoSlot {
		return false
	}
	if in.Op == plan.OpMask {
		x.promise(in.Out, []int64{in.Window.Rows, 1, int64(len(in.Tokens)) / in.Window.Rows, in.Window.Toks}, "bool", nil)
		return true
	}
	shape, dtype, ok := x.shapeOf(in)
	if !ok {
		return false
	}
	if in.Op == plan.OpCall {
		if args, err := x.given(in); err == nil {
			x.count(in, args)
		}
	}
	var of *held
	if in.Op != plan.OpTake && in.Op != plan.OpPack && !in.Fresh && len(in.Args) > 0 && in.Args[0].Kind == graph.ArgRef {
		of = x.heldAt(in.Args[0].Ref)
	}
	x.promise(in.Out, shape, dtype, of)
	return true
}

// heldAt is the storage of what a slot holds, or nil.
func (x *shadow) heldAt(slot plan.Slot) *held {
	if h := x.known[slot].held; h != nil {
		return h
	}
	if v, err := x.run.machine.Value(slot); err == nil && v.other == nil {
		return x.live[v.tensor.StorageID()]
	}
	return nil
}

// shapeOf is the shape that an instruction of the engine's gives, by the model or by the sizes of its first argument.
func (x *shadow) shapeOf(in *plan.Instr) (shape []int64, dtype string, ok bool) {
	switch in.Op {
	case plan.OpIndex:
		return nil, "", false
	case plan.OpCall, plan.OpItem:
		if !in.Main || x.odd {
			return nil, "", false
		}
		if in.Shape == nil { // a container, whose elements say what they are
			return nil, "", true
		}
		return x.dims(in.Of).of(in.Shape), x.dtypeOf(in), true
	}
	shape, dtype, ok = x.sizesAt(in.Args[0].Ref)
	w := &in.Window
	shape = slices.Clone(shape)
	switch {
	case !ok:
	case in.Op == plan.OpClone:
	case in.Op == plan.OpSpread && len(shape) > 0:
		shape[0] = w.Batch
	case in.Op == plan.OpRows:
		for _, axis := range append([]int{w.BatchAxis}, w.SeqAxes...) {
			if axis >= len(shape) {
				return nil, "", false
			}
		}
		if w.BatchAxis >= 0 {
			shape[w.BatchAxis] = w.Rows
		}
		for _, axis := range w.SeqAxes {
			shape[axis] = w.Toks
		}
	case in.Op == plan.OpTake && len(shape) > 0:
		shape[0] = int64(len(in.Tokens))
	case in.Op == plan.OpPack && len(shape) > w.SeqAxes[0]:
		shape = slices.Delete(shape, w.SeqAxes[0], w.SeqAxes[0]+1)
		shape[0] = int64(len(in.Tokens))
	case in.Op == plan.OpUnpack && len(shape) >= w.SeqAxes[0]:
		shape = slices.Insert(shape, w.SeqAxes[0], w.Toks)
		shape[0] = w.Rows
	default:
		ok = false
	}
	return shape, dtype, ok
}

// errUnknown is why nothing is known of what comes of an unknown value.
var errUnknown = fault.New(fault.Internal, "nothing is known of this value")

// arguments are the tensors that a call is given, in their order, and its text.
type arguments struct {
	sizes  [][]int64
	dtypes []string
	text   string
}

// dtype is that of what an operator with a rule gives; empty where torch alone can say.
func (a *arguments) dtype(base string) string {
	if base != "aten::where" {
		return a.dtypes[0]
	}
	first, last := a.dtypes[1], a.dtypes[len(a.dtypes)-1]
	if first != last || len(a.dtypes) == 2 && !strings.Contains(first, "float") { // a number may make another one of it
		return ""
	}
	return first
}

// given gives the arguments of a call, or an error where one of them is unknown.
func (x *shadow) given(in *plan.Instr) (out arguments, err error) {
	var look func(a *graph.Arg)
	look = func(a *graph.Arg) {
		switch a.Kind {
		case graph.ArgRef:
			if e := x.look(a.Ref, &out); err == nil {
				err = e
			}
		case graph.ArgString:
			out.text = a.S
		}
		for i := range a.L {
			look(&a.L[i])
		}
	}
	for i := range in.Args {
		look(&in.Args[i])
	}
	for i := range in.Kwargs {
		look(&in.Kwargs[i].Arg)
	}
	return out, err
}

// look adds what a slot holds: a tensor, or a list of them.
func (x *shadow) look(slot plan.Slot, out *arguments) error {
	if shape, dtype, ok := x.sizesAt(slot); ok {
		out.sizes, out.dtypes = append(out.sizes, shape), append(out.dtypes, dtype)
		return nil
	}
	v, err := x.run.machine.Value(slot)
	if err != nil || v.other == unknown.other {
		return errUnknown
	}
	v.each(func(t aten.Tensor) {
		out.sizes, out.dtypes = append(out.sizes, t.Shape()), append(out.dtypes, t.DType())
	})
	return nil
}

// backward gives the gradients of a backward pass, which takes about twice what it goes back through.
func (x *shadow) backward(in *plan.Instr) (value, error) {
	x.cost.Work += 2 * (x.cost.Work - max(x.follows, 0))
	out := aten.Value{Kind: graph.ArgList}
	var err error
	in.Args[2].Refs(func(slot plan.Slot) {
		shape, dtype, ok := x.sizesAt(slot)
		if !ok || err != nil {
			err = cmp.Or(err, error(errUnknown))
			return
		}
		var grad aten.Tensor
		if grad, err = aten.Zeros(dtype, meta, shape...); err == nil {
			out.L = append(out.L, aten.TensorValue(grad))
		}
	})
	if err != nil {
		out.Free()
		return value{}, err
	}
	return value{other: &out}, nil
}

// each calls f for the tensors of a value.
func (v value) each(f func(aten.Tensor)) {
	if v.other == nil {
		if !v.tensor.IsZero() {
			f(v.tensor)
		}
		return
	}
	var look func(v *aten.Value)
	look = func(v *aten.Value) {
		if v.Kind == graph.ArgRef {
			f(v.T)
		}
		for i := range v.L {
			look(&v.L[i])
		}
	}
	look(v.other)
}

// gain counts the storages of what an instruction gave.
func (x *shadow) gain(in *plan.Instr, out value) {
	if out.other == promised.other {
		if h := x.known[in.Out].held; h.values == 1 && !in.Main {
			x.cost.largest.more(in.Node, float64(h.bytes))
		}
	} else {
		out.each(func(t aten.Tensor) {
			id, bytes := t.Storage()
			h := x.live[id]
			if h == nil || in.Fresh && in.Op == plan.OpCall {
				h = &held{bytes: bytes}
				x.live[id] = h
				x.bytes += bytes
				x.cost.largest.more(in.Node, float64(bytes))
			}
			h.values++
		})
	}
	x.cost.Peak = max(x.cost.Peak, x.bytes)
}

// lose counts out what died with an instruction, and frees it. What autograd follows is kept for the way back.
func (x *shadow) lose(in *plan.Instr, dead []value) {
	drop := func(h *held) bool {
		if h.values--; h.values > 0 {
			return false
		}
		if x.follows < 0 || in.Mode&graph.ModeGrad == 0 {
			x.bytes -= h.bytes
		}
		return true
	}
	for _, slot := range in.Frees {
		if h := x.known[slot].held; h != nil {
			drop(h)
			x.known[slot] = known{}
		}
	}
	for _, v := range dead {
		v.each(func(t aten.Tensor) {
			if id := t.StorageID(); x.live[id] != nil && drop(x.live[id]) {
				delete(x.live, id)
			}
		})
	}
	release(dead)
}

// save counts what is handed over.
func (x *shadow) save(s *plan.Schedule) {
	counted := map[plan.Slot]bool{}
	for i := range s.Saved {
		saved := SavedCost{Node: s.Saved[i].Node}
		s.Saved[i].Value.Refs(func(slot plan.Slot) {
			if counted[slot] {
				return
			}
			counted[slot] = true
			if k := &x.known[slot]; k.held != nil {
				saved.Bytes += int64(count(k.shape)) * itemBytes(k.dtype)
				return
			}
			v, err := x.run.machine.Value(slot)
			x.cost.Exact = x.cost.Exact && err == nil && v.other != unknown.other
			if err == nil {
				v.each(func(t aten.Tensor) { saved.Bytes += t.Bytes() })
			}
		})
		x.cost.Saved = append(x.cost.Saved, saved)
		x.cost.Output += saved.Bytes
	}
}
