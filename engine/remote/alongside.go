package remote

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
)

// alongside is the company of generations: all that decides about a token but how many there are.
type alongside struct{ settings string }

// company is that of a generation to whose end a request goes, without a program: its rows grow as they do alone, beside
// whatever others, and what they draw comes from the request's own generator.
func (r *Request) company() any {
	s := *r.Settings
	rows := len(r.Prompt.Rows)
	if rows == 0 || r.Prompt.Masks != nil && len(r.Prompt.Masks) != rows {
		return nil // an error of its own
	}
	if s.Beams > 1 || s.Returned > 1 || s.Sample != (r.Random != "") || len(r.Steps) < s.MaxNewTokens || s.MaxNewTokens < 1 {
		return nil
	}
	for i := range r.Steps {
		step := &r.Steps[i]
		if !step.End || len(r.programs[i].graph.Nodes) > 0 || step.Scores != "" || step.Ended != nil || step.Random != "" {
			return nil
		}
		for _, want := range step.Want {
			if want != WantResults && want != WantDrawn {
				return nil
			}
		}
	}
	s.MaxNewTokens = 0
	text, err := json.Marshal(s)
	if err != nil {
		return nil
	}
	return alongside{string(text)}
}

// grown is a generation among others.
type grown struct {
	*performing
	rows int // those of it in the batch
	step int // that comes next

	draws *gen.Draws // its generator, where it draws
}

// Alongside is generations of one company that grow in the same steps. Requests join between two steps, and leave when they
// are done or nobody wants them any more. It belongs to one goroutine at a time; free it.
type Alongside struct {
	performer *Performer
	batch     *gen.Generation // nil while there is nobody
	all       []*grown        // in the order of their rows
	grew      []Grown
}

// Grown is a request that is done, and its response.
type Grown struct {
	Request  *Request
	Response []byte
}

// Alongside is one without anybody. All that join keep to the performer's limits.
func (p *Performer) Alongside() *Alongside { return &Alongside{performer: p} }

// Open is how many requests are under way.
func (a *Alongside) Open() int { return len(a.all) }

// Rows is how many rows they have together.
func (a *Alongside) Rows() (n int) {
	for _, g := range a.all {
		n += g.rows
	}
	return n
}

// Grown gives those that are done since it was asked last.
func (a *Alongside) Grown() []Grown {
	out := a.grew
	a.grew = nil
	return out
}

// Free ends all that are under way.
func (a *Alongside) Free() {
	if a.batch != nil {
		a.batch.Free()
	}
	a.batch, a.all = nil, nil
}

// Join does the first step of requests, and lets them go on beside those that are under way. Where it fails none of them
// has joined, and the others go on.
func (a *Alongside) Join(ctx context.Context, requests []*Request) error {
	own := &Alongside{performer: a.performer}
	defer own.Free()
	if err := own.begin(ctx, requests); err != nil {
		return err
	}
	if err := own.Step(ctx); err != nil {
		return err
	}
	if own.batch != nil && a.batch != nil {
		if err := a.batch.Join(own.batch); err != nil {
			return err
		}
	} else if a.batch == nil {
		a.batch = own.batch
	}
	a.all, a.grew = append(a.all, own.all...), append(a.grew, own.grew...)
	own.batch = nil
	return nil
}

// begin makes a batch of requests, padded on the left to be equally long.
func (a *Alongside) begin(ctx context.Context, requests []*Request) (err error) {
	settings := *requests[0].Settings
	var rows, masks [][]int64
	masked, longest := false, 0
	for _, r := range requests {
		g := &grown{performing: a.performer.begin(ctx, r), rows: len(r.Prompt.Rows)}
		if err := g.affordable(0); err != nil {
			return err
		}
		a.all = append(a.all, g)
		settings.MaxNewTokens = max(settings.MaxNewTokens, r.Settings.MaxNewTokens)
		rows = append(rows, r.Prompt.Rows...)
		for i, row := range r.Prompt.Rows {
			longest = max(longest, len(row))
			if r.Prompt.Masks != nil {
				masked = true
				masks = append(masks, r.Prompt.Masks[i])
				continue
			}
			masks = append(masks, slices.Repeat([]int64{1}, len(row)))
		}
	}
	if !masked {
		masks = nil
	}
	if a.batch, err = gen.New(a.performer.Model, rows, masks, settings); err != nil {
		return err
	}
	if settings.Sample {
		if err := a.giveGenerators(); err != nil {
			return err
		}
	}
	row := 0
	for _, r := range requests { // the padding of a request's own rows stays
		own := 0
		for _, prompt := range r.Prompt.Rows {
			own = max(own, len(prompt))
		}
		for range r.Prompt.Rows {
			a.batch.Unpadded(row, longest-own)
			row++
		}
	}
	return nil
}

// giveGenerators gives each request's rows the generator whose state it has sent.
func (a *Alongside) giveGenerators() error {
	for _, g := range a.all {
		state, err := g.request.file.tensor(g.request.Random)
		if err != nil {
			return err
		}
		g.draws = a.batch.DrawFrom(g.rows, state)
	}
	return nil
}

// plain does a step, with the process's generator put back behind it where rows draw from theirs.
func (a *Alongside) plain() ([]int64, error) {
	if a.all[0].draws == nil {
		return a.batch.Plain()
	}
	generator.Lock()
	defer generator.Unlock()
	before, err := aten.RandomState("cpu")
	if err != nil {
		return nil, err
	}
	defer before.Free()
	tokens, err := a.batch.Plain()
	if again := aten.SetRandomState("cpu", before); err == nil {
		err = again
	}
	return tokens, err
}

// Step does the next step of all. Where it fails they have ended, and none is done.
func (a *Alongside) Step(ctx context.Context) error {
	if ctx.Err() != nil {
		return cancelled(ctx)
	}
	tokens, err := a.plain()
	if err != nil {
		return err
	}
	ended := a.batch.Ended()
	return a.leave(func(g *grown, rows []int) (bool, error) {
		own := make([]int64, len(rows))
		over := true
		for i, r := range rows {
			own[i], over = tokens[r], over && ended[r]
		}
		done, err := g.take(own, over)
		if err != nil || !done {
			return false, err
		}
		response, err := g.told()
		a.grew = append(a.grew, Grown{g.request, response})
		return true, err
	})
}

// told is the response, with the state that its generator is in by now.
func (g *grown) told() ([]byte, error) {
	if g.draws == nil {
		return g.file()
	}
	return g.fileWith(g.draws.State())
}

// Leave ends a request before it is done.
func (a *Alongside) Leave(r *Request) error {
	return a.leave(func(g *grown, _ []int) (bool, error) { return g.request == r, nil })
}

// leave lets those go of which f says so, which is told their rows.
func (a *Alongside) leave(f func(g *grown, rows []int) (bool, error)) error {
	var stay []*grown
	var keep []int
	row := 0
	for _, g := range a.all {
		var rows []int
		for range g.rows {
			rows = append(rows, row)
			row++
		}
		gone, err := f(g, rows)
		if err != nil {
			return err
		}
		if !gone {
			stay, keep = append(stay, g), append(keep, rows...)
		}
	}
	switch {
	case len(stay) == 0:
		a.Free()
		return nil
	case len(stay) == len(a.all):
	case a.batch.Done():
		return fault.New(fault.Internal, "a batch of generations ended before one of them")
	default:
		if err := a.batch.Keep(keep); err != nil {
			return err
		}
	}
	a.all = stay
	return nil
}

// generateTogether runs generations of one company, each until it is done, in the same steps.
func (p *Performer) generateTogether(ctx context.Context, requests []*Request) ([][]byte, error) {
	a := p.Alongside()
	defer a.Free()
	err := a.Join(ctx, requests)
	for err == nil && a.Open() > 0 {
		err = a.Step(ctx)
	}
	if err != nil {
		return nil, err
	}
	out := make([][]byte, len(requests))
	for _, done := range a.Grown() {
		out[slices.Index(requests, done.Request)] = done.Response
	}
	return out, nil
}

// take notes what a step has drawn for it, and reports whether it is done: it has all tokens, or all of its rows have ended.
func (g *grown) take(tokens []int64, over bool) (done bool, err error) {
	number := g.step
	s := &g.request.Steps[number]
	g.step++
	done = over || g.step >= g.request.Settings.MaxNewTokens
	if len(s.Want) == 0 {
		return done, nil
	}
	step, err := g.answer(nil, nil, s)
	if err != nil {
		return done, err
	}
	step.Step = number
	if slices.Contains(s.Want, WantDrawn) {
		step.Drawn = &Drawn{Tokens: tokens, Done: done}
	}
	g.response.Steps = append(g.response.Steps, step)
	return done, nil
}
