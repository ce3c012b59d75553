package remote

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
)

// slice is for how long a run works before it looks whether it is still wanted.
const slice = 20 * time.Millisecond

// Response is what a request came to.
type Response struct {
	Version int          `json:"version"`
	Steps   []StepResult `json:"steps"`
	Random  string       `json:"random,omitempty"` // tensor that holds the generator's state afterwards
}

// StepResult is what was wanted of a step.
type StepResult struct {
	Step    int      `json:"step"`
	Results string   `json:"results,omitempty"` // tensor that holds them in wire form
	Tensors []string `json:"tensors,omitempty"` // those that the results number
	Drawn   *Drawn   `json:"drawn,omitempty"`
	Scores  string   `json:"scores,omitempty"`
	Left    string   `json:"left,omitempty"`
}

// Drawn is what is told of a step's tokens. The rows of a beam search are other rows each time.
type Drawn struct {
	Tokens []int64   `json:"tokens"`
	Done   bool      `json:"done"`
	Rows   [][]int64 `json:"rows,omitempty"`
}

// DrawnOf tells of the tokens of a generation's step.
func DrawnOf(g *gen.Generation, tokens []int64) Drawn {
	d := Drawn{Tokens: tokens, Done: g.Done()}
	if g.Searches() {
		d.Rows = g.Rows()
	}
	return d
}

// Performer runs requests on a model. Any number of goroutines may use it.
type Performer struct {
	Model  *host.Native
	Limits Limits
	// Chains, if there are some, keep generations between the requests that go through them.
	Chains *Chains
}

// generator is held by who draws from the process's generator: its state is the request's meanwhile.
var generator sync.Mutex

// Perform runs a request for somebody and gives the response. It ends early, with an error of code
// Cancelled, where ctx does.
func (p *Performer) Perform(ctx context.Context, owner string, r *Request) (out []byte, err error) {
	x := p.begin(ctx, r)
	if r.Random != "" {
		back, err := x.takeGenerator()
		if err != nil {
			return nil, err
		}
		defer back()
	}
	switch r.Kind {
	case Trace:
		err = x.trace()
	case Session:
		err = x.session()
	default:
		err = x.generate(owner)
	}
	if err != nil {
		return nil, err
	}
	return x.file()
}

// performing is a request on its way.
type performing struct {
	*Performer
	ctx      context.Context
	request  *Request
	response Response
	writer   Writer
	bytes    int64     // of results so far
	kept     *kept     // of a session
	spent    host.Cost // by its traces so far
}

func (p *Performer) begin(ctx context.Context, r *Request) *performing {
	return &performing{Performer: p, ctx: ctx, request: r, response: Response{Version: version, Steps: []StepResult{}}}
}

// takeGenerator gives the process's generator the request's state, until back is called.
func (x *performing) takeGenerator() (back func(), err error) {
	generator.Lock()
	before, err := aten.RandomState("cpu")
	if err != nil {
		generator.Unlock()
		return nil, err
	}
	if err := x.setGenerator(x.request.Random); err != nil {
		before.Free()
		generator.Unlock()
		return nil, err
	}
	return func() {
		_ = aten.SetRandomState("cpu", before) // it was there a moment ago
		before.Free()
		generator.Unlock()
	}, nil
}

// setGenerator gives the process's generator a state that the request has.
func (x *performing) setGenerator(name string) error {
	given, err := x.request.file.tensor(name)
	if err != nil {
		return err
	}
	defer given.Free()
	if err := aten.SetRandomState("cpu", given); err != nil {
		return malformed("what it gives as the state of the generator is none: %v", err)
	}
	return nil
}

func (x *performing) trace() error {
	results, err := x.traceStep(0)
	x.response.Steps = append(x.response.Steps, results)
	return err
}

// traceStep runs a step that is a trace.
func (x *performing) traceStep(at int) (out StepResult, err error) {
	s, p := &x.request.Steps[at], &x.request.programs[at]
	consts, err := x.constants(s)
	if err != nil {
		return out, err
	}
	var run *host.Run
	if p.whole != nil {
		run, err = x.Model.BeginBytes(p.whole, consts, s.End, x.judge(p, s))
	} else {
		run, err = x.Model.Begin(p.graph, consts, s.End, x.judge(p, s))
	}
	if err != nil {
		return out, err
	}
	return x.results(run, p.last, at)
}

// finish brings a run to its end. The tensors are the caller's.
func finish(ctx context.Context, run *host.Run) ([]graph.Result, []aten.Tensor, error) {
	defer run.Free()
	for done := false; !done; {
		if ctx.Err() != nil {
			return nil, nil, cancelled(ctx)
		}
		var err error
		if done, err = run.Step(slice); err != nil {
			return nil, nil, err
		}
	}
	return run.Results()
}

// results brings the run of a step to its end and gives what was wanted of it, of save nodes from one on.
func (x *performing) results(run *host.Run, from graph.ID, at int) (out StepResult, err error) {
	s := &x.request.Steps[at]
	results, tensors, err := finish(x.ctx, run)
	if err != nil {
		return out, err
	}
	defer func() {
		aten.FreeAll(tensors)
	}()
	wanted := results[:0]
	for _, result := range results {
		if result.Node >= from {
			wanted = append(wanted, result)
		}
	}
	if x.kept != nil {
		wanted = inOrder(wanted)
		if err := x.kept.take(at, wanted, tensors); err != nil {
			return out, err
		}
		wanted = without(wanted, s.Unsent)
	}
	return x.answer(wanted, tensors, s)
}

// answer adds results to the response, if they are wanted, and those of the tensors that they number.
func (x *performing) answer(results []graph.Result, tensors []aten.Tensor, s *Step) (out StepResult, err error) {
	if !slices.Contains(s.Want, WantResults) {
		return out, nil
	}
	numbers := map[graph.ID]graph.ID{}
	var failed error
	number := func(id graph.ID) graph.Arg {
		n, known := numbers[id]
		if !known && failed == nil {
			n = graph.ID(len(out.Tensors))
			numbers[id] = n
			var name string
			name, failed = x.send(tensors[id])
			out.Tensors = append(out.Tensors, name)
		}
		return graph.Ref(n)
	}
	for i := range results {
		results[i].Value = results[i].Value.Replaced(number)
	}
	if failed != nil {
		return out, failed
	}
	out.Results = fmt.Sprintf("results.%d", len(x.response.Steps))
	x.writer.Bytes(out.Results, graph.EncodeResults(results))
	return out, nil
}

// send adds a tensor to the response and gives its name there.
func (x *performing) send(t aten.Tensor) (string, error) {
	if x.bytes += t.Bytes(); x.Limits.Output > 0 && x.bytes > x.Limits.Output {
		return "", fault.New(fault.Remote, "the values that the trace saves take more than the %d bytes that this server sends at once",
			x.Limits.Output).WithHint("Save less: the positions you look at, or what you compute from them.")
	}
	return x.writer.Add(t)
}

// constants gives the tensors that the graph of a step numbers.
func (x *performing) constants(s *Step) (out []aten.Tensor, err error) {
	defer func() {
		if err != nil {
			aten.FreeAll(out)
			out = nil
		}
	}()
	for i := range s.Constants {
		t, err := x.constant(&s.Constants[i])
		if err != nil {
			return out, err
		}
		out = append(out, t)
	}
	return out, nil
}

func (x *performing) constant(c *Constant) (aten.Tensor, error) {
	if c.Parameter != "" {
		return x.Model.Constant(c.Parameter)
	}
	if c.Result != nil {
		return x.kept.tensors[*c.Result].Share()
	}
	t, err := x.given(c)
	if err != nil {
		return t, err
	}
	if device := x.Model.Device(); device != "cpu" {
		defer t.Free()
		if t, err = aten.To(t, device, t.DType()); err != nil {
			return t, err
		}
	}
	if c.Grad {
		defer t.Free()
		return aten.Leaf(t)
	}
	return t, nil
}

// given is a constant that came from the client.
func (x *performing) given(c *Constant) (aten.Tensor, error) {
	if c.Hash == "" {
		return x.request.file.tensor(c.Tensor)
	}
	if x.request.Upload == nil {
		return aten.Tensor{}, malformed("it names an uploaded tensor, and there are none here")
	}
	blob, err := x.request.Upload(c.Hash)
	if err != nil {
		return aten.Tensor{}, err
	}
	return aten.FromBytes(blob.Data, blob.DType, blob.Shape...)
}

func (x *performing) generate(owner string) (err error) {
	r := x.request
	state, random, at, scored := x.Chains.take(owner, r)
	if err := x.affordable(at); err != nil {
		if state != nil {
			state.Free()
			random.Free()
		}
		return err
	}
	if state == nil {
		if state, err = gen.New(x.Model, r.Prompt.Rows, r.Prompt.Masks, *r.Settings); err != nil {
			return err
		}
	}
	keep := false
	defer func() {
		if keep && err == nil {
			err = x.keep(owner, state, scored)
		} else {
			state.Free()
		}
	}()
	if !random.IsZero() { // it draws on where it was
		defer random.Free()
		if err := aten.SetRandomState("cpu", random); err != nil {
			return err
		}
	}
	if at > 0 && r.Steps[at-1].Ended != nil { // the client has said so since
		if err := state.End(r.Steps[at-1].Ended); err != nil {
			return atStep(err, r.Kind, at-1)
		}
	}
	for ; at < len(r.Steps) && !state.Done(); at++ {
		if scored, err = x.step(state, at, scored); err != nil {
			return atStep(err, r.Kind, at)
		}
		keep = r.Steps[at].End
	}
	keep = keep && !state.Done()
	return nil
}

// keep lets a request that goes on find its generation. scored: the last step's tokens wait for the client's scores.
func (x *performing) keep(owner string, g *gen.Generation, scored bool) (err error) {
	var random aten.Tensor
	if x.request.Random != "" {
		if random, err = aten.RandomState("cpu"); err != nil {
			g.Free()
			return err
		}
	}
	x.Chains.put(owner, x.request, g, random, scored)
	return nil
}

// step does one step of a generation. ran: it has run before, and its tokens are to be drawn. scored: they wait for
// scores of the client's.
func (x *performing) step(g *gen.Generation, at int, ran bool) (scored bool, err error) {
	s, p := &x.request.Steps[at], &x.request.programs[at]
	var out StepResult
	if !ran {
		consts, err := x.constants(s)
		if err != nil {
			return false, err
		}
		run, err := g.Begin(p.graph, consts, s.End)
		if err != nil {
			return false, err
		}
		if out, err = x.results(run, p.last, at); err != nil {
			return false, err
		}
	}
	out.Step = at
	if s.End {
		if scored, err = x.draw(g, s, &out, ran); err != nil {
			return false, err
		}
	}
	if len(s.Want) > 0 {
		x.response.Steps = append(x.response.Steps, out)
	}
	return scored, nil
}

// draw adds the tokens of a step, unless they wait for scores of the client's.
func (x *performing) draw(g *gen.Generation, s *Step, out *StepResult, scored bool) (waits bool, err error) {
	var scores aten.Tensor
	defer func() { scores.Free() }()
	if !scored {
		if scores, err = g.Scores(); err != nil {
			return false, err
		}
	}
	if s.Scores == "" && slices.Contains(s.Want, WantScores) {
		out.Scores, err = x.send(scores)
		return true, err
	}
	if s.Scores != "" {
		given, err := x.request.file.tensor(s.Scores)
		if err != nil {
			return false, err
		}
		scores.Free()
		scores = given
	}
	if s.Random != "" {
		if err := x.setGenerator(s.Random); err != nil {
			return false, err
		}
	}
	tokens, left, err := g.Choose(scores)
	if err != nil {
		return false, err
	}
	defer left.Free()
	if slices.Contains(s.Want, WantLeft) {
		if out.Left, err = x.send(left); err != nil {
			return false, err
		}
	}
	if s.Ended != nil {
		if err := g.End(s.Ended); err != nil {
			return false, err
		}
	}
	if slices.Contains(s.Want, WantDrawn) {
		d := DrawnOf(g, slices.Clone(tokens))
		out.Drawn = &d
	}
	return false, nil
}

// file gives the response as it travels.
func (x *performing) file() ([]byte, error) {
	if x.request.Random == "" {
		return x.fileWith(aten.Tensor{})
	}
	state, err := aten.RandomState("cpu")
	if err != nil {
		return nil, err
	}
	defer state.Free()
	return x.fileWith(state)
}

// fileWith gives the response with the state of a generator, if there is one.
func (x *performing) fileWith(random aten.Tensor) (_ []byte, err error) {
	if !random.IsZero() {
		if x.response.Random, err = x.send(random); err != nil {
			return nil, err
		}
	}
	text, err := json.Marshal(x.response)
	if err != nil {
		return nil, err
	}
	x.writer.Bytes("response", text)
	return x.writer.File()
}

// cancelled is the error of a request that is no longer wanted, or took too long.
func cancelled(ctx context.Context) error {
	if cause := context.Cause(ctx); cause != nil && cause != context.Canceled {
		return fault.As(cause)
	}
	return fault.New(fault.Cancelled, "the job was cancelled")
}
