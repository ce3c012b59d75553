// Package host binds the machine to a model.
//
// A [Native] model is an architecture's graph with its weights. Phases: [Open] reads the config and
// the headers of the weights and builds the graph; [Native.Load] maps the weights; [Native.Start]
// turns a trace into a [Run], whose Step does the work on the calling thread.
//
// Ownership: the model owns its parameters, runs borrow them. Closing a model that has runs under
// way keeps the weights until the last of them ends.
package host

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/nnsight-go/nnsight-go/engine/arch"
	_ "github.com/nnsight-go/nnsight-go/engine/arch/all" // every architecture registers itself
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/nn"
	"github.com/nnsight-go/nnsight-go/engine/plan"
	"github.com/nnsight-go/nnsight-go/engine/weights"
)

// Options say how a model is opened.
type Options struct {
	DType  string // torch's name; "" keeps what the checkpoint holds
	Device string // "cpu", "cuda:0"; "" is the CPU
	Load   bool   // map the weights at once, rather than before the first run
	Bare   bool   // there need be no weights: the model is described, and runs elsewhere

	// Prepack is how many bytes of packed weights are kept to multiply with: 0 for DefaultPrepack,
	// negative for none.
	Prepack int64

	// Captures is for how many schedules a device that can do a pass again keeps it (a CUDA graph): 0 for none.
	Captures int
}

// Native is a model whose forward pass the engine computes itself. It is safe for concurrent use.
type Native struct {
	dir        string
	config     *weights.Config
	arch       arch.Architecture
	graphs     *arch.Graphs
	checkpoint *weights.Checkpoint
	names      map[string]string // parameter -> its name in the checkpoint
	dtype      string
	device     string
	prepack    int64 // bytes

	training  atomic.Bool
	apart     atomic.Bool   // every token is computed
	protected atomic.Bool   // runs that begin leave the weights as they are
	mostWork  atomic.Uint64 // that a line of them may need: see LimitWork
	plans     plans
	captures  captures
	plain     sync.Map // plainSize to *Cost
	typing    sync.Once
	types     map[string]string // dtypes of the parameters, once somebody has asked
	hosted    bool              // somebody else does its forward pass

	mu     sync.Mutex
	params map[string]aten.Tensor // by name; tied names share a handle's tensor
	shelf  *shelf                 // copies of some of them
	owned  map[uintptr]string     // their storages, once a run protects them
	loaded bool
	closed bool
	runs   int
}

// Open opens a model directory. The weights are not read.
func Open(dir string, o Options) (*Native, error) {
	config, err := weights.ReadConfig(dir)
	if err != nil {
		return nil, err
	}
	a, err := arch.Open(config.JSON)
	if err != nil {
		return nil, inDir(err, dir)
	}
	graphs, err := arch.Build(a)
	if err != nil {
		return nil, inDir(err, dir)
	}
	m := &Native{dir: dir, config: config, arch: a, graphs: graphs, dtype: o.DType, device: o.Device, prepack: o.Prepack}
	m.captures.most = o.Captures
	if m.prepack == 0 {
		m.prepack = DefaultPrepack
	}
	if m.device == "" {
		m.device = "cpu"
	}
	if o.Bare {
		if m.dtype == "" {
			m.dtype = "float32"
		}
		return m, nil
	}
	if m.checkpoint, err = weights.Open(dir); err != nil {
		return nil, err
	}
	if err := m.match(); err != nil {
		m.checkpoint.Close()
		return nil, err
	}
	if o.Load {
		if err := m.Load(); err != nil {
			m.checkpoint.Close()
			return nil, err
		}
	}
	return m, nil
}

func inDir(err error, dir string) error {
	e := fault.As(err)
	e.Message = fmt.Sprintf("%s: %s", dir, e.Message)
	return e
}

// match finds every parameter in the checkpoint and settles the dtype.
func (m *Native) match() error {
	var specs []weights.Spec
	for _, p := range m.graphs.Params {
		if p.Compute == nil {
			specs = append(specs, weights.Spec{Name: p.Name, Shape: p.Shape, Tied: p.Tied, Optional: !p.Persistent})
		}
	}
	var o weights.MatchOptions
	if c, ok := m.arch.(arch.Checkpoint); ok {
		o.BasePrefix, o.Ignore = c.BasePrefix(), c.IgnoreSurplus()
	}
	names, err := m.checkpoint.Match(specs, o)
	if err != nil {
		return inDir(err, m.dir)
	}
	m.names = names
	if m.dtype == "" {
		for _, p := range m.graphs.Params {
			if name, ok := names[p.Name]; ok {
				info, _ := m.checkpoint.Info(name)
				m.dtype = info.DType
				break
			}
		}
	}
	return nil
}

func errClosed() error {
	return fault.New(fault.Handle, "this model has been closed").WithHint("Open it again.")
}

// Load maps the weights and makes the computed buffers. Calling it again does nothing.
func (m *Native) Load() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.load()
}

func (m *Native) load() error {
	if m.loaded && m.params != nil { // a closed model keeps them for its runs
		return nil
	}
	if m.closed {
		return errClosed()
	}
	if m.checkpoint == nil {
		return fault.New(fault.ModelLoad, "%s was opened without weights, so the model does not run here", m.dir).
			WithHint("Run it on a server, or open it without remote=.")
	}
	defer plainMode()()
	params := map[string]aten.Tensor{}
	for _, p := range m.graphs.Params {
		t, err := m.loadOne(&p, params)
		if err != nil {
			free(params)
			return err
		}
		params[p.Name] = t
	}
	m.params, m.shelf, m.loaded = params, newShelf(m.prepack, m.graphs.Params, params), true
	return nil
}

func (m *Native) loadOne(p *nn.ParamSpec, have map[string]aten.Tensor) (aten.Tensor, error) {
	if p.Compute != nil {
		t, err := aten.FromFloat32s(p.Compute(), p.Shape...)
		if err != nil {
			return t, err
		}
		return m.place(t, "float32")
	}
	if p.Tied != "" {
		if t, ok := have[p.Tied]; ok {
			return t.Share()
		}
	}
	t, err := m.checkpoint.Tensor(m.names[p.Name])
	if err != nil {
		return t, err
	}
	dtype := p.DType
	if dtype == "" {
		dtype = m.dtype
	}
	return m.place(t, dtype)
}

// trained reports whether a parameter asks for gradients.
func (m *Native) trained() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, t := range m.params {
		if t.RequiresGrad() {
			return true
		}
	}
	return false
}

// place moves a tensor to the model's device and a dtype, taking it over.
func (m *Native) place(t aten.Tensor, dtype string) (aten.Tensor, error) {
	if t.DType() == dtype && m.device == "cpu" {
		return t, nil
	}
	defer t.Free()
	return aten.To(t, m.device, dtype)
}

// plainMode makes this thread's torch state the ordinary one until back is called. What outlives a
// trace must not depend on where it was first used: a parameter made in inference mode could never
// take part in autograd.
func plainMode() (back func()) {
	runtime.LockOSThread()
	state := modeGuard{outer: aten.CurrentMode(), now: aten.CurrentMode()}
	state.set(graph.ModeGrad)
	return func() {
		state.restore()
		runtime.UnlockOSThread()
	}
}

// Close gives the weights back once no run uses them. Tensors handed out stay valid.
func (m *Native) Close() error {
	m.mu.Lock()
	m.closed = true
	unused, passes := m.unused()
	m.mu.Unlock()
	free(unused)
	drop(passes)
	return nil
}

// unused takes the parameters, and the passes that were captured, out of a closed model that no run uses any more, for
// the caller to free without the lock: freeing a tensor that Python knows waits for Python.
func (m *Native) unused() (map[string]aten.Tensor, []*capture) {
	if !m.closed || m.runs > 0 {
		return nil, nil
	}
	params := m.params
	m.params = nil
	if m.shelf != nil {
		m.shelf.free()
	}
	if m.checkpoint != nil {
		m.checkpoint.Close()
		m.checkpoint = nil
	}
	return params, m.captures.all()
}

func free(params map[string]aten.Tensor) {
	for _, t := range params {
		t.Free()
	}
}

// Directory is where the model was opened from.
func (m *Native) Directory() string { return m.dir }

// Device is where the model computes.
func (m *Native) Device() string { return m.device }

// Context is the largest number of tokens of a row.
func (m *Native) Context() int { return m.arch.Context() }

// variants gives the two graphs of a forward pass, with attention computed step by step if explicit.
func (m *Native) variants(explicit bool) (plan.Models, error) {
	if m.hosted {
		return plan.Models{Causal: m.graphs.Causal, Masked: m.graphs.Masked, Hosted: true}, nil
	}
	training := m.Training()
	causal, err := m.graphs.Of(nn.Variant{Explicit: explicit, Training: training})
	if err != nil {
		return plan.Models{}, err
	}
	masked, err := m.graphs.Of(nn.Variant{Explicit: explicit, Training: training, Masked: true})
	return plan.Models{Causal: causal, Masked: masked, Training: training}, err
}

// Train switches dropout on or off for runs that begin from now on. A model that was opened has it off.
func (m *Native) Train(on bool) { m.training.Store(on) }

// Training reports whether dropout is at work.
func (m *Native) Training() bool { return m.training.Load() }

// Parameter gives a new handle on a parameter or buffer, loading the weights if need be.
func (m *Native) Parameter(name string) (aten.Tensor, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return aten.Tensor{}, errClosed()
	}
	if err := m.load(); err != nil {
		return aten.Tensor{}, err
	}
	t, ok := m.params[name]
	if !ok {
		return aten.Tensor{}, m.noParameter(name)
	}
	m.shelf.hand(name)
	return t.Share()
}

func (m *Native) noParameter(name string) error {
	names := make([]string, 0, len(m.params))
	for n := range m.params {
		names = append(names, n)
	}
	return fault.New(fault.ModulePath, "the model has no parameter %q", name).
		WithHint("Nearest: %v.", graph.Nearest(name, names, 3))
}

// Constant gives a new handle on a parameter or buffer for a run that does not write to it.
func (m *Native) Constant(name string) (aten.Tensor, error) {
	if err := m.Load(); err != nil {
		return aten.Tensor{}, err
	}
	t, ok := m.params[name]
	if !ok {
		return aten.Tensor{}, m.noParameter(name)
	}
	return t.Share()
}

// param lends a parameter to a run.
func (m *Native) param(name string) (aten.Tensor, error) {
	if t, ok := m.params[name]; ok {
		return t, nil
	}
	return aten.Tensor{}, fault.New(fault.Internal, "the graph names parameter %q, which was never loaded", name)
}

// op finds an operator.
func (m *Native) op(name string) (*aten.Op, error) { return aten.Find(name) }

// Describe tells all there is to know about the model without its weights.
func (m *Native) Describe() *Description {
	m.mu.Lock()
	loaded := m.loaded
	m.mu.Unlock()
	if m.hosted {
		return &Description{Device: m.device, Loaded: true, Modules: []ModuleInfo{}, Params: []ParamInfo{}}
	}
	d := &Description{
		Architecture: m.config.Architectures[0], Directory: m.dir, Config: m.config.JSON,
		Context: m.arch.Context(), Vocab: m.arch.Vocab(), DType: m.dtype, Device: m.device, Loaded: loaded,
		Modules: []ModuleInfo{}, Params: []ParamInfo{},
	}
	d.Points, d.Ops = points(m.graphs.Causal, m.dtype)
	for _, x := range m.graphs.Causal.Modules {
		d.Modules = append(d.Modules, ModuleInfo{Path: x.Path, Class: x.Class, Extra: x.Extra, Params: append([]string{}, x.Params...)})
	}
	for _, p := range m.graphs.Params {
		dtype := p.DType
		if dtype == "" {
			dtype = m.dtype
		}
		d.Params = append(d.Params, ParamInfo{Name: p.Name, Shape: p.Shape, DType: dtype, Buffer: p.Compute != nil, Tied: p.Tied})
	}
	return d
}

// Start checks a whole trace and makes a run of it, loading the weights if need be. It takes over
// consts, also where it fails.
func (m *Native) Start(g *graph.Graph, consts []aten.Tensor) (*Run, error) {
	return m.Begin(g, consts, true)
}

// Begin makes a run of a trace that may go on: without end, [Run.Extend] adds to it once it is done.
// The run takes over the graph, and consts also where it fails. A judge, if there is one, is told what it would take
// each time before it begins or goes on.
func (m *Native) Begin(g *graph.Graph, consts []aten.Tensor, end bool, judges ...Judge) (*Run, error) {
	r := &Run{model: m, graph: &graph.Graph{}, judge: judgeOf(judges)}
	r.protect()
	var err error
	if r.models, err = m.variants(false); err == nil {
		err = m.enter()
	}
	if err != nil {
		aten.FreeAll(consts)
		return nil, err
	}
	r.plan = plan.New(r.models)
	if err := r.Extend(func(own *graph.Graph) error { *own = *g; return nil }, consts, end); err != nil {
		return nil, err
	}
	return r, nil
}

// enter counts a run in, which keeps the weights until it is done.
func (m *Native) enter() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return errClosed()
	}
	m.runs++
	return nil
}

// done notes that a run has ended.
func (m *Native) done() {
	m.mu.Lock()
	m.runs--
	unused, passes := m.unused()
	m.mu.Unlock()
	free(unused)
	drop(passes)
}

// checkSizes refuses batches that padding makes out of all proportion to the tokens given: rows
// are as long as the longest, so one long row beside many short ones asks for much more memory
// than it looks.
func checkSizes(s *plan.Schedule) error {
	for i := range s.Forwards {
		if f := &s.Forwards[i]; f.Batch()*f.Seq > graph.MaxTokens {
			return fault.New(fault.Input, "%d rows padded to %d tokens are %d tokens; %d are allowed",
				f.Batch(), f.Seq, f.Batch()*f.Seq, graph.MaxTokens).WithHint("Trace prompts of about equal length together.")
		}
	}
	return nil
}

// checkInputs refuses tokens the model cannot take, before any work, in the invokes from a number on.
func (m *Native) checkInputs(g *graph.Graph, from int) error {
	if m.hosted {
		return nil
	}
	context, vocab := m.arch.Context(), int64(m.arch.Vocab())
	for i := from; i < len(g.Invokes); i++ {
		for r, row := range g.Invokes[i].Rows {
			var err *fault.Error
			if len(row) > context {
				err = fault.New(fault.Input, "row %d of invoke %d has %d tokens; the model's context holds %d", r, i, len(row), context).
					WithHint("Shorten the prompt.")
			}
			for k, id := range row {
				if id < 0 || id >= vocab {
					err = fault.New(fault.Input, "token %d of row %d of invoke %d is id %d; the vocabulary has ids 0 to %d", k, r, i, id, vocab-1).
						WithHint("Tokenize with the model's own tokenizer.")
					break
				}
			}
			if err != nil {
				err.Invoke = i
				return err
			}
		}
	}
	return nil
}

// input builds one of a forward pass's inputs.
func (m *Native) input(f *plan.Forward, name string) (aten.Tensor, error) {
	t, err := m.hostInput(f, name)
	if err != nil {
		return t, err
	}
	return m.place(t, t.DType())
}

// hostInput builds it on the CPU. Its memory is torch's from the start: what cannot be had is then an error, where Go
// would end the process.
func (m *Native) hostInput(f *plan.Forward, name string) (aten.Tensor, error) {
	batch, seq := f.Batch(), f.Seq
	var t aten.Tensor
	var err error
	switch name {
	case "input_ids":
		t, err = aten.FillInt64s(func(ids []int64) { // padding is id 0: any id will do, nobody sees it
			for r, row := range f.Rows {
				copy(ids[int64(r)*seq+pad(f, row):], row)
			}
		}, batch, seq)
	case "position_ids":
		if !f.Masked {
			t, err = aten.FillInt64s(func(ids []int64) {
				for i := range ids {
					ids[i] = int64(i)
				}
			}, 1, seq)
			break
		}
		t, err = aten.FillInt64s(func(ids []int64) {
			for r := range f.Rows {
				next := int64(0)
				for i, real := range realTokens(f, r) {
					ids[int64(r)*seq+int64(i)] = max(next-1, 0)
					if real {
						ids[int64(r)*seq+int64(i)] = next
						next++
					}
				}
			}
		}, batch, seq)
	case "causal_mask":
		t, err = aten.FillBools(func(mask []bool) {
			for q := range seq {
				for k := range q + 1 {
					mask[q*seq+k] = true
				}
			}
		}, 1, 1, seq, seq)
	case "attention_mask":
		// a query sees the real tokens up to itself, and itself, so that padding stays finite
		t, err = aten.FillBools(func(mask []bool) {
			for r := range f.Rows {
				real := realTokens(f, r)
				for q := range seq {
					at := (int64(r)*seq + q) * seq
					copy(mask[at:at+q], real)
					mask[at+q] = true
				}
			}
		}, batch, 1, seq, seq)
	default:
		return t, fault.New(fault.Internal, "the model asks for an input %q", name)
	}
	return t, err
}

// pad is how many tokens of padding stand before a row.
func pad(f *plan.Forward, row []int64) int64 {
	if f.Masked {
		return f.Seq - int64(len(row))
	}
	return 0
}

// realTokens says which tokens of a padded row count.
func realTokens(f *plan.Forward, r int) []bool {
	out := make([]bool, f.Seq)
	start := pad(f, f.Rows[r])
	for i := range f.Rows[r] {
		out[start+int64(i)] = f.Masks[r] == nil || f.Masks[r][i] != 0
	}
	return out
}
