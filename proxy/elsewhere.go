package proxy

import (
	"bytes"
	"context"
	"crypto/rand"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/remote"
)

// atOnce is how many steps go in one request where nothing of this program stands between them.
const atOnce = 64

// elsewhere is a generation that runs on a server. Each request has all steps so far; the server keeps the
// generation from one to the next, and begins anew where it has not.
type elsewhere struct {
	*Generation
	model *RemoteModel
	draft *remote.Draft
	rows  [][]int64
	state []byte // of the generator, as the last answer left it
	done  bool
	step  int
}

// runThere does what Run says.
func (g *Generation) runThere(ctx context.Context, m *RemoteModel) ([][]int64, error) {
	e := &elsewhere{Generation: g, model: m, draft: remote.NewDraft(m.name, remote.Generate), rows: gen.Padded(g.rows, g.settings)}
	e.draft.Prompt = &remote.Prompt{Rows: g.rows}
	e.draft.Settings, e.draft.Chain = &g.settings, rand.Text()
	for !e.done {
		if err := e.advance(ctx); err != nil {
			return nil, err
		}
	}
	return e.rows, nil
}

// advance sends the next step, or several, and takes what came of them.
func (e *elsewhere) advance(ctx context.Context) error {
	count := 1
	if len(e.each) == 0 && len(e.after) == 0 {
		count = min(atOnce, max(1, e.settings.MaxNewTokens-e.step))
	}
	var trace *Trace
	var step *Step
	first := e.step
	for i := range count {
		trace = New(e.model)
		step = &Step{Invoke: trace.invoke(graph.Invoke{}), Number: first + i}
		for _, record := range e.each {
			record(step)
		}
		if err := trace.begin(); err != nil {
			return atStep(err, step.Number)
		}
		if err := trace.write(e.draft, remote.WantResults, remote.WantDrawn); err != nil {
			return err
		}
	}
	for i := first; i < first+count; i++ { // of which the draft has made the earlier ones silent
		e.draft.Steps[i].Want = []string{remote.WantResults, remote.WantDrawn}
	}
	if err := e.draws(); err != nil {
		return err
	}
	request, err := e.draft.File()
	if err != nil {
		return err
	}
	answer, err := e.model.server.perform(ctx, request)
	if err != nil {
		return err
	}
	if len(answer.Steps) == 0 {
		return fault.New(fault.Remote, "the server's answer cannot be read: it has no steps")
	}
	for i := range answer.Steps {
		s := &answer.Steps[i]
		if err := e.takeDrawn(s); err != nil {
			return err
		}
		if count == 1 {
			if err := trace.takeStep(answer, s); err != nil {
				return err
			}
			step.tokens, step.done = slices.Clone(s.Drawn.Tokens), e.done
		}
	}
	if err := e.keepState(answer); err != nil {
		return err
	}
	for _, look := range e.after {
		if err := look(step); err != nil {
			return err
		}
	}
	return nil
}

// takeDrawn gives rows their tokens.
func (e *elsewhere) takeDrawn(s *remote.StepResult) error {
	d := s.Drawn
	if d == nil || len(d.Tokens) != len(e.rows) && d.Rows == nil {
		return fault.New(fault.Remote, "the server's answer cannot be read: step %d has no tokens", s.Step)
	}
	e.done, e.step = d.Done, e.step+1
	if d.Rows != nil {
		e.rows = d.Rows
		return nil
	}
	for r, token := range d.Tokens {
		e.rows[r] = append(e.rows[r], token)
	}
	return nil
}

// draws sends the generator's state with the first step and where the program has drawn from it since the last one, if
// there is anything to draw.
func (e *elsewhere) draws() error {
	if !e.settings.Sample {
		return nil
	}
	state, err := aten.RandomState("cpu")
	if err != nil {
		return err
	}
	defer state.Free()
	now, err := state.AppendBytes(nil)
	if err != nil || bytes.Equal(now, e.state) {
		return err
	}
	return e.draft.Draw(e.step, state)
}

// keepState leaves the generator here as the answer says.
func (e *elsewhere) keepState(answer *remote.Answer) error {
	state, err := answer.State()
	if err != nil || state.IsZero() {
		return err
	}
	defer state.Free()
	if e.state, err = state.AppendBytes(nil); err != nil {
		return err
	}
	return aten.SetRandomState("cpu", state)
}

func atStep(err error, number int) error {
	fault.As(err).Step = number
	return err
}
