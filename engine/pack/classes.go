package pack

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// token is the number of a token in a batch of rows: row*toks + position.
type token = int32

// space is a batch of rows of tokens: that of a forward pass, or the part of it that an invoke sees.
type space struct {
	rows, toks int
	of         int    // the forward pass
	real       []bool // by token: it is not padding; nil where all are
	attended   map[[3]*classes]*classes
}

func (s *space) size() int { return s.rows * s.toks }

func (s *space) isReal(t token) bool { return s.real == nil || s.real[t] }

// classes are the tokens of an activation that have the same value. A class has a number, those of first tokens
// that come earlier are smaller.
type classes struct {
	of    []int32 // by token
	first []token // by class: the first of its tokens
}

// number makes classes of keys: tokens with the same key belong together.
func number[K comparable](n int, key func(token) K) *classes {
	c := &classes{of: make([]int32, n)}
	known := make(map[K]int32, n)
	for t := range n {
		k := key(token(t))
		class, ok := known[k]
		if !ok {
			class = int32(len(c.first))
			known[k] = class
			c.first = append(c.first, token(t))
		}
		c.of[t] = class
	}
	return c
}

// distinct are classes of a token each.
func distinct(n int) *classes {
	c := &classes{of: make([]int32, n), first: make([]token, n)}
	for t := range n {
		c.of[t], c.first[t] = int32(t), token(t)
	}
	return c
}

// begin are the classes of what stands in a forward pass before it computes: token ids at positions. That all
// later classes tell positions apart follows from it.
func begin(f *plan.Forward, s *space) *classes {
	type key struct {
		id, position  int64
		real, padding bool // padding is no token of any prompt
	}
	keys := make([]key, s.size())
	for r, row := range f.Rows {
		pad := 0
		if f.Masked {
			pad = s.toks - len(row)
		}
		next := int64(0)
		for p := range s.toks {
			t := token(r*s.toks + p)
			k := key{position: next, real: s.isReal(t), padding: p < pad || p-pad >= len(row)}
			if !k.padding {
				k.id = row[p-pad]
			}
			switch {
			case !f.Masked:
				k.position = int64(p)
			case k.real:
				next++
			default:
				k.position = max(next-1, 0)
			}
			keys[t] = k
		}
	}
	return number(len(keys), func(t token) key { return keys[t] })
}

// realTokens says which tokens of a forward pass are not padding, or are masked by the user. Padding on the right
// is no matter: nobody looks back at it.
func realTokens(f *plan.Forward, toks int) []bool {
	if !f.Masked {
		return nil
	}
	real := make([]bool, len(f.Rows)*toks)
	for r, row := range f.Rows {
		at := r*toks + toks - len(row)
		for i := range row {
			real[at+i] = f.Masks[r] == nil || f.Masks[r][i] != 0
		}
	}
	return real
}

// join are the classes of what depends on both.
func join(a, b *classes) *classes {
	if a == b || b == nil {
		return a
	}
	if a == nil {
		return b
	}
	return number(len(a.of), func(t token) [2]int32 { return [2]int32{a.of[t], b.of[t]} })
}

// split takes tokens out of their classes: each has a value of its own.
func (c *classes) split(tokens []token) *classes {
	alone := make([]bool, len(c.of))
	for _, t := range tokens {
		alone[t] = true
	}
	return c.renumbered(len(c.of), func(t token) (int32, bool) { return c.of[t], !alone[t] })
}

// part are the classes of some of the tokens, counted anew.
func (c *classes) part(tokens []token) *classes {
	return c.renumbered(len(tokens), func(t token) (int32, bool) { return c.of[tokens[t]], true })
}

// renumbered are classes of n tokens, each of an old class or alone.
func (c *classes) renumbered(n int, old func(token) (int32, bool)) *classes {
	out := &classes{of: make([]int32, n), first: make([]token, 0, min(n, len(c.first)+8))}
	known := make([]int32, len(c.first)) // by old class: its new number, counted from 1
	for t := range token(n) {
		class, shared := old(t)
		if shared && known[class] > 0 {
			out.of[t] = known[class] - 1
			continue
		}
		out.of[t] = int32(len(out.first))
		out.first = append(out.first, t)
		if shared {
			known[class] = out.of[t] + 1
		}
	}
	return out
}

// attend are the classes of what attention gives: it depends on the query, and on the keys and values of the token
// and of those before it.
func (s *space) attend(q, k, v *classes) *classes {
	known := [3]*classes{q, k, v}
	if c := s.attended[known]; c != nil {
		return c
	}
	type step struct{ before, k, v int32 }
	states := map[step]int32{}
	type key struct{ step, q int32 }
	keys := make([]key, s.size())
	for r := range s.rows {
		before := int32(0)
		for p := range s.toks {
			t := token(r*s.toks + p)
			at := step{before, k.of[t], v.of[t]}
			state, ok := states[at]
			if !ok {
				state = int32(len(states) + 1)
				states[at] = state
			}
			keys[t] = key{state, q.of[t]}
			if s.isReal(t) {
				before = state
			}
		}
	}
	c := number(len(keys), func(t token) key { return keys[t] })
	if s.attended == nil {
		s.attended = map[[3]*classes]*classes{}
	}
	s.attended[known] = c
	return c
}

// seen are the tokens that a query looks at, in order: those before it that are no padding, and itself.
func (s *space) seen(t token) []token {
	var out []token
	for u := t - t%token(s.toks); u < t; u++ {
		if s.isReal(u) {
			out = append(out, u)
		}
	}
	return append(out, t)
}

// all are the tokens of a space.
func (s *space) all() []token {
	return s.within(span{hi: s.toks})
}

// within are the tokens of a span, row by row.
func (s *space) within(sp span) []token {
	out := make([]token, 0, s.rows*(sp.hi-sp.lo))
	for r := range s.rows {
		for p := sp.lo; p < sp.hi; p++ {
			out = append(out, token(r*s.toks+p))
		}
	}
	return out
}

// window is the part of a space that an invoke sees, and the tokens it consists of.
func (s *space) window(w *plan.Window) (*space, []token) {
	part := &space{rows: s.rows, toks: s.toks, of: s.of}
	row, tok := 0, 0
	if w.BatchAxis >= 0 {
		row, part.rows = int(w.Row), int(w.Rows)
	}
	if len(w.SeqAxes) > 0 {
		tok, part.toks = int(w.Tok), int(w.Toks)
	}
	tokens := make([]token, 0, part.size())
	for r := range part.rows {
		for p := range part.toks {
			tokens = append(tokens, token((row+r)*s.toks+tok+p))
		}
	}
	if s.real != nil {
		real := make([]bool, len(tokens))
		for i, t := range tokens {
			real[i] = s.real[t]
		}
		if slices.Contains(real, false) {
			part.real = real
		}
	}
	return part, tokens
}
