package host

import (
	"container/list"
	"fmt"
	"strings"
	"sync"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/exec"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// On a GPU a small pass takes as long as its operations take to be asked for. A trace in a loop asks for the same each
// time, so what a run of a known schedule gives the device is captured (aten.Capture: a CUDA graph), and later runs copy
// their inputs to where that one had its own, have the device do it again, and copy the results. Whatever cannot be
// captured runs as it always did: nothing has been computed when that shows.

// captureAfter is how many runs of a schedule go before the one that is captured, after the one that planned it: what
// torch makes when an operation is first asked for is there then.
const captureAfter = 1

const captureTries = 3 // what fails so often cannot be captured; memory may just have been short

// capturing is held while one is made: there is one stream for it.
var capturing sync.Mutex

// capture is what there is of a schedule.
type capture struct {
	mu     sync.Mutex // held while it is made, and from the inputs of a replay to its results
	runs   int
	failed int // attempts
	made   *captured
	recent *list.Element // its place among those of the model
}

// captured is a pass that the device can do again.
type captured struct {
	pass    *aten.Capture
	mode    graph.Mode // that all of it ran under
	inputs  []fixed
	consts  []fixed
	device  string           // with its number
	text    string           // see likeness
	weights []aten.Tensor    // keep their memory
	places  aten.Places      // of the weights
	lent    map[uintptr]bool // storages of weights
	helpers []aten.Tensor    // what it was given beside them
	results []result
	copies  []copied
}

// fixed is a source where the pass looks for it.
type fixed struct {
	source *plan.Source
	tensor aten.Tensor
}

// result is a saved slot, with the tensors of the pass in it.
type result struct {
	slot  plan.Slot
	value value
}

// copied is one tensor among the results.
type copied struct {
	tensor aten.Tensor // the pass's
	with   int         // the first that shares memory with it; itself, if none before it does
	shared bool        // and some later one
	own    bool        // it is a weight's memory, and no copy is made
}

// captures are those of a model, the last used first.
type captures struct {
	mu     sync.Mutex
	most   int
	recent list.List // of *capture
}

// use notes that one is used now, and gives those that are too many.
func (c *captures) use(one *capture) (surplus []*capture) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if one.recent != nil {
		c.recent.MoveToFront(one.recent)
		return nil
	}
	one.recent = c.recent.PushFront(one)
	at := c.recent.Back()
	for n := c.recent.Len(); n > c.most && at.Value != one; n-- {
		victim, next := at.Value.(*capture), at.Prev()
		if victim.mu.TryLock() { // else it is in use
			c.recent.Remove(at)
			victim.recent = nil
			surplus = append(surplus, victim)
		}
		at = next
	}
	return surplus
}

// all takes out all of them. No run uses them any more.
func (c *captures) all() (out []*capture) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for at := c.recent.Front(); at != nil; at = c.recent.Front() {
		one := c.recent.Remove(at).(*capture)
		one.mu.Lock()
		one.recent = nil
		out = append(out, one)
	}
	return out
}

// drop frees captures that [captures.use] or [captures.all] has locked.
func drop(surplus []*capture) {
	for _, one := range surplus {
		one.made.free()
		one.made, one.runs = nil, 0
		one.mu.Unlock()
	}
}

func (c *captured) free() {
	if c.pass != nil {
		c.pass.Free()
	}
	for _, list := range [][]fixed{c.inputs, c.consts} {
		for _, f := range list {
			f.tensor.Free()
		}
	}
	aten.FreeAll(c.weights)
	aten.FreeAll(c.helpers)
	for _, r := range c.results {
		r.value.free()
	}
}

// again does a run that is about to begin by a capture, or captures it. It reports false, and has changed nothing, where
// it is to be done step by step.
func (r *Run) again(state *modeGuard) (done bool, err error) {
	if r.known == nil || r.model.captures.most == 0 || r.protects {
		return false, nil
	}
	one := &r.known.capture
	if !one.mu.TryLock() { // another thread's run is at it
		return false, nil
	}
	var surplus []*capture
	defer func() { drop(surplus) }()
	defer one.mu.Unlock()
	if one.runs++; one.runs <= captureAfter || one.failed == captureTries {
		return false, nil
	}
	if made := one.made; made != nil && !made.places.Unmoved() { // somebody gave the model other weights
		r.model.captures.forget(one)
		made.free()
		one.made, one.runs = nil, 0
		return false, nil
	}
	text, may := r.likeness()
	fresh := may && one.made == nil
	if fresh {
		if one.made, err = r.capture(text, state); err != nil {
			return false, err
		}
		if one.made == nil {
			one.runs, one.failed = 0, one.failed+1
			return false, nil
		}
	}
	if !may || one.made.text != text || !one.made.pass.Here() {
		return false, nil // where it is fresh, it is alike and here
	}
	surplus = r.model.captures.use(one)
	return true, r.replay(one.made, state)
}

// forget takes one out that its caller has locked.
func (c *captures) forget(one *capture) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if one.recent != nil {
		c.recent.Remove(one.recent)
		one.recent = nil
	}
}

// likeness says what a captured pass of the run depends on, but for the elements of constants that are copied to it. It
// reports false where nothing is to be captured or replayed.
func (r *Run) likeness() (string, bool) {
	settings, ok := aten.CaptureSettings(r.model.device)
	var b strings.Builder
	fmt.Fprint(&b, settings)
	owned := r.model.storages()
	for _, t := range r.consts {
		fmt.Fprint(&b, " ", t.DType(), t.Device(), t.Shape(), t.Strides())
		switch {
		case !t.IsPlain() || t.RequiresGrad():
			return "", false
		case owned[t.StorageID()] != "": // a part of a weight: a pass looks at it where it is
			fmt.Fprint(&b, t.DataPointer())
		case t.Device() == "cpu" && t.Numel() == 1: // a number is read when it is captured
			fmt.Fprintf(&b, "%x", unsafe.Slice((*byte)(t.DataPointer()), t.Bytes()))
		}
	}
	return b.String(), ok
}

// replay does the run with the memory of a captured pass.
func (r *Run) replay(c *captured, state *modeGuard) error {
	state.set(0)
	for _, f := range c.inputs {
		t, err := r.model.hostInput(&r.schedule.Forwards[f.source.Forward], f.source.Name)
		if err != nil {
			return err
		}
		err = aten.CopyInto(f.tensor, t)
		t.Free()
		if err != nil {
			return err
		}
	}
	for _, f := range c.consts {
		if err := aten.CopyInto(f.tensor, r.consts[f.source.Index]); err != nil {
			return err
		}
	}
	if err := c.pass.Replay(); err != nil {
		return err
	}
	state.set(c.mode)
	results, err := c.handed()
	if err != nil {
		return err
	}
	release(r.machine.Skip(results, nil))
	return nil
}

// handed gives the results of a pass in memory of their own. What shared memory shares it again.
func (c *captured) handed() (map[plan.Slot]value, error) {
	tensors := make([]aten.Tensor, len(c.copies))
	bases := map[int]aten.Tensor{}
	ok := false
	defer func() {
		for _, base := range bases {
			base.Free()
		}
		if !ok {
			aten.FreeAll(tensors)
		}
	}()
	for i := range c.copies {
		one, err := &c.copies[i], error(nil)
		switch {
		case one.own: // a tensor of its own, whose sizes may be changed in place
			tensors[i], err = aten.Detach(one.tensor)
		case one.with == i && !one.shared:
			tensors[i], err = aten.Clone(one.tensor)
		default:
			if _, there := bases[one.with]; !there {
				if bases[one.with], err = aten.CloneStorage(one.tensor); err != nil {
					return nil, err
				}
			}
			tensors[i], err = aten.ViewLike(bases[one.with], one.tensor)
		}
		if err != nil {
			return nil, err
		}
	}
	ok = true
	out, next := make(map[plan.Slot]value, len(c.results)), 0
	for _, r := range c.results {
		out[r.slot] = r.value.with(func(aten.Tensor) aten.Tensor {
			next++
			return tensors[next-1]
		})
	}
	return out, nil
}

// with is the same value with other tensors, which are the new value's.
func (v value) with(other func(aten.Tensor) aten.Tensor) value {
	if v.other == nil {
		return value{tensor: other(v.tensor)}
	}
	var tree func(v aten.Value) aten.Value
	tree = func(v aten.Value) aten.Value {
		if v.Kind == graph.ArgRef {
			v.T = other(v.T)
		}
		items := v.L
		v.L = make([]aten.Value, len(items))
		for i := range items {
			v.L[i] = tree(items[i])
		}
		return v
	}
	out := tree(*v.other)
	return value{other: &out}
}

// capture has the device note what the run gives it. It gives nothing where that cannot be; the run is then as it was.
func (r *Run) capture(text string, state *modeGuard) (*captured, error) {
	c := &captured{text: text, lent: map[uintptr]bool{}}
	ok := false
	defer func() {
		if !ok {
			c.free()
		}
	}()
	if !r.capturable() {
		return nil, nil
	}
	c.mode = r.schedule.Instrs[0].Mode
	state.set(graph.ModeGrad)
	err := r.fix(c)
	if err == nil {
		err = r.note(c, state)
	}
	if err == nil {
		err = r.keepResults(c)
	}
	r.helpers = nil
	if err == nil {
		ok = true
		for _, f := range c.consts {
			r.machine.Bind(f.source.Slot, value{tensor: r.consts[f.source.Index]})
		}
		return c, nil
	}
	// as it was: at the beginning, with its own inputs
	release(r.machine.Abort(nil))
	r.machine, r.odd = exec.New[value](r.schedule), nil
	r.weights = map[plan.Slot]*packed{}
	return nil, r.bind(r.schedule)
}

// capturable reports whether all of a schedule may be done again without being looked at.
func (r *Run) capturable() bool {
	if len(r.schedule.Instrs) == 0 || r.models.Training || r.cache != nil || !aten.CanCapture(r.model.device) {
		return false
	}
	for i := range r.schedule.Instrs {
		in := &r.schedule.Instrs[i]
		switch in.Op {
		case plan.OpTrack, plan.OpBackward, plan.OpSetGrad, plan.OpFetch, plan.OpGive:
			return false
		}
		if in.Mode != r.schedule.Instrs[0].Mode {
			return false
		}
	}
	return true
}

var errCapture = fault.New(fault.Internal, "this schedule cannot be captured")

// fix gives the run's sources, and what its instructions bring from the CPU, places that stay.
func (r *Run) fix(c *captured) error {
	owned := r.model.storages()
	for i := range r.schedule.Sources {
		if src := &r.schedule.Sources[i]; src.Kind != graph.KindConst { // the model's
			held, err := r.machine.Value(src.Slot)
			if err != nil {
				return err
			}
			c.device = held.tensor.Device()
			break
		}
	}
	for i := range r.schedule.Sources {
		src := &r.schedule.Sources[i]
		held, err := r.machine.Value(src.Slot)
		if err != nil {
			return err
		}
		switch src.Kind {
		case graph.KindParam:
			if held.tensor.RequiresGrad() {
				return errCapture
			}
			t, err := aten.Detach(held.tensor)
			if err != nil {
				return err
			}
			c.weights = append(c.weights, t)
			c.places.Add(held.tensor, t)
			c.lent[t.StorageID()] = true
		case graph.KindConst:
			switch device := held.tensor.Device(); {
			case device == "cpu" && len(held.tensor.Shape()) == 0:
				continue
			case device != c.device:
				return errCapture
			case owned[held.tensor.StorageID()] != "": // see likeness
				c.lent[held.tensor.StorageID()] = true
				continue
			}
			t, err := aten.Clone(held.tensor)
			if err != nil {
				return err
			}
			c.consts = append(c.consts, fixed{src, t})
			r.machine.Bind(src.Slot, value{tensor: t})
		default:
			t, err := aten.Detach(held.tensor) // lines may change sizes in place
			if err != nil {
				return err
			}
			c.inputs = append(c.inputs, fixed{src, t})
		}
	}
	r.helpers = map[*plan.Instr]aten.Tensor{}
	for i := range r.schedule.Instrs {
		in := &r.schedule.Instrs[i]
		t, err := r.helper(in)
		if err != nil {
			return err
		}
		if !t.IsZero() {
			r.helpers[in] = t
			c.helpers = append(c.helpers, t)
		}
	}
	return nil
}

// note has the device note the instructions.
func (r *Run) note(c *captured, state *modeGuard) error {
	written := map[uintptr]string{} // what a replay must not write to: the user has another there
	for _, f := range c.consts {
		written[f.tensor.StorageID()] = "const"
	}
	capturing.Lock()
	defer capturing.Unlock()
	pass, err := aten.BeginCapture(c.device)
	if err != nil {
		return err
	}
	c.pass = pass
	ended := false
	defer func() {
		if !ended { // a panic
			_ = pass.End()
		}
	}()
	for in := r.machine.Next(); in != nil && err == nil; in = r.machine.Next() {
		state.set(in.Mode)
		if err = r.keeps(in, written); err != nil {
			break
		}
		var out value
		if out, err = r.perform(in); err == nil {
			r.dead = r.machine.Feed(out, r.dead[:0])
			release(r.dead)
		}
	}
	ended = true
	if failed := pass.End(); err == nil {
		err = failed
	}
	if err == nil && len(r.odd) > 0 {
		err = errCapture
	}
	return err
}

// keeps is an error where an instruction writes to memory that it must not write to.
func (r *Run) keeps(in *plan.Instr, written map[uintptr]string) error {
	args, err := r.writes(in)
	if err != nil {
		return err
	}
	for _, a := range args {
		v, err := r.value(a)
		if err != nil {
			return err
		}
		if _, ok := weightIn(&v, written); ok {
			return errCapture
		}
	}
	return nil
}

// keepResults takes the results of the pass over.
func (r *Run) keepResults(c *captured) error {
	consts, first := map[uintptr]bool{}, map[uintptr]int{}
	for _, f := range c.consts {
		consts[f.tensor.StorageID()] = true
	}
	seen := map[plan.Slot]bool{}
	var failed error
	keep := func(slot plan.Slot) graph.Arg {
		if seen[slot] || r.schedule.Borrowed[slot] || failed != nil { // what is borrowed is handed out as it is
			return graph.Null()
		}
		seen[slot] = true
		held, err := r.machine.Value(slot)
		if err != nil {
			failed = err
			return graph.Null()
		}
		kept := held.with(func(t aten.Tensor) aten.Tensor {
			own, err := t.Share()
			if err != nil {
				failed = err
			}
			return own
		})
		c.results = append(c.results, result{slot, kept})
		kept.with(func(t aten.Tensor) aten.Tensor {
			id, i := t.StorageID(), len(c.copies)
			one := copied{tensor: t, with: i, own: c.lent[id]}
			if before, ok := first[id]; ok {
				one.with = before
				c.copies[before].shared = true
				if c.copies[before].tensor.DType() != t.DType() {
					failed = errCapture
				}
			} else {
				first[id] = i
			}
			if consts[id] || t.Device() != c.device || t.RequiresGrad() || !t.IsPlain() {
				failed = errCapture
			}
			c.copies = append(c.copies, one)
			return t
		})
		return graph.Null()
	}
	for i := range r.schedule.Saved {
		r.schedule.Saved[i].Value.Replaced(keep)
	}
	return failed
}
