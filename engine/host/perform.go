package host

import (
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/nn"
	"github.com/nnsight-go/nnsight-go/engine/plan"
	"slices"
)

// perform does what one instruction says.
func (r *Run) perform(in *plan.Instr) (value, error) {
	if r.protects {
		if err := r.considerate(in); err != nil {
			return value{}, err
		}
	}
	switch in.Op {
	case plan.OpCall:
		return r.call(in)
	case plan.OpIndex:
		self, err := r.tensor(&in.Args[0])
		if err != nil {
			return value{}, err
		}
		index, err := r.value(&in.Args[1])
		if err != nil {
			return value{}, err
		}
		t, err := aten.IndexGet(self, index)
		return value{tensor: t}, err
	case plan.OpSetIndex:
		self, err := r.tensor(&in.Args[0])
		if err != nil {
			return value{}, err
		}
		index, err := r.value(&in.Args[1])
		if err != nil {
			return value{}, err
		}
		v, err := r.value(&in.Args[2])
		if err != nil {
			return value{}, err
		}
		return value{}, aten.IndexSet(self, index, v)
	case plan.OpItem:
		return r.item(in)
	case plan.OpRows, plan.OpClone, plan.OpSpread:
		if r.isNone(&in.Args[0]) {
			return value{other: &aten.Value{Kind: graph.ArgNone}}, nil
		}
		self, err := r.tensor(&in.Args[0])
		if err != nil {
			return value{}, err
		}
		return r.copyOf(self, in)
	case plan.OpPut:
		return value{}, r.put(in)
	case plan.OpExpect:
		return value{}, r.expect(in)
	case plan.OpGuard:
		return value{}, r.guard(in)
	case plan.OpFetch:
		return r.fetch()
	case plan.OpGive:
		return value{}, r.give(in)
	case plan.OpPack:
		return r.pack(in)
	case plan.OpTake:
		return r.take(in)
	case plan.OpUnpack:
		return r.unpack(in)
	case plan.OpMask:
		return r.mask(in)
	case plan.OpTrack:
		return value{}, r.track(in)
	case plan.OpBackward:
		return r.backward(in)
	case plan.OpSetGrad:
		return value{}, r.setGrad(in)
	}
	return value{}, fault.New(fault.Internal, "instruction %d is unknown", in.Op)
}

// isTanhGELU tells the call that models make, which nn.GELUOp does faster.
func isTanhGELU(in *plan.Instr) bool {
	return in.Name == "aten::gelu" && len(in.Args) == 1 && len(in.Kwargs) == 1 &&
		in.Kwargs[0].Name == "approximate" && in.Kwargs[0].Arg.Kind == graph.ArgString && in.Kwargs[0].Arg.S == "tanh"
}

// call runs an ATen operator.
func (r *Run) call(in *plan.Instr) (value, error) {
	name := in.Name
	var pieces []aten.Tensor
	switch {
	case isTanhGELU(in):
		if x, err := r.tensor(&in.Args[0]); err == nil && (x.DType() == "float32" || x.DType() == "bfloat16") {
			name = nn.GELUOp
		}
	case name == nn.LinearOp:
		var err error
		if pieces, err = r.packed(in); err != nil {
			return value{}, err
		}
		if pieces != nil {
			defer aten.FreeAll(pieces)
			name = nn.PackedLinearOp
		}
	}
	op, err := r.model.op(name)
	if err != nil {
		return value{}, err
	}
	f := &r.frame
	f.Reset()
	for i := range in.Args {
		if err := r.push(&in.Args[i]); err != nil {
			return value{}, err
		}
	}
	nargs := len(in.Args)
	if pieces != nil {
		nargs++
		f.List(len(pieces))
		for _, t := range pieces {
			f.Tensor(t)
		}
	}
	var names []string
	for i := range in.Kwargs {
		names = append(names, in.Kwargs[i].Name)
		if err := r.push(&in.Kwargs[i].Arg); err != nil {
			return value{}, err
		}
	}
	out, err := op.CallFrame(f, nargs, names)
	if err != nil {
		return value{}, err
	}
	return wrap(out), nil
}

func wrap(v aten.Value) value {
	if v.Kind == graph.ArgRef {
		return value{tensor: v.T}
	}
	return value{other: &v}
}

// push encodes an argument for the dispatcher.
func (r *Run) push(a *graph.Arg) error {
	f := &r.frame
	switch a.Kind {
	case graph.ArgRef:
		v, err := r.machine.Value(a.Ref)
		if err != nil {
			return err
		}
		if v.other == nil {
			f.Tensor(v.tensor)
			return nil
		}
		return f.Value(*v.other)
	case graph.ArgList, graph.ArgTuple:
		if a.Kind == graph.ArgList {
			f.List(len(a.L))
		} else {
			f.Tuple(len(a.L))
		}
		for i := range a.L {
			if err := r.push(&a.L[i]); err != nil {
				return err
			}
		}
		return nil
	case graph.ArgSlice, graph.ArgDict:
		return fault.New(fault.Op, "an operator takes no slice or dictionary")
	default:
		return f.Value(literal(a))
	}
}

// literal is an argument that names no value.
func literal(a *graph.Arg) aten.Value {
	return aten.Value{Kind: a.Kind, I: a.I, F: a.F, G: a.G, S: a.S}
}

// value builds an argument as a tree. Its tensors stay the machine's.
func (r *Run) value(a *graph.Arg) (aten.Value, error) {
	if a.Kind == graph.ArgRef {
		v, err := r.machine.Value(a.Ref)
		if err != nil {
			return aten.Value{}, err
		}
		if v.other != nil {
			return *v.other, nil
		}
		return aten.TensorValue(v.tensor), nil
	}
	out := literal(a)
	for i := range a.L {
		item, err := r.value(&a.L[i])
		if err != nil {
			return aten.Value{}, err
		}
		out.L = append(out.L, item)
	}
	out.Keys = a.Keys
	return out, nil
}

// tensor is an argument that must be a tensor. It stays the machine's.
func (r *Run) tensor(a *graph.Arg) (aten.Tensor, error) {
	if a.Kind == graph.ArgRef {
		v, err := r.machine.Value(a.Ref)
		if err != nil {
			return aten.Tensor{}, err
		}
		if v.other == nil {
			return v.tensor, nil
		}
	}
	return aten.Tensor{}, fault.New(fault.Op, "a tensor is needed here")
}

// isNone reports whether an argument is None: a tensor that a hosted module does not give this time.
func (r *Run) isNone(a *graph.Arg) bool {
	if a.Kind != graph.ArgRef {
		return false
	}
	v, err := r.machine.Value(a.Ref)
	return err == nil && v.other != nil && v.other.Kind == graph.ArgNone
}

// item takes one element out of a container that an operator returned.
func (r *Run) item(in *plan.Instr) (value, error) {
	of, err := r.value(&in.Args[0])
	if err != nil {
		return value{}, err
	}
	if of.Kind == graph.ArgRef {
		t, err := aten.IndexGet(of.T, literal(&in.Args[1]))
		return value{tensor: t}, err
	}
	i := in.Args[1].I
	if i < 0 {
		i += int64(len(of.L))
	}
	if in.Args[1].Kind != graph.ArgInt || i < 0 || i >= int64(len(of.L)) {
		return value{}, fault.New(fault.Op, "element %d is not among the %d results", in.Args[1].I, len(of.L))
	}
	element, err := of.L[i].Share()
	if err != nil {
		return value{}, err
	}
	return wrap(element), nil
}

// part is the window of a tensor, a chain of views; free what it gives.
func part(t aten.Tensor, w *plan.Window) (aten.Tensor, error) {
	out, err := t.Share()
	if err != nil {
		return out, err
	}
	narrow := func(axis int, start, length int64) {
		if err != nil {
			return
		}
		var next aten.Tensor
		next, err = aten.Narrow(out, axis, start, length)
		out.Free()
		out = next
	}
	if w.BatchAxis >= 0 {
		narrow(w.BatchAxis, w.Row, w.Rows)
	}
	for _, axis := range w.SeqAxes {
		narrow(axis, w.Tok, w.Toks)
	}
	return out, err
}

// copyOf copies a tensor or the part of it that one invoke sees.
func (r *Run) copyOf(t aten.Tensor, in *plan.Instr) (value, error) {
	if in.Op == plan.OpSpread {
		sizes := t.Shape()
		if len(sizes) == 0 {
			return value{}, fault.New(fault.Op, "a value of sizes [] cannot be cut into the rows of a batch")
		}
		sizes[0] = in.Window.Batch
		wide, err := aten.Expand(t, sizes)
		if err != nil {
			return value{}, err
		}
		defer wide.Free()
		out, err := aten.CloneContiguous(wide)
		return value{tensor: out}, err
	}
	if in.Op == plan.OpClone {
		out, err := aten.Clone(t)
		return value{tensor: out}, err
	}
	view, err := part(t, &in.Window)
	if err != nil {
		return value{}, err
	}
	defer view.Free()
	out, err := aten.Clone(view)
	return value{tensor: out}, err
}

// misfit is the error of a replacement whose sizes the batch has no room for.
type misfit struct {
	error
	invoke int
}

// put writes an invoke's value into its part of a batch.
func (r *Run) put(in *plan.Instr) error {
	base, err := r.tensor(&in.Args[0])
	if err != nil {
		return err
	}
	v, err := r.tensor(&in.Args[1])
	if err != nil {
		return err
	}
	view, err := part(base, &in.Window)
	if err != nil {
		return err
	}
	defer view.Free()
	if in.Want != nil {
		if err := r.misfit(in, v, view.DType()); err != nil {
			return err
		}
	}
	return aten.CopyInto(view, v)
}

// misfit is the error of a replacement that has not the sizes that the instruction wants, or that dtype.
func (r *Run) misfit(in *plan.Instr, v aten.Tensor, dtype string) error {
	if slices.Equal(v.Shape(), in.Want) && v.DType() == dtype {
		return nil
	}
	e := fault.New(fault.Op, "a value of %s %v cannot take the place of one of %s %v", v.DType(), v.Shape(), dtype, in.Want).
		WithHint("In a trace with an invoke that sees the whole batch, a replacement keeps the sizes and the dtype of what it replaces.")
	return &misfit{e, r.graph.Edited(int(r.graph.Nodes[in.Node].Invoke))}
}

// errOdd is the error of a replacement of other sizes, where the schedule relies on them.
var errOdd = fault.New(fault.Internal, "a replacement has other sizes than it is planned for")

// expect notes a replacement whose sizes are not those the model computed.
func (r *Run) expect(in *plan.Instr) error {
	t, err := r.tensor(&in.Args[0])
	if err != nil {
		return err
	}
	got := t.Shape()
	same := len(got) == len(in.Want)
	for i := 0; same && i < len(got); i++ {
		same = got[i] == in.Want[i]
	}
	if !same && in.Strict {
		return errOdd
	}
	if !same {
		r.odd = append(r.odd, oddWrite{node: in.Node, path: in.Path, want: in.Want, got: got})
	}
	return nil
}

// guard refuses a change through a view of an activation that the model has already used.
func (r *Run) guard(in *plan.Instr) error {
	t, err := r.tensor(&in.Args[0])
	if err != nil {
		return err
	}
	for i := range in.Args[1:] {
		past, err := r.tensor(&in.Args[1+i])
		if err != nil {
			return err
		}
		if t.StorageID() != past.StorageID() {
			continue
		}
		e := fault.New(fault.OutOfOrder, "this line changes an activation in place after the model has moved past it, "+
			"so nothing would feel the change")
		if by := in.Others[i]; by != graph.NoID {
			e.Other = r.graph.PosOf(&r.graph.Nodes[by])
		}
		return e.WithHint("Move it up, before the line that uses a later module, or change a copy (.clone()).")
	}
	return nil
}
