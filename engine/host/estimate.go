package host

import (
	"cmp"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/exec"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// An estimate goes through the schedule of a run with sizes in the place of tensors. What the model computes has the sizes
// that stand in the schedule; of the user's lines torch says what comes of them, given tensors of the meta device, which
// have sizes and no memory. So nothing that a request asks for is made. Where a size depends on what values are, or torch
// cannot say it without them, the result is unknown, and so is what lines make of it; what the model makes of it is taken
// to have the sizes that it has in the model. The guards of a run (work.go, the cap on memory) stand behind that.

const meta = "meta"

// shadow is a schedule under estimation.
type shadow struct {
	run     *Run // whose machine holds tensors without memory, or promised where there are none yet
	cost    *Cost
	dims    func(forward int) measures
	known   []known           // by slot: what is promised there
	lent    []value           // parameters, constants and caches that were made
	live    map[uintptr]*held // storages of those that were made, by identity
	bytes   int64             // of the run's own
	odd     bool              // a line has replaced something by a value of other sizes: the model's are no longer sure
	follows float64           // work since the first value that autograd follows; less than 0 where there is none
}

// known is a tensor that need not be made.
type known struct {
	shape []int64
	dtype string
	held  *held
}

// held is a storage, and how many values lie in it.
type held struct {
	bytes  int64
	values int
	lent   bool
}

// promised stands in the machine for what is known and not made; unknown for what nothing is known of.
var (
	promised = value{other: &aten.Value{Kind: graph.ArgEllipsis}}
	unknown  = value{other: &aten.Value{Kind: graph.ArgNone}}
)

// measures are what symbolic sizes are.
type measures struct{ batch, seq, total, room int64 }

func (z measures) of(shape graph.Shape) []int64 {
	out := make([]int64, len(shape))
	for i, d := range shape {
		switch d {
		case graph.DimBatch:
			out[i] = z.batch
		case graph.DimSeq:
			out[i] = z.seq
		case graph.DimTotal:
			out[i] = z.total
		case graph.DimRoom:
			out[i] = z.room
		default:
			out[i] = int64(d)
		}
	}
	return out
}

// estimate is what a schedule of this run is going to take. The weights are loaded.
func (r *Run) estimate(s *plan.Schedule) (*Cost, error) {
	defer plainMode()()
	aten.SetGradEnabled(false)
	x := r.shadow(s)
	defer func() {
		release(x.run.machine.Abort(nil))
		release(x.lent)
	}()
	if err := x.bind(s, r); err != nil {
		return nil, err
	}
	var dead []value
	for in := x.run.machine.Next(); in != nil; in = x.run.machine.Next() {
		out := x.perform(in)
		x.gain(in, out)
		dead = x.run.machine.Feed(out, dead[:0])
		x.lose(in, dead)
	}
	x.save(s)
	return x.cost, nil
}

func (r *Run) shadow(s *plan.Schedule) *shadow {
	x := &shadow{known: make([]known, s.Slots), live: map[uintptr]*held{}, follows: -1,
		run:  &Run{model: r.model, graph: r.graph, cache: r.cache, machine: exec.New[value](s)},
		cost: &Cost{Lines: make([]float64, len(r.graph.Invokes)), Exact: true}}
	x.cost.graph = &graph.Graph{Nodes: r.graph.Nodes, Positions: r.graph.Positions}
	x.dims = func(forward int) measures {
		if c := r.cache; c != nil {
			return measures{int64(len(c.rows)), c.seq, c.past + c.seq, c.room}
		}
		return measures{batch: s.Forwards[forward].Batch(), seq: s.Forwards[forward].Seq}
	}
	return x
}

// bind promises the sources.
func (x *shadow) bind(s *plan.Schedule, r *Run) error {
	for i := range s.Sources {
		src := &s.Sources[i]
		dtype, shape := "int64", []int64(nil)
		switch {
		case src.Kind == graph.KindParam:
			dtype, shape = r.model.dtypeOf(src.Name), measures{}.of(src.Shape)
		case src.Kind == graph.KindConst:
			t := r.consts[src.Index]
			dtype, shape = t.DType(), t.Shape()
		case src.Shape == nil && r.cache != nil: // a number of a step
			v, err := r.cache.input(src.Name)
			if err != nil {
				return err
			}
			x.run.machine.Bind(src.Slot, v)
			continue
		default:
			shape = x.dims(src.Forward).of(src.Shape)
			if strings.HasSuffix(src.Name, "mask") {
				dtype = "bool"
			} else if strings.HasPrefix(src.Name, plan.CachePrefix) {
				dtype = r.model.dtype
			}
		}
		x.promise(src.Slot, shape, dtype, nil)
		if s.Borrowed[src.Slot] {
			h := x.known[src.Slot].held
			x.bytes -= h.bytes
			h.bytes, h.lent = 0, true
		}
		x.run.machine.Bind(src.Slot, promised)
	}
	x.cost.Peak = x.bytes
	return nil
}

// dtypeOf is the dtype of a parameter.
func (m *Native) dtypeOf(parameter string) string {
	m.typing.Do(func() {
		m.types = make(map[string]string, len(m.graphs.Params))
		for _, p := range m.graphs.Params {
			m.types[p.Name] = cmp.Or(p.DType, m.dtype)
		}
	})
	return m.types[parameter]
}

// promise notes a tensor that need not be made, in a storage of its own or in another's.
func (x *shadow) promise(slot plan.Slot, shape []int64, dtype string, in *held) {
	if in == nil {
		in = &held{bytes: int64(count(shape)) * itemBytes(dtype)}
		x.bytes += in.bytes
	}
	in.values++
	x.known[slot] = known{shape, dtype, in}
}

// itemBytes is what one element takes.
func itemBytes(dtype string) int64 {
	switch dtype {
	case "float64", "int64", "uint64", "complex64":
		return 8
	case "float16", "bfloat16", "int16", "uint16":
		return 2
	case "bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2":
		return 1
	case "complex128":
		return 16
	}
	return 4
}

// sizesAt is the shape, and dtype, of what a slot holds; ok is false where nothing is known of it.
func (x *shadow) sizesAt(slot plan.Slot) (shape []int64, dtype string, ok bool) {
	if k := &x.known[slot]; k.held != nil {
		return k.shape, k.dtype, k.dtype != ""
	}
	v, err := x.run.machine.Value(slot)
	if err != nil || v.other != nil {
		return nil, "", false
	}
	return v.tensor.Shape(), v.tensor.DType(), true
}

// make has the tensors that an instruction names made, for torch to say what comes of them.
func (x *shadow) make(in *plan.Instr) (err error) {
	in.Refs(func(slot plan.Slot) {
		k := x.known[slot]
		if k.held == nil || err != nil {
			return
		}
		if k.dtype == "" {
			err = errUnknown
			return
		}
		var t aten.Tensor
		if t, err = aten.Zeros(k.dtype, meta, k.shape...); err != nil {
			return
		}
		x.known[slot] = known{}
		x.live[t.StorageID()] = k.held
		if k.held.lent {
			x.lent = append(x.lent, value{tensor: t})
		}
		x.run.machine.Bind(slot, value{tensor: t})
	})
	return err
}

// perform gives what an instruction would: sizes without numbers.
func (x *shadow) perform(in *plan.Instr) value {
	var out value
	var err error
	switch in.Op {
	case plan.OpGuard, plan.OpSetGrad, plan.OpFetch, plan.OpGive, plan.OpPut, plan.OpSetIndex:
		return value{}
	case plan.OpExpect:
		if shape, _, ok := x.sizesAt(in.Args[0].Ref); ok && !slices.Equal(shape, in.Want) {
			x.odd = true
		}
		return value{}
	case plan.OpTrack:
		if x.follows < 0 {
			x.follows = x.cost.Work
		}
		return value{}
	case plan.OpBackward:
		out, err = x.backward(in)
	default:
		if x.sure(in) {
			return promised
		}
		out, err = x.asked(in)
	}
	if err == nil {
		return out
	}
	if in.Main && in.Shape != nil {
		x.promise(in.Out, x.dims(in.Of).of(in.Shape), x.dtypeOf(in), nil)
		return promised
	}
	x.cost.Exact = false
	if in.Out == plan.NoSlot {
		return value{}
	}
	return unknown
}

func (x *shadow) dtypeOf(in *plan.Instr) string { return cmp.Or(in.DType, x.run.model.dtype) }

// asked is what torch says of an instruction.
func (x *shadow) asked(in *plan.Instr) (value, error) {
	if in.Op != plan.OpCall {
		if err := x.make(in); err != nil {
			return value{}, err
		}
		return x.run.perform(in)
	}
	args, err := x.given(in)
	if err != nil {
		return value{}, err
	}
	x.count(in, args)
	base, _, _ := strings.Cut(in.Name, ".")
	if rule := ruled[base]; rule != nil {
		if shape := rule(in, args.sizes); shape != nil && args.dtype(base) != "" {
			x.promise(in.Out, shape, args.dtype(base), nil)
			return promised, nil
		}
	}
	if err := x.make(in); err != nil {
		return value{}, err
	}
	if err := x.run.fewParts(in, base); err != nil { // a view takes as much as any, without memory of its own
		return value{}, err
	}
	out, err := x.run.call(without(in, len(args.sizes) == 0))
	if err != nil {
		return value{}, err
	}
	return weightless(out)
}

// weightless is a value whose tensors have no memory: an operator may have made some that have.
func weightless(v value) (_ value, err error) {
	light := func(t *aten.Tensor) {
		if err != nil || t.IsZero() || t.Device() == meta {
			return
		}
		var own aten.Tensor
		if own, err = aten.Zeros(t.DType(), meta, t.Shape()...); err == nil {
			t.Free()
			*t = own
		}
	}
	var look func(v *aten.Value)
	look = func(v *aten.Value) {
		if v.Kind == graph.ArgRef {
			light(&v.T)
		}
		for i := range v.L {
			look(&v.L[i])
		}
	}
	if v.other == nil {
		light(&v.tensor)
	} else {
		look(v.other)
	}
	if err != nil {
		v.free()
		return value{}, err
	}
	return v, nil
}

// count adds what an operator takes.
func (x *shadow) count(in *plan.Instr, args arguments) {
	base, _, _ := strings.Cut(in.Name, ".")
	estimate := works[base]
	if estimate == nil {
		return
	}
	needs := estimate(args.sizes, args.text)
	x.cost.Work += needs
	if in.Node != graph.NoID && !in.Main {
		x.cost.hardest.more(in.Node, needs)
		x.cost.Lines[x.run.graph.Nodes[in.Node].Invoke] += needs
	}
}

// without is a call that makes nothing elsewhere than where tensors have no memory.
func without(in *plan.Instr, makes bool) *plan.Instr {
	nowhere := graph.Arg{Kind: graph.ArgDevice, S: meta}
	moved := func(a graph.Arg) bool { return a.Kind == graph.ArgDevice }
	here := slices.ContainsFunc(in.Kwargs, func(k graph.Kwarg) bool { return moved(k.Arg) || k.Name == "device" })
	if !makes && !here && !slices.ContainsFunc(in.Args, moved) {
		return in
	}
	own := *in
	own.Args, own.Kwargs = slices.Clone(in.Args), slices.Clone(in.Kwargs)
	for i := range own.Args {
		if moved(own.Args[i]) {
			own.Args[i] = nowhere
		}
	}
	for i := range own.Kwargs {
		if own.Kwargs[i].Name == "device" || moved(own.Kwargs[i].Arg) {
			own.Kwargs[i].Arg = nowhere
		}
	}
	if makes && !here {
		own.Kwargs = append(own.Kwargs, graph.Kwarg{Name: "device", Arg: nowhere})
	}
	return &own
}
