// Package proxy records traces from Go.
//
// Phases: [New] starts a trace of a model; [Trace.Invoke] gives it a prompt; methods of [Invoke]
// and [Value] append nodes to the trace's graph and compute nothing; [Trace.Run] runs the graph;
// after it the values that were saved hold tensors. A trace belongs to one goroutine.
//
//	tr := proxy.New(model)
//	in := tr.Invoke("The Eiffel Tower is in the city of")
//	in.Module("transformer.h.3.mlp").SetOutput("", in.Module("transformer.h.3.mlp").Output("").Mul(0))
//	logits := in.Module("lm_head").Output("").Save()
//	if err := tr.Run(ctx); err != nil { ... }
//	fmt.Println(logits.Tensor().Shape())
//
// [Generate] begins a generation, each step of which is a trace of its own. [Dial] names a server, on whose models
// the same traces run.
//
// Mistakes in recording (an unknown module, a value of another trace) are kept and returned by Run,
// so that a program reads as straight-line code.
package proxy

import (
	"context"
	"runtime"
	"strings"
	"time"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
	torch "github.com/wangkuiyi/gotorch"
)

// Model is what traces are of: an [engine.Model], or a [RemoteModel].
type Model interface {
	// Encode gives the token ids of a text.
	Encode(text string) ([]int64, error)
}

// Trace is a program over a model's activations.
type Trace struct {
	model  Model
	graph  graph.Graph
	consts []torch.Tensor
	saved  map[graph.ID]*Value
	lines  map[fault.Pos]int32
	begun  []fault.Pos // the line of each invoke
	passes []*Backward // that are open
	err    error
	ran    bool
}

// New starts a trace. Autograd follows what its lines ask the gradient of ([Value.Backward]), and tensors
// of the program that require gradients.
func New(model Model) *Trace {
	return &Trace{model: model, saved: map[graph.ID]*Value{}, lines: map[fault.Pos]int32{}}
}

// Graph is what has been recorded so far, for printing.
func (t *Trace) Graph() *graph.Graph { return &t.graph }

// Invoke is one prompt of a trace. Its lines take effect in the order they are recorded, on its
// own rows of the batch that all invokes share.
type Invoke struct {
	trace  *Trace
	number int32
}

// Invoke adds a prompt: strings are tokenized by the model's own tokenizer; several make a batch,
// padded on the left. Without any the invoke sees the whole batch of the others.
func (t *Trace) Invoke(prompts ...string) *Invoke {
	var in graph.Invoke
	for _, p := range prompts {
		ids, err := t.model.Encode(p)
		if err != nil {
			t.fail(err)
			ids = []int64{0}
		}
		in.Rows = append(in.Rows, ids)
	}
	return t.invoke(in)
}

// InvokeIDs adds a prompt of token ids, a row for each list.
func (t *Trace) InvokeIDs(rows ...[]int64) *Invoke {
	return t.invoke(graph.Invoke{Rows: rows})
}

func (t *Trace) invoke(in graph.Invoke) *Invoke {
	t.graph.Invokes = append(t.graph.Invokes, in)
	t.begun = append(t.begun, caller())
	return &Invoke{trace: t, number: int32(len(t.graph.Invokes) - 1)}
}

// fail keeps the first mistake, for Run.
func (t *Trace) fail(err error) {
	if t.err == nil {
		e := fault.As(err)
		if e.Pos.IsZero() {
			e.Pos = caller()
		}
		t.err = e
	}
}

// caller is the user's line: the first one outside this package.
func caller() fault.Pos {
	pcs := make([]uintptr, 16)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	for {
		f, more := frames.Next()
		if !strings.Contains(f.Function, "nnsight-go/proxy.") || strings.HasSuffix(f.File, "_test.go") {
			return fault.Pos{File: f.File, Line: f.Line, Func: f.Function}
		}
		if !more {
			return fault.Pos{}
		}
	}
}

// add appends a node and gives its value.
func (in *Invoke) add(n graph.Node) *Value {
	t := in.trace
	pos := caller()
	line, ok := t.lines[pos]
	if !ok {
		line = int32(len(t.graph.Positions))
		t.graph.Positions = append(t.graph.Positions, pos)
		t.lines[pos] = line
	}
	n.Invoke, n.Pos, n.Mode = in.number, line, graph.ModeGrad
	t.graph.Nodes = append(t.graph.Nodes, n)
	return &Value{invoke: in, id: graph.ID(len(t.graph.Nodes) - 1)}
}

// Module names a module of the model by its Hugging Face path.
func (in *Invoke) Module(path string) *Module {
	return &Module{invoke: in, path: path}
}

// Call records an ATen operator by schema name, "aten::softmax" or "aten::softmax.int". Arguments
// are values of this trace, gotorch tensors, numbers, booleans, strings, nil, and slices of these.
func (in *Invoke) Call(op string, args ...any) *Value {
	if !strings.Contains(op, "::") {
		op = "aten::" + op
	}
	return in.add(graph.Node{Kind: graph.KindCall, Op: op, Args: in.args(args)})
}

// Module is a module of the model in one invoke.
type Module struct {
	invoke *Invoke
	path   string
}

// Output reads a tensor of the module's output. leaf names which: "" where the output is a bare
// tensor, "0" for the hidden states of a decoder block or an attention.
func (m *Module) Output(leaf string) *Value { return m.read(graph.PortOutput, leaf) }

// Input reads a tensor of the module's inputs: "args.0", or "kwargs.hidden_states" by name.
func (m *Module) Input(leaf string) *Value { return m.read(graph.PortInput, leaf) }

func (m *Module) read(port graph.Port, leaf string) *Value {
	return m.invoke.add(graph.Node{Kind: graph.KindRead, Path: m.path, Port: port, Leaf: leaf})
}

// SetOutput replaces a tensor of the module's output.
func (m *Module) SetOutput(leaf string, v *Value) { m.write(graph.PortOutput, leaf, v) }

// SetInput replaces a tensor of the module's inputs.
func (m *Module) SetInput(leaf string, v *Value) { m.write(graph.PortInput, leaf, v) }

func (m *Module) write(port graph.Port, leaf string, v *Value) {
	m.invoke.add(graph.Node{Kind: graph.KindWrite, Path: m.path, Port: port, Leaf: leaf, Args: m.invoke.args([]any{v})})
}

// Call runs the module on values, as in a logit lens: Module("lm_head").Call(h).
func (m *Module) Call(args ...any) *Value {
	return m.invoke.add(graph.Node{Kind: graph.KindModule, Path: m.path, Args: m.invoke.args(args)})
}

// Run runs the trace, here or on the server of its model, and fills its saved values. Cancelling the context ends
// the run between two operators; nothing is left behind. A trace runs once.
func (t *Trace) Run(ctx context.Context) error {
	if err := t.begin(); err != nil {
		return err
	}
	switch m := t.model.(type) {
	case *RemoteModel:
		return m.trace(ctx, t)
	case *engine.Model:
		return t.run(ctx, func(consts []aten.Tensor) (*host.Run, error) {
			run, err := m.Start(&t.graph, consts)
			if err != nil {
				if e := fault.As(err); e.Pos.IsZero() && e.Invoke >= 0 && e.Invoke < len(t.begun) {
					e.Pos = t.begun[e.Invoke] // a prompt that the model cannot take
				}
			}
			return run, err
		})
	}
	return strange(t.model)
}

// strange is the error of a model that is neither of those that there are.
func strange(m Model) error {
	return fault.New(fault.Input, "a %T is no model that can be traced", m).WithHint("Give an *engine.Model or a *proxy.RemoteModel.")
}

// begin completes what was recorded. It gives the first mistake in it.
func (t *Trace) begin() error {
	if t.err == nil && t.ran {
		t.err = fault.New(fault.Graph, "this trace has run").WithHint("Record a new one.")
	}
	t.ran = true
	t.endPasses()
	return t.err
}

// run does what Run says with a run that start makes, which takes over the constants.
func (t *Trace) run(ctx context.Context, start func(consts []aten.Tensor) (*host.Run, error)) error {
	runtime.LockOSThread() // torch's grad mode and thread pool belong to threads
	defer runtime.UnlockOSThread()
	consts, err := t.lend()
	if err != nil {
		return err
	}
	run, err := start(consts)
	if err != nil {
		return err
	}
	defer run.Free()
	for done := false; !done; {
		if err := ctx.Err(); err != nil {
			return fault.New(fault.Cancelled, "the run was cancelled").WithCause(err)
		}
		if done, err = run.Step(20 * time.Millisecond); err != nil {
			return err
		}
	}
	results, tensors, err := run.Results()
	if err != nil {
		return err
	}
	defer func() {
		aten.FreeAll(tensors)
	}()
	return t.fill(results, tensors)
}

// fill gives saved values their tensors, all of them or none.
func (t *Trace) fill(results []graph.Result, tensors []aten.Tensor) error {
	for _, r := range results {
		if r.Value.Kind != graph.ArgRef {
			e := fault.New(fault.Op, "what this line saves is no tensor").WithHint("Of several results, save each (Item).")
			e.Pos = t.graph.PosOf(&t.graph.Nodes[r.Node])
			return e
		}
	}
	for _, r := range results {
		shared, err := tensors[r.Value.Ref].Share()
		if err != nil {
			return err
		}
		t.saved[r.Node].result, t.saved[r.Node].filled = shared.Gotorch(), true
	}
	return nil
}

// lend makes handles of the run's own on the tensors that the trace uses from outside.
func (t *Trace) lend() ([]aten.Tensor, error) {
	consts := make([]aten.Tensor, 0, len(t.consts))
	for _, c := range t.consts {
		x, err := aten.FromGotorch(c)
		if err != nil {
			aten.FreeAll(consts)
			return nil, err
		}
		consts = append(consts, x)
	}
	return consts, nil
}

// Tensor is a saved value after Run. It panics, as gotorch does, where the value was not saved or
// the trace has not run: both are mistakes in the program.
func (v *Value) Tensor() torch.Tensor {
	if !v.filled {
		panic(fault.New(fault.NotSaved, "this value holds no tensor").
			WithHint("Call Save on it while recording, and Tensor after Run has succeeded."))
	}
	return v.result
}
