package gen

import (
	"cmp"
	"math"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
)

// worst is the score of a beam that is none, as in transformers: its sums are rounded as there.
const worst float32 = -1e9

// beams is the state of a beam search: [width] rows of each prompt that go on, and as many that are the
// best of those which have ended. Numbers are float32 and comparisons those of transformers, so that the
// same beams come out.
type beams struct {
	width   int
	running []float32 // of each row
	prompts []search
}

// search is what belongs to one prompt.
type search struct {
	best []hypothesis // the best first
	open bool         // what goes on may still become better than what has ended
}

// hypothesis is a row with its score. One that has not ended only fills a place.
type hypothesis struct {
	score float32
	row   []int64
	ended bool
}

// candidate is a row of the step's that may go on with a token.
type candidate struct {
	score float32 // the sum of log probabilities
	row   int
	token int64
	ends  bool
}

func newBeams(width, prompts int) *beams {
	b := &beams{width: width, running: make([]float32, prompts*width), prompts: make([]search, prompts)}
	for p := range b.prompts {
		b.prompts[p] = search{best: make([]hypothesis, width), open: true}
		for k := range width {
			b.prompts[p].best[k].score = worst
			if k > 0 {
				b.running[p*width+k] = worst // the rows of a prompt are all the same yet
			}
		}
	}
	return b
}

// advance chooses the rows that go on, from log probabilities [rows, vocab], and notes those that end.
// It tells which row each one was, which token it gets, and whether the search is over.
func (g *Generation) advance(logProbs aten.Tensor) (parents, tokens []int64, over bool, err error) {
	onCPU, err := aten.To(logProbs, "cpu", "float32")
	if err != nil {
		return nil, nil, false, err
	}
	defer onCPU.Free()
	data, err := onCPU.Float32s()
	if err != nil {
		return nil, nil, false, err
	}
	b, o := g.beams, &g.settings
	vocab := len(data) / len(b.running)
	length := g.step + 1 // of what is written with this step's token
	better, unfilled, goesOn := false, false, false
	running := make([]float32, 0, len(b.running))
	for p := range b.prompts {
		s := &b.prompts[p]
		found := b.top(data, p, vocab, max(2, 1+len(o.EOS))*b.width)
		for i := range found {
			c := &found[i]
			c.ends = length >= o.MaxNewTokens || slices.Contains(o.EOS, c.token)
			goesOn = goesOn || !c.ends
		}
		first := running
		for _, c := range leading(found, b.width, func(c candidate) float32 { return c.goingOn() }) {
			running = append(running, c.goingOn())
			parents, tokens = append(parents, int64(c.row)), append(tokens, c.token)
		}
		g.note(s, found, length)
		s.open = s.open && g.improvable(s, running[len(first)], length)
		better = better || s.open
		unfilled = unfilled || slices.ContainsFunc(s.best, func(h hypothesis) bool { return !h.ended })
	}
	b.running = running
	return parents, tokens, !better || !goesOn || (o.EarlyStopping == "true" && !unfilled), nil
}

// top gives the candidates of a prompt with the highest scores, the best first.
func (b *beams) top(data []float32, prompt, vocab, n int) []candidate {
	out := make([]candidate, 0, n+1)
	for k := range b.width {
		r := prompt*b.width + k
		for id, x := range data[r*vocab : (r+1)*vocab] {
			score := x + b.running[r]
			if len(out) == n && !(score > out[n-1].score) {
				continue
			}
			at, _ := slices.BinarySearchFunc(out, score, func(c candidate, score float32) int {
				if c.score >= score {
					return -1
				}
				return 1
			})
			out = slices.Insert(out, at, candidate{score: score, row: r, token: int64(id)})
			out = out[:min(len(out), n)]
		}
	}
	return out
}

// goingOn is the score of a candidate among those that go on, where one that ends comes last.
func (c candidate) goingOn() float32 {
	if c.ends {
		return c.score + worst
	}
	return c.score
}

// note puts the candidates that end among the best, where they belong.
func (g *Generation) note(s *search, found []candidate, length int) {
	full := g.settings.EarlyStopping == "true" && !slices.ContainsFunc(s.best, func(h hypothesis) bool { return !h.ended })
	all := slices.Clone(s.best)
	for i, c := range found {
		h := hypothesis{score: c.score / g.penalty(length), ended: c.ends && i < g.beams.width}
		for _, out := range []bool{full, !s.open, !h.ended} {
			if out {
				h.score += worst
			}
		}
		if h.ended {
			h.row = append(slices.Clone(g.rows[c.row]), c.token)
		}
		all = append(all, h)
	}
	s.best = leading(all, g.beams.width, func(h hypothesis) float32 { return h.score })
}

// improvable tells whether the best row that goes on may become better than the worst that has ended.
func (g *Generation) improvable(s *search, running float32, length int) bool {
	if g.settings.EarlyStopping == "never" && g.settings.LengthPenalty > 0 {
		length = g.settings.MaxNewTokens
	}
	possible, least := running/g.penalty(length), s.best[len(s.best)-1].score
	return slices.ContainsFunc(s.best, func(h hypothesis) bool { return possible > least || !h.ended && possible > worst })
}

// penalty is what scores of rows with so many new tokens are divided by.
func (g *Generation) penalty(length int) float32 {
	return float32(math.Pow(float64(length), g.settings.LengthPenalty))
}

// leading gives the n items with the highest keys, the highest first.
func leading[T any](items []T, n int, key func(T) float32) []T {
	out := slices.Clone(items)
	slices.SortStableFunc(out, func(a, b T) int { return cmp.Compare(key(b), key(a)) })
	return out[:n]
}

// sequences gives the rows that the search found, as many of each prompt as were asked for, filled up to
// the same length.
func (g *Generation) sequences() [][]int64 {
	var out [][]int64
	length := 0
	for _, s := range g.beams.prompts {
		for _, h := range s.best[:max(1, g.settings.Returned)] {
			out = append(out, h.row)
			length = max(length, len(h.row))
		}
	}
	fill := g.settings.Pad
	if fill == 0 && len(g.settings.EOS) > 0 { // transformers takes a padding of 0 for none
		fill = g.settings.EOS[0]
	}
	for r := range out {
		for len(out[r]) < length {
			out[r] = append(out[r], fill)
		}
	}
	return out
}
