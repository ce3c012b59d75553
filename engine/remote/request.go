// Package remote runs traces that arrive as data: the requests of the remote protocol
// (docs/remote-protocol.md), which server and clients share.
//
// [Parse] reads a request, which may come from anyone; a [Performer] runs it on a model and gives the
// response. Nothing in a request is code. Both are files of tensors with a JSON object among them.
package remote

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/guard"
)

// version numbers the protocol.
const version = 1

// Kinds of requests.
const (
	Trace    = "trace"
	Generate = "generate"
	Session  = "session" // traces, one after the other, whose values later ones use
)

// What a step may be asked to give.
const (
	WantResults = "results"
	WantDrawn   = "drawn"
	WantScores  = "scores"
	WantLeft    = "left"
)

// MaxSteps is the most steps of a request, and MaxTraces of a session.
const (
	MaxSteps  = 1 << 16
	MaxTraces = 1 << 12
)

// What Parse reads takes some hundred times its bytes. They are bounded, so that this is no more than some gigabytes.
const (
	mostText     = 16 << 20 // bytes of a request's JSON
	mostPrograms = 16 << 20 // and of the programs of its steps; those of several steps that are one count once
)

// Request is what a client asks for.
type Request struct {
	Version  int           `json:"version"`
	Model    string        `json:"model"`
	Kind     string        `json:"kind"`
	Steps    []Step        `json:"steps"`
	Prompt   *Prompt       `json:"prompt,omitempty"`
	Settings *gen.Settings `json:"settings,omitempty"`
	Chain    string        `json:"chain,omitempty"`  // requests that continue one another have the same
	Random   string        `json:"random,omitempty"` // tensor that holds the generator's state

	// Upload gives a tensor that was sent before, by its hash; nil where there are none.
	Upload func(hash string) (Blob, error) `json:"-"`

	file     file
	programs []program // of the steps
}

// Step is one forward pass of the model and what the program does at it.
type Step struct {
	Program   []string   `json:"program"` // tensors that hold the parts of its graph
	Constants []Constant `json:"constants"`
	End       bool       `json:"end"`              // its program is complete
	Want      []string   `json:"want"`             // what of it is to come back
	Unsent    []int      `json:"unsent,omitempty"` // which of its results do not, since only later steps use them
	Scores    string     `json:"scores,omitempty"`
	Ended     []bool     `json:"ended,omitempty"`
	Random    string     `json:"random,omitempty"` // tensor that holds the generator's state before its tokens are drawn
}

// Constant says where a tensor that a graph numbers is: in the file, uploaded before, in the model, or among the
// results of an earlier step.
type Constant struct {
	Tensor    string `json:"tensor,omitempty"`
	Hash      string `json:"hash,omitempty"`
	Parameter string `json:"parameter,omitempty"`
	Grad      bool   `json:"grad,omitempty"` // autograd follows it
	Result    *Place `json:"result,omitempty"`
}

// Place is where a session finds a value of an earlier step: which of the results that are wanted of it, in the order
// of their nodes.
type Place struct {
	Step   int `json:"step"`
	Number int `json:"number"`
}

// Prompt is what a generation goes on from.
type Prompt struct {
	Rows  [][]int64 `json:"rows"`
	Masks [][]int64 `json:"masks"`
}

// program is the graph of a step, and its last part.
type program struct {
	graph *graph.Graph
	whole []byte // of a graph in one part
	last  graph.ID
}

// Limits bound what a request may ask for; a zero means no limit.
type Limits struct {
	Tokens    int     // of all rows of a request, and new ones in a generation, together
	NewTokens int     // of each row
	Output    int64   // bytes of a response
	Memory    int64   // bytes of tensors at the same time, beside the weights: those that an estimate comes to
	Work      float64 // multiplications, which are estimated as well
}

// Within are limits of which none is higher than others: those of a key within those of a server.
func (l Limits) Within(other Limits) Limits {
	return Limits{Tokens: least(l.Tokens, other.Tokens), NewTokens: least(l.NewTokens, other.NewTokens),
		Output: least(l.Output, other.Output), Memory: least(l.Memory, other.Memory), Work: least(l.Work, other.Work)}
}

// least is the lower of two limits, of which zero is none.
func least[T int | int64 | float64](a, b T) T {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// Parse reads a request, and looks at what it is to do: see package guard. The bytes may come from anyone,
// and must stay as they are while it is in use.
func Parse(data []byte, l Limits) (*Request, error) {
	f, err := readFile(data)
	if err != nil {
		return nil, err
	}
	text, err := f.text("request")
	if err != nil {
		return nil, err
	}
	if len(text) > mostText {
		return nil, tooLong("the request itself", mostText)
	}
	r := &Request{file: f}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(r); err != nil {
		return nil, malformed("%v", err)
	}
	if err := r.check(l); err != nil {
		return nil, err
	}
	if err := r.readPrograms(); err != nil {
		return nil, err
	}
	if err := r.checkPlaces(); err != nil {
		return nil, err
	}
	tokens := r.Tokens()
	if l.Tokens > 0 && tokens > l.Tokens {
		return nil, fault.New(fault.Remote, "the request has %d tokens, and this server takes %d at once", tokens, l.Tokens).
			WithHint("Split it into several.")
	}
	return r, nil
}

func (r *Request) check(l Limits) error {
	switch {
	case r.Version != version:
		return malformed("it is of version %d, and this is version %d", r.Version, version)
	case r.Kind == Trace && len(r.Steps) != 1:
		return malformed("a trace has one step, and not %d", len(r.Steps))
	case r.Kind != Trace && r.Kind != Generate && r.Kind != Session:
		return malformed("there is no kind %q", r.Kind)
	case len(r.Steps) == 0 || len(r.Steps) > MaxSteps:
		return malformed("it has %d steps", len(r.Steps))
	case r.Kind == Session && len(r.Steps) > MaxTraces:
		return malformed("a session of %d traces is more than the %d that go into one", len(r.Steps), MaxTraces)
	case r.Kind == Session && slices.ContainsFunc(r.Steps, func(s Step) bool { return !s.End }):
		return malformed("a trace of a session has no end")
	case r.Kind == Generate && (r.Prompt == nil || r.Settings == nil):
		return malformed("a generation has a prompt and settings")
	case r.Kind == Generate && r.Settings.Sample && r.Random == "":
		return malformed("a generation that draws sends the state of its generator")
	}
	if r.Kind == Generate {
		s := r.Settings
		if l.NewTokens > 0 && s.MaxNewTokens > l.NewTokens {
			return fault.New(fault.Remote, "%d new tokens were asked for, and this server gives %d at once", s.MaxNewTokens, l.NewTokens)
		}
		if s.MaxNewTokens < 1 || s.MaxNewTokens > graph.MaxTokens { // what it takes is counted by them
			return fault.New(fault.Input, "%d new tokens were asked for", s.MaxNewTokens).WithHint("Ask for at least one, and no more than the model's context holds.")
		}
		if most := 1024; s.Returned > most || s.Beams > most {
			return fault.New(fault.Remote, "%d rows of each prompt were asked for, and a server gives %d", max(s.Returned, s.Beams), most)
		}
		for i := range r.Steps {
			s, followed := &r.Steps[i], i < len(r.Steps)-1
			switch {
			case followed && !s.End:
				return malformed("step %d has no end, and others follow it", i)
			case followed && s.Scores == "" && slices.Contains(s.Want, WantScores):
				return malformed("the tokens of step %d wait for scores, and others follow it", i)
			case s.Random != "" && r.Random == "":
				return malformed("step %d sends a state of the generator, and the request none", i)
			}
		}
	}
	return nil
}

// readPrograms reads the programs of all steps. Steps of the same one share it: a loop says the same at each.
func (r *Request) readPrograms() error {
	known, size := map[string]program{}, 0
	for i := range r.Steps {
		s := &r.Steps[i]
		name := fmt.Sprintf("%q", s.Program)
		p, ok := known[name]
		if !ok {
			for _, part := range s.Program {
				size += len(r.file[part].Data)
			}
			if size > mostPrograms {
				return tooLong("what its programs say", mostPrograms)
			}
			var err error
			if p, err = r.program(s); err == nil {
				err = guard.Check(p.graph)
			}
			if err != nil {
				return atStep(err, r.Kind, i)
			}
			known[name] = p
		}
		r.programs = append(r.programs, p)
	}
	return nil
}

func tooLong(what string, most int) error {
	return fault.New(fault.Remote, "%s takes more than the %d bytes that this server reads at once", what, most).
		WithHint("Split it into several.")
}

// program reads the graph of a step.
func (r *Request) program(s *Step) (p program, err error) {
	p.graph = &graph.Graph{Nodes: []graph.Node{}, Invokes: []graph.Invoke{}, Positions: []fault.Pos{}}
	for _, name := range s.Program {
		data, err := r.file.text(name)
		if err != nil {
			return p, err
		}
		if len(s.Program) == 1 {
			p.whole = data
		}
		p.last = graph.ID(len(p.graph.Nodes))
		if err := graph.DecodeMore(p.graph, data); err != nil {
			return p, err
		}
	}
	p.graph.Nodes = slices.Clip(p.graph.Nodes) // a run adds its own behind them
	return p, nil
}

// atStep notes the step of a generation, or the trace of a session, that an error is of.
func atStep(err error, kind string, step int) error {
	e := fault.As(err)
	if kind != Trace {
		e.Step = step
	}
	return e
}
