package remote

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Draft is a request that a client writes: step by step, and it may be sent after each.
type Draft struct {
	Request
	writer Writer
}

// NewDraft begins a request, of kind [Trace] or [Generate], to a model.
func NewDraft(model, kind string) *Draft {
	return &Draft{Request: Request{Version: version, Model: model, Kind: kind, Steps: []Step{}}}
}

// Step adds a step, whose program is complete, and says what of it is to come back: of the steps before, nothing
// comes any more. The constants stay the caller's.
func (d *Draft) Step(g *graph.Graph, consts []aten.Tensor, want ...string) error {
	for i := range d.Steps {
		d.Steps[i].Want = []string{}
	}
	program := fmt.Sprintf("program.%d", len(d.Steps))
	d.writer.Bytes(program, graph.Encode(g))
	s := Step{Program: []string{program}, Constants: []Constant{}, End: true, Want: want}
	for _, c := range consts {
		name, err := d.writer.Add(c)
		if err != nil {
			return err
		}
		s.Constants = append(s.Constants, Constant{Tensor: name, Grad: c.RequiresGrad()})
	}
	d.Steps = append(d.Steps, s)
	return nil
}

// Draw notes the state of the generator that the tokens of a step, and those after it, are drawn from.
func (d *Draft) Draw(step int, state aten.Tensor) (err error) {
	random := &d.Random
	if step > 0 {
		random = &d.Steps[step].Random
	}
	*random, err = d.writer.Add(state)
	return err
}

// File gives the request as it travels.
func (d *Draft) File() ([]byte, error) {
	text, err := json.Marshal(&d.Request)
	if err != nil {
		return nil, err
	}
	whole := Writer{slices.Clone(d.writer.entries)}
	whole.Bytes("request", text)
	return whole.File()
}

// Answer is a response that a client has got.
type Answer struct {
	Response
	file file
}

// ReadAnswer reads it. The bytes may come from anyone, and must stay as they are while it is in use.
func ReadAnswer(data []byte) (*Answer, error) {
	f, err := readFile(data)
	if err != nil {
		return nil, garbled(err)
	}
	text, err := f.text("response")
	if err != nil {
		return nil, garbled(err)
	}
	a := &Answer{file: f}
	if err := json.Unmarshal(text, &a.Response); err != nil {
		return nil, garbled(err)
	}
	if a.Version != version {
		return nil, garbled(fmt.Errorf("it is of version %d, and this is version %d", a.Version, version))
	}
	return a, nil
}

// Results gives what the save nodes of a step came to, and the tensors that they number, which are the caller's.
func (a *Answer) Results(s *StepResult) (results []graph.Result, tensors []aten.Tensor, err error) {
	data, err := a.file.text(s.Results)
	if err != nil {
		return nil, nil, garbled(err)
	}
	if results, err = graph.DecodeResults(data, len(s.Tensors)); err != nil {
		return nil, nil, garbled(err)
	}
	for _, name := range s.Tensors {
		t, err := a.file.tensor(name)
		if err != nil {
			aten.FreeAll(tensors)
			return nil, nil, garbled(err)
		}
		tensors = append(tensors, t)
	}
	return results, tensors, nil
}

// State gives the state of the generator afterwards, which is the caller's; the zero Tensor where none was sent.
func (a *Answer) State() (t aten.Tensor, err error) {
	if a.Random == "" {
		return t, nil
	}
	if t, err = a.file.tensor(a.Random); err != nil {
		return t, garbled(err)
	}
	return t, nil
}

// garbled is the error of a response that makes no sense.
func garbled(err error) error {
	return fault.New(fault.Remote, "the server's answer cannot be read: %v", err).
		WithHint(sameVersion)
}
