package gen

import (
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Generations of the same settings, but for the number of tokens, may go on in the same steps: one joins another between
// two steps, and rows leave when nobody waits for their tokens any more. Each row counts its own steps.

// Unpadded makes a row what it is without so much of the padding before it: that of a batch with others is not its own.
func (g *Generation) Unpadded(row, padding int) {
	g.rows[row], g.lead[row] = g.rows[row][padding:], g.lead[row]-padding
}

// Join takes over the rows of another generation, which come behind those that there are, and ends it. Both are between two
// steps. Where it fails both are as they were.
func (g *Generation) Join(o *Generation) error {
	switch {
	case g.beams != nil || o.beams != nil || g.settings.Sample && (g.draws == nil || o.draws == nil):
		return fault.New(fault.Internal, "generations that search, or draw from a generator that is not theirs, go alone")
	case g.done || o.done || g.vocab != 0 || o.vocab != 0:
		return fault.New(fault.Internal, "generations join between two steps")
	}
	if err := g.cache.Join(o.cache); err != nil {
		return err
	}
	g.rows, g.lead, g.ended = append(g.rows, o.rows...), append(g.lead, o.lead...), append(g.ended, o.ended...)
	for _, begun := range o.begun {
		g.begun = append(g.begun, g.step-(o.step-begun))
	}
	g.last = max(g.last, g.step+o.last-o.step)
	g.draws, o.draws = append(g.draws, o.draws...), nil
	o.Free()
	return nil
}

// Keep drops all rows but these. It comes between two steps.
func (g *Generation) Keep(rows []int) error {
	if g.done || g.vocab != 0 {
		return fault.New(fault.Internal, "rows leave between two steps")
	}
	if err := g.cache.Keep(rows); err != nil {
		return err
	}
	g.keepDraws(rows)
	g.rows, g.lead, g.ended, g.begun = chosen(g.rows, rows), chosen(g.lead, rows), chosen(g.ended, rows), chosen(g.begun, rows)
	return nil
}

func chosen[T any](all []T, rows []int) []T {
	out := make([]T, len(rows))
	for i, r := range rows {
		out[i] = all[r]
	}
	return out
}

// Draws are those of rows that have one generator together: its state is theirs from step to step, whatever is drawn for
// others meanwhile.
type Draws struct {
	rows   int
	state  aten.Tensor
	failed error
}

// DrawFrom gives so many rows, those behind the ones that have one, a generator in that state, which it takes over. All rows
// have one before the first step, or none has.
func (g *Generation) DrawFrom(rows int, state aten.Tensor) *Draws {
	d := &Draws{rows: rows, state: state}
	g.draws = append(g.draws, d)
	return d
}

// State is the state of the generator now. It stays the generation's, and is there until the rows leave.
func (d *Draws) State() aten.Tensor { return d.state }

// Failed is why nothing could be drawn for the rows, of whose probabilities some are none, or with the state that they were
// given. They leave then: what they have instead of tokens means nothing.
func (d *Draws) Failed() error { return d.failed }

// drawEach draws a token for each row from its probabilities, with the generator of the row. The process's is left as the
// last draw leaves it. Where it fails for some the others have theirs.
func (g *Generation) drawEach(p aten.Tensor) (tokens []int64) {
	row := 0
	for _, d := range g.draws {
		own, err := d.draw(p, row)
		if err != nil {
			d.failed, own = err, make([]int64, d.rows)
		}
		tokens, row = append(tokens, own...), row+d.rows
	}
	return tokens
}

func (d *Draws) draw(p aten.Tensor, row int) ([]int64, error) {
	own, err := aten.Narrow(p, 0, int64(row), int64(d.rows))
	if err != nil {
		return nil, err
	}
	defer own.Free()
	if err := aten.SetRandomState("cpu", d.state); err != nil {
		return nil, err
	}
	out, err := call("aten::multinomial", aten.TensorValue(own), aten.IntValue(1))
	if err != nil {
		return nil, err
	}
	defer out.Free()
	after, err := aten.RandomState("cpu")
	if err != nil {
		return nil, err
	}
	d.state.Free()
	d.state = after
	return out.Int64s()
}

// keepDraws drops the generators whose rows do not stay; those of one generator stay or leave together.
func (g *Generation) keepDraws(rows []int) {
	stays := make([]bool, len(g.rows))
	for _, r := range rows {
		stays[r] = true
	}
	kept, row := g.draws[:0:0], 0
	for _, d := range g.draws {
		if stays[row] {
			kept = append(kept, d)
		} else {
			d.state.Free()
		}
		row += d.rows
	}
	g.draws = kept
}
