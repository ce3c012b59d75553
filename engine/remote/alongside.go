package remote

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
)

// alongside is the company of generations: all that decides about a token but how many there are.
type alongside struct{ settings string }

// company is that of a generation to whose end a request goes, without a program and without chance: its rows
// grow as they do alone, beside whatever others.
func (r *Request) company() any {
	s := *r.Settings
	rows := len(r.Prompt.Rows)
	if rows == 0 || r.Prompt.Masks != nil && len(r.Prompt.Masks) != rows {
		return nil // an error of its own
	}
	if s.Sample || s.Beams > 1 || s.Returned > 1 || r.Random != "" || len(r.Steps) < s.MaxNewTokens || s.MaxNewTokens < 1 {
		return nil
	}
	for i := range r.Steps {
		step := &r.Steps[i]
		if !step.End || len(r.programs[i].graph.Nodes) > 0 || step.Scores != "" || step.Ended != nil {
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
	first, rows int // its rows in the batch
	done        bool
}

// generateTogether runs generations of one company, each until it is done, in the same steps.
func (p *Performer) generateTogether(ctx context.Context, requests []*Request) (out [][]byte, err error) {
	settings := *requests[0].Settings
	var all []*grown
	var rows, masks [][]int64
	masked := false
	for _, r := range requests {
		g := &grown{performing: p.begin(ctx, r), first: len(rows), rows: len(r.Prompt.Rows)}
		if err := g.affordable(0); err != nil {
			return nil, err
		}
		all = append(all, g)
		settings.MaxNewTokens = max(settings.MaxNewTokens, r.Settings.MaxNewTokens)
		rows = append(rows, r.Prompt.Rows...)
		for i, row := range r.Prompt.Rows {
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
	batch, err := gen.New(p.Model, rows, masks, settings)
	if err != nil {
		return nil, err
	}
	defer batch.Free()
	for step, open := 0, len(all); open > 0; step++ {
		if ctx.Err() != nil {
			return nil, cancelled(ctx)
		}
		tokens, err := batch.Plain()
		if err != nil {
			return nil, err
		}
		for _, g := range all {
			if g.done {
				continue
			}
			over := !slices.Contains(batch.Ended()[g.first:g.first+g.rows], false)
			if err := g.take(step, tokens[g.first:g.first+g.rows], over); err != nil {
				return nil, err
			}
			if g.done {
				open--
			}
		}
		if open > 0 && batch.Done() {
			return nil, fault.New(fault.Internal, "a batch of generations ended before one of them")
		}
	}
	for _, g := range all {
		file, err := g.file()
		if err != nil {
			return nil, err
		}
		out = append(out, file)
	}
	return out, nil
}

// take notes what a step has drawn for it, and whether all of its rows have ended.
func (g *grown) take(number int, tokens []int64, over bool) error {
	s := &g.request.Steps[number]
	g.done = over || number+1 >= g.request.Settings.MaxNewTokens
	if len(s.Want) == 0 {
		return nil
	}
	step, err := g.answer(nil, nil, s)
	if err != nil {
		return err
	}
	step.Step = number
	if slices.Contains(s.Want, WantDrawn) {
		step.Drawn = &Drawn{Tokens: slices.Clone(tokens), Done: g.done}
	}
	g.response.Steps = append(g.response.Steps, step)
	return nil
}
