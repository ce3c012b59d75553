package gen

import (
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
	case g.beams != nil || o.beams != nil || g.settings.Sample || o.settings.Sample:
		return fault.New(fault.Internal, "generations that search or draw go alone")
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
