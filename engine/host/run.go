package host

import (
	"fmt"
	"runtime"
	"strings"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/exec"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/pack"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Run is one trace on its way through a model. It belongs to one goroutine at a time, and each
// Step runs on the calling OS thread with that thread's torch state, which it puts back.
type Run struct {
	model    *Native
	graph    *graph.Graph
	models   plan.Models // of the forward pass
	cache    *Cache      // of the generation that the run is a step of, or nil
	explicit bool        // they compute attention step by step
	plan     *plan.Plan
	schedule *plan.Schedule // the last that it was given
	machine  *exec.Machine[value]
	consts   []aten.Tensor
	frame    aten.Frame
	dead     []value
	odd      []oddWrite   // replacements whose sizes differ from what the model computed
	apart    map[int]bool // invokes that have a forward pass of their own
	from     int          // nodes before it were there at the last Extend
	end      bool         // its program is complete
	begun    bool         // its first instruction has been looked at
	unpacked bool         // tokens are not packed
	freed    bool
	taken    bool // its results have been handed over

	spent     float64                     // multiplications so far
	judge     Judge                       // decides whether it may begin
	known     *planned                    // what is known of its schedule from before
	priced    *priced                     // what it takes, where that was asked for
	weights   map[plan.Slot]*packed       // those that may be packed
	protects  bool                        // the weights stay as they are
	weightOf  map[uintptr]string          // then: which weight a storage is of
	helpers   map[*plan.Instr]aten.Tensor // while it is captured: what instructions bring from the CPU
	gradients gradients
	visit     visit       // of a hosted model
	random    aten.Tensor // the state of the generator that dropout draws from, before the run
}

// value is what a slot holds: nearly always a tensor.
type value struct {
	tensor aten.Tensor
	other  *aten.Value
}

func (v value) free() {
	if v.other != nil {
		v.other.Free()
		return
	}
	v.tensor.Free()
}

// oddWrite is a replacement of other sizes: legal, but the first suspect when an op fails later.
type oddWrite struct {
	node      graph.ID
	path      string
	want, got []int64
}

// Extend adds to a run that is done what its program says next, and readies it for Step. grow appends
// to the graph; consts are the constants that are new. With end the program is complete. The run takes
// over consts. Where Extend fails the run has ended, and freed what it held.
func (r *Run) Extend(grow func(*graph.Graph) error, consts []aten.Tensor, end bool) (err error) {
	ended := fault.New(fault.Handle, "this run has ended")
	if r.freed {
		aten.FreeAll(consts)
		return ended
	}
	r.consts = append(r.consts, consts...)
	ok := false
	defer func() {
		if !ok { // an error, or a panic
			r.Free()
		}
	}()
	switch {
	case r.end:
		return ended
	case r.machine != nil && !r.machine.Done():
		return fault.New(fault.Handle, "this run is not done yet").WithHint("Step it until it is.")
	}
	m, invokes := r.model, len(r.graph.Invokes)
	r.from, r.end, r.taken = len(r.graph.Nodes), end, false
	if err := grow(r.graph); err != nil {
		return err
	}
	if r.cache != nil && r.machine != nil && len(r.graph.Invokes) != invokes {
		return fault.New(fault.Graph, "a step of generation has one invoke, which its rows are")
	}
	if r.cache != nil && end {
		r.askForLogits()
	}
	again, err := r.choose()
	if err != nil {
		return err
	}
	if err := graph.VerifyMore(r.graph, r.models.Causal, len(r.consts), invokes, r.from); err != nil {
		return r.fusedOnly(err)
	}
	if err := m.checkInputs(r.graph, invokes); err != nil {
		return err
	}
	if !again {
		var schedule *plan.Schedule
		schedule, err = r.plan.Extend(r.graph, end)
		if err == nil {
			schedule, _ = r.shared(schedule)
			err = r.ready(schedule)
		}
		again = err == plan.ErrRestart
	}
	if again {
		err = r.replan(r.fresh())
	}
	ok = err == nil
	return err
}

// askForLogits ends the program of a step of generation with what the next token is drawn from.
func (r *Run) askForLogits() {
	g, own := r.graph, int32(len(r.graph.Invokes)-1) // edits come before it
	read := graph.ID(len(g.Nodes))
	g.Nodes = append(g.Nodes,
		graph.Node{Kind: graph.KindRead, Port: graph.PortOutput, Leaf: "logits", Invoke: own, Pos: -1},
		graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(read)}, Invoke: own, Pos: -1})
}

// fresh is a plan that knows which invokes go alone.
func (r *Run) fresh() *plan.Plan {
	p := plan.New(r.models)
	for invoke := range r.apart {
		p.Apart(r.graph, invoke)
	}
	return p
}

// choose takes the graphs in which attention is computed step by step once the program names one of
// those steps, or asks for second derivatives, and reports whether the run must then begin anew.
func (r *Run) choose() (again bool, err error) {
	if r.explicit {
		return false, nil
	}
	second, asks := false, graph.NoID
	for n := r.from; n < len(r.graph.Nodes) && !r.explicit; n++ {
		node := &r.graph.Nodes[n]
		r.explicit = (node.Kind == graph.KindRead || node.Kind == graph.KindWrite) && r.models.Causal.Hides(node.Path)
		if r.explicit {
			asks = graph.ID(n)
		}
		// the fused attention has first derivatives alone
		second = second || node.Kind == graph.KindBackward && len(node.Args) > 3 && node.Args[3].I != 0
	}
	r.explicit = r.explicit || second
	if !r.explicit {
		return false, nil
	}
	if r.cache != nil && second {
		return false, fault.New(fault.Gradient, "a step of a generation has no second derivatives").
			WithHint("Use a trace of the whole text for create_graph=True.")
	}
	if r.cache != nil {
		e := fault.New(fault.ModulePath, "the scores and the pattern of attention are not computed during generation").
			WithHint("Use heads.q, heads.k, heads.v and heads.z, or a trace of the whole text.")
		r.at(e, asks)
		return false, e
	}
	r.models, err = r.model.variants(true)
	return true, err
}

// fusedOnly explains the absence of what only the fused attention has.
func (r *Run) fusedOnly(err error) error {
	e := fault.As(err)
	if _, ok := r.model.graphs.Causal.Point(e.Path, graph.PortOutput); ok && r.explicit && e.Code == fault.ModulePath {
		e.Message = fmt.Sprintf("%s is not computed in this trace: another line of it looks at the scores or the pattern "+
			"of attention, which is then done step by step", e.Path)
		e.Hint = "Use heads.z, which is the same value, or a second trace."
	}
	return e
}

// split plans the run anew with an invoke in a forward pass of its own, and reports whether that was
// possible; else it gives the error that stands.
func (r *Run) split(odd *misfit) (bool, error) {
	p := r.fresh()
	if !p.Apart(r.graph, odd.invoke) {
		return false, odd.error
	}
	if r.apart == nil {
		r.apart = map[int]bool{}
	}
	r.apart[odd.invoke] = true
	return true, r.replan(p)
}

// replan begins the run anew.
func (r *Run) replan(p *plan.Plan) error {
	if r.machine != nil {
		release(r.machine.Abort(nil))
	}
	if r.model.hosted { // whose forward pass is under way
		return fault.New(fault.OutOfOrder, "a line needs a value of a module that the model has left behind").
			WithHint("Read it before the line that needed a value, or in a second trace.")
	}
	r.machine, r.odd, r.plan = nil, nil, p
	r.gradients.reset()
	schedule, err := p.Extend(r.graph, r.end)
	if err != nil {
		return err
	}
	schedule, _ = r.shared(schedule)
	return r.ready(schedule)
}

// shared is a schedule in which tokens are not computed more often than they need to be, and what comes of that.
func (r *Run) shared(schedule *plan.Schedule) (*plan.Schedule, []pack.Report) {
	if r.unpacked || r.cache != nil || r.model.apart.Load() { // what a step of a generation computes depends on more than its tokens
		return schedule, nil
	}
	return pack.Tokens(schedule)
}

// ready lets the machine go on with a schedule.
func (r *Run) ready(schedule *plan.Schedule) error {
	r.schedule = schedule
	if err := checkSizes(schedule); err != nil {
		return err
	}
	if err := r.model.Load(); err != nil {
		return err
	}
	if err := r.judged(schedule); err != nil {
		return err
	}
	if r.protects {
		r.weightOf = r.model.storages()
	}
	if err := r.keepRandom(); err != nil {
		return err
	}
	if r.machine == nil {
		r.machine, r.weights = exec.New[value](schedule), map[plan.Slot]*packed{}
	} else {
		release(r.machine.Extend(schedule, nil))
	}
	return r.bind(schedule)
}

// keepRandom notes the state of the generator before the model draws from it. A run that begins anew puts
// it back, so that the same elements are dropped.
func (r *Run) keepRandom() (err error) {
	switch {
	case !r.models.Training:
	case r.random.IsZero():
		r.random, err = aten.RandomState(r.model.device)
	case r.machine == nil:
		err = aten.SetRandomState(r.model.device, r.random)
	}
	return err
}

// bind gives a schedule's sources their values.
func (r *Run) bind(s *plan.Schedule) error {
	defer plainMode()()
	for _, src := range s.Sources {
		var v value
		var err error
		switch {
		case src.Kind == graph.KindParam:
			v.tensor, err = r.model.param(src.Name)
			if w := r.model.shelf.weights[src.Name]; w != nil {
				r.weights[src.Slot] = w
			}
		case src.Kind == graph.KindConst:
			v.tensor = r.consts[src.Index]
		case r.cache != nil:
			v, err = r.cache.input(src.Name)
		default:
			v.tensor, err = r.model.input(&s.Forwards[src.Forward], src.Name)
		}
		if err != nil {
			return err
		}
		r.machine.Bind(src.Slot, v)
	}
	return nil
}

// outlived ends a run whose generation has ended, with an error.
func (r *Run) outlived() error {
	if r.freed || r.cache == nil || !r.cache.ended() {
		return nil
	}
	r.Free()
	return fault.New(fault.Handle, "the generation of this run has ended")
}

// Step works for about budget and reports whether the run is done; 0 means to the end. A run that
// failed, or panicked, has freed what it held.
func (r *Run) Step(budget time.Duration) (done bool, err error) {
	if err := r.outlived(); err != nil {
		return false, err
	}
	if r.freed {
		return false, fault.New(fault.Handle, "this run has ended")
	}
	runtime.LockOSThread() // whose torch state the instructions set
	defer runtime.UnlockOSThread()
	mode := aten.CurrentMode()
	state := modeGuard{outer: mode, now: mode}
	defer state.restore()
	ok := false
	defer func() {
		if !ok {
			r.Free()
		}
	}()
	deadline := time.Now().Add(budget)
	if !r.begun {
		r.begun = true
		if done, err := r.again(&state); done || err != nil {
			ok = err == nil
			return done, err
		}
	}
	for in := r.machine.Next(); in != nil; in = r.machine.Next() {
		if in.Op == plan.OpFetch && !r.visit.fed {
			r.visit.wanted = in
			ok = true
			return false, nil
		}
		state.set(in.Mode)
		out, err := r.perform(in)
		if odd, ok := err.(*misfit); ok {
			var again bool
			if again, err = r.split(odd); again {
				continue
			}
		}
		if err == errOdd {
			r.unpacked = true
			if err = r.replan(r.fresh()); err == nil {
				continue
			}
		}
		if err != nil {
			return false, r.explain(in, err)
		}
		r.dead = r.machine.Feed(out, r.dead[:0])
		release(r.dead)
		if budget > 0 && time.Now().After(deadline) {
			break
		}
	}
	ok = true
	return r.machine.Done(), nil
}

func release(dead []value) {
	for _, v := range dead {
		v.free()
	}
}

// Results hands over the values of the Save nodes that the last Extend brought: a tree for each and the
// tensors the trees number, which are now the caller's. A tensor saved twice is there once. A second
// call gives nothing; a run that is not done has no results. One whose program is complete ends here.
func (r *Run) Results() ([]graph.Result, []aten.Tensor, error) {
	if err := r.outlived(); err != nil {
		return nil, nil, err
	}
	switch {
	case r.taken:
		return nil, nil, nil
	case r.freed:
		return nil, nil, fault.New(fault.Handle, "this run failed or was freed, so it has no results")
	case !r.machine.Done():
		return nil, nil, fault.New(fault.Handle, "this run is not done yet").WithHint("Step it until it is.")
	}
	r.taken = true
	var tensors []aten.Tensor
	numbers := map[graph.ID]graph.Arg{}
	var failed error
	hand := func(slot graph.ID) graph.Arg {
		if a, ok := numbers[slot]; ok {
			return a
		}
		v, err := r.machine.Value(slot)
		if err != nil {
			failed = err
			return graph.Null()
		}
		if v.other != nil {
			numbers[slot] = r.handTree(v.other, &tensors, &failed)
			return numbers[slot]
		}
		t, err := r.handed(v.tensor)
		if err != nil {
			failed = err
			return graph.Null()
		}
		tensors = append(tensors, t)
		numbers[slot] = graph.Ref(graph.ID(len(tensors) - 1))
		return numbers[slot]
	}
	var out []graph.Result
	for _, saved := range r.machine.Results() {
		if int(saved.Node) < r.from { // handed over before the run was planned anew
			continue
		}
		out = append(out, graph.Result{Node: saved.Node, Value: saved.Value.Replaced(hand)})
	}
	if r.cache != nil && r.end && failed == nil {
		logits := out[len(out)-1].Value // a tensor that the user saved too is there once
		var kept aten.Tensor
		if kept, failed = tensors[logits.Ref].Share(); failed == nil {
			r.cache.keep(kept)
		}
		if out = out[:len(out)-1]; int(logits.Ref) == len(tensors)-1 && !names(out, logits.Ref) {
			tensors[logits.Ref].Free()
			tensors = tensors[:logits.Ref]
		}
	}
	if r.end {
		r.Free()
	}
	if failed != nil {
		aten.FreeAll(tensors)
		return nil, nil, failed
	}
	return out, tensors, nil
}

// handed is a tensor as it leaves the run.
func (r *Run) handed(t aten.Tensor) (aten.Tensor, error) {
	if r.gradients.followed && t.RequiresGrad() && !r.model.hosted && !r.history() {
		return aten.Detach(t)
	}
	return t.Share()
}

// names reports whether results name a tensor.
func names(results []graph.Result, tensor graph.ID) (found bool) {
	for i := range results {
		results[i].Value.Refs(func(id graph.ID) { found = found || id == tensor })
	}
	return found
}

func (r *Run) handTree(v *aten.Value, tensors *[]aten.Tensor, failed *error) graph.Arg {
	if v.Kind == graph.ArgRef {
		t, err := r.handed(v.T)
		if err != nil {
			*failed = err
			return graph.Null()
		}
		*tensors = append(*tensors, t)
		return graph.Ref(graph.ID(len(*tensors) - 1))
	}
	a := graph.Arg{Kind: v.Kind, I: v.I, F: v.F, G: v.G, S: v.S, Keys: v.Keys}
	for i := range v.L {
		a.L = append(a.L, r.handTree(&v.L[i], tensors, failed))
	}
	return a
}

// Free ends the run, finished or not, and frees everything it holds. It may be called twice.
func (r *Run) Free() {
	if r.freed {
		return
	}
	r.freed = true
	if r.machine != nil {
		release(r.machine.Abort(nil))
	}
	aten.FreeAll(r.consts)
	r.consts = nil
	r.gradients.reset()
	r.visit.free()
	r.random.Free()
	r.random = aten.Tensor{}
	if r.cache != nil {
		if r.gradients.followed {
			r.cache.detach()
		}
		r.cache.leave(r)
	}
	r.model.done()
}

// explain adds to a failure where it happened and in whose line.
func (r *Run) explain(in *plan.Instr, err error) error {
	e := fault.As(err)
	if e.Path == "" {
		e.Path = in.Path
	}
	node := in.Node
	if node == graph.NoID && len(r.odd) > 0 {
		last := r.odd[len(r.odd)-1]
		node = last.node
		e.Message += fmt.Sprintf("\nBefore that, this line replaced a value of %s, which had sizes %v, by one of sizes %v",
			last.path, last.want, last.got)
	}
	if node != graph.NoID && e.Pos.IsZero() {
		n := &r.graph.Nodes[node]
		e.Node, e.Invoke, e.Step = int(node), int(n.Invoke), int(n.Step)
		e.Pos = r.graph.PosOf(n)
	}
	if e.Code == fault.Op && e.Hint == "" {
		if args := r.describeArgs(in); args != "" {
			e.Hint = "Given: " + args + "."
		}
	}
	return e
}

// describeArgs tells dtype and sizes of an instruction's tensors.
func (r *Run) describeArgs(in *plan.Instr) string {
	var parts []string
	if r.machine == nil { // the failure is one of planning anew
		return ""
	}
	tell := func(slot graph.ID) {
		if v, err := r.machine.Value(slot); err == nil && v.other == nil {
			parts = append(parts, fmt.Sprintf("%s %v", v.tensor.DType(), v.tensor.Shape()))
		}
	}
	for i := range in.Args {
		in.Args[i].Refs(tell)
	}
	for i := range in.Kwargs {
		in.Kwargs[i].Arg.Refs(tell)
	}
	return strings.Join(parts, ", ")
}

// modeGuard switches the thread's autograd state as instructions ask and puts it back.
type modeGuard struct {
	outer, now graph.Mode
	leave      func()
}

func (g *modeGuard) set(m graph.Mode) {
	if m == g.now {
		return
	}
	if (m^g.now)&graph.ModeInference != 0 {
		if g.leave != nil {
			g.leave()
			g.leave = nil
		}
		if (m^g.outer)&graph.ModeInference != 0 {
			g.leave = aten.InferenceMode(m&graph.ModeInference != 0)
		}
	}
	aten.SetGradEnabled(m&graph.ModeGrad != 0)
	g.now = m
}

func (g *modeGuard) restore() {
	if g.leave != nil {
		g.leave()
	}
	aten.SetGradEnabled(g.outer&graph.ModeGrad != 0)
}
