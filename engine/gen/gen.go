// Package gen generates text: it draws token after token from what a model says.
//
// Phases: [New] takes the prompts and settings; each step is a run ([Generation.Begin], or
// [Generation.Plain] without a program), and then [Generation.Next] draws its tokens. Settings mean what
// they mean in transformers' generate, and the scores are changed in the same order. A [Generation]
// belongs to one goroutine at a time and is freed by its owner.
package gen

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
)

// Settings say how tokens are drawn. Zero values of the filters leave scores as they are.
type Settings struct {
	MaxNewTokens  int     `json:"max_new_tokens"`
	MinNewTokens  int     `json:"min_new_tokens"`
	EOS           []int64 `json:"eos_token_id"` // a row ends with one of these
	Pad           int64   `json:"pad_token_id"` // what rows that have ended go on with
	Sample        bool    `json:"do_sample"`
	Temperature   float64 `json:"temperature"`
	TopK          int64   `json:"top_k"`
	TopP          float64 `json:"top_p"`
	MinP          float64 `json:"min_p"`
	TypicalP      float64 `json:"typical_p"`
	Repetition    float64 `json:"repetition_penalty"`
	NoRepeatNgram int     `json:"no_repeat_ngram_size"`
	Returned      int     `json:"num_return_sequences"` // rows of each prompt, side by side; 0 is 1
	Beams         int     `json:"num_beams"`            // more than 1: beam search, with so many rows of each prompt
	LengthPenalty float64 `json:"length_penalty"`       // the power of a length that scores of beams are divided by
	EarlyStopping string  `json:"early_stopping"`       // "true", "false" or "never", as transformers has it
}

// Generation is a batch of rows that grow.
type Generation struct {
	cache    *host.Cache
	settings Settings
	rows     [][]int64 // all tokens so far, padding on the left included
	lead     []int     // tokens of padding, and others that a mask leaves out, before each prompt
	prompt   int       // tokens of a prompt, padding included
	ended    []bool
	step     int
	begun    []int // by row: the step that was its first one
	last     int   // the step before which all rows have the tokens that were asked for
	vocab    int64 // scores of a row, once [Generation.Scores] gave some that wait for [Generation.Choose]
	done     bool
	beams    *beams   // of a beam search
	draws    []*Draws // of all rows, in their order, where they have generators of their own
}

// New begins a generation. Rows of different lengths are padded on the left.
func New(m *host.Native, rows, masks [][]int64, s Settings) (*Generation, error) {
	if s.MaxNewTokens < 1 {
		return nil, fault.New(fault.Input, "%d new tokens were asked for", s.MaxNewTokens).WithHint("Ask for at least one.")
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	rows, masks = repeated(rows, max(s.Returned, s.Beams)), repeated(masks, max(s.Returned, s.Beams))
	cache, err := m.NewCache(rows, masks, s.MaxNewTokens)
	if err != nil {
		return nil, err
	}
	g := &Generation{cache: cache, settings: s, ended: make([]bool, len(rows)),
		begun: make([]int, len(rows)), last: s.MaxNewTokens}
	if s.Beams > 1 {
		g.beams = newBeams(s.Beams, len(rows)/s.Beams)
	}
	for _, row := range rows {
		g.prompt = max(g.prompt, len(row))
	}
	for r, row := range rows {
		lead := g.prompt - len(row)
		for i := 0; masks != nil && i < len(row) && masks[r][i] == 0; i++ {
			lead++
		}
		g.lead = append(g.lead, lead)
	}
	g.rows = padded(rows, g.prompt, s)
	return g, nil
}

// Padded gives the rows that a generation of prompts begins with, padding on the left included.
func Padded(prompts [][]int64, s Settings) [][]int64 {
	longest := 0
	for _, row := range prompts {
		longest = max(longest, len(row))
	}
	return padded(repeated(prompts, max(s.Returned, s.Beams)), longest, s)
}

func padded(rows [][]int64, length int, s Settings) (out [][]int64) {
	for _, row := range rows {
		all := make([]int64, length-len(row), length+max(s.MaxNewTokens, 0))
		for i := range all {
			all[i] = s.Pad
		}
		out = append(out, append(all, row...))
	}
	return out
}

// Ended tells which rows have ended.
func (g *Generation) Ended() []bool { return g.ended }

// Begin starts the next step with a program: see [host.Cache.Begin].
func (g *Generation) Begin(program *graph.Graph, consts []aten.Tensor, end bool) (*host.Run, error) {
	if g.done {
		aten.FreeAll(consts)
		return nil, fault.New(fault.Handle, "this generation has ended")
	}
	return g.cache.Begin(program, consts, end)
}

// BeginParts starts the next step with a program of several, who have so many rows each: see [host.Cache.BeginParts].
func (g *Generation) BeginParts(program *graph.Graph, rows []int, consts []aten.Tensor) (*host.Run, error) {
	if g.done {
		aten.FreeAll(consts)
		return nil, fault.New(fault.Handle, "this generation has ended")
	}
	return g.cache.BeginParts(program, rows, consts)
}

// Plain does a step without a program, up to its tokens.
func (g *Generation) Plain() ([]int64, error) {
	run, err := g.Begin(&graph.Graph{}, nil, true)
	if err != nil {
		return nil, err
	}
	defer run.Free()
	if _, err := run.Step(0); err != nil {
		return nil, err
	}
	if _, _, err := run.Results(); err != nil {
		return nil, err
	}
	return g.Next()
}

// Next draws the tokens of the step that is done, one a row, and makes ready for the next step.
func (g *Generation) Next() ([]int64, error) {
	t, err := g.Scores()
	if err != nil {
		return nil, err
	}
	defer t.Free()
	tokens, filtered, err := g.Choose(t)
	if err == nil {
		filtered.Free()
	}
	return tokens, err
}

// Scores is the first half of [Generation.Next]: it gives the scores [batch, vocab] of the step that is
// done, in float32, with penalties and bans applied. They are the caller's, who may change them.
func (g *Generation) Scores() (aten.Tensor, error) {
	logits, err := g.cache.TakeLogits()
	if err != nil {
		return aten.Tensor{}, err
	}
	defer logits.Free()
	t, err := g.scored(logits)
	if err == nil {
		g.vocab = t.Shape()[1]
	}
	return t, err
}

// Choose is the second half: it draws tokens from scores, which stay the caller's, and also gives what
// the filters left of them, which becomes the caller's.
func (g *Generation) Choose(given aten.Tensor) ([]int64, aten.Tensor, error) {
	if g.vocab == 0 {
		return nil, aten.Tensor{}, fault.New(fault.Handle, "no scores were asked for").WithHint("Ask for them first.")
	}
	if want := []int64{int64(len(g.rows)), g.vocab}; !slices.Equal(given.Shape(), want) {
		return nil, aten.Tensor{}, fault.New(fault.Input, "these scores are %v, and those of this step are %v", given.Shape(), want)
	}
	filtered, err := g.filtered(given)
	if err != nil {
		return nil, filtered, err
	}
	var tokens []int64
	if g.beams != nil {
		tokens, err = g.search(filtered)
	} else if tokens, err = g.pick(filtered); err == nil {
		err = g.append(tokens)
	}
	g.vocab = 0
	if err != nil {
		filtered.Free()
		return nil, aten.Tensor{}, err
	}
	return tokens, filtered, nil
}

// append gives each row its token; rows that have ended get padding, where there are tokens that end rows.
func (g *Generation) append(tokens []int64) error {
	g.step++
	all := true
	for r := range tokens {
		if g.ended[r] && len(g.settings.EOS) > 0 {
			tokens[r] = g.settings.Pad
		}
		g.rows[r] = append(g.rows[r], tokens[r])
		g.ended[r] = g.ended[r] || slices.Contains(g.settings.EOS, tokens[r])
		all = all && g.ended[r]
	}
	if g.done = all || g.step >= g.last; g.done {
		return nil
	}
	return g.cache.Append(tokens)
}

// search goes on with a beam search: rows become those that go on, or, at the end, those that it found.
func (g *Generation) search(logProbs aten.Tensor) ([]int64, error) {
	parents, tokens, over, err := g.advance(logProbs)
	if err != nil {
		return nil, err
	}
	g.step++
	rows := make([][]int64, len(parents))
	for r, p := range parents {
		rows[r] = append(slices.Clone(g.rows[p]), tokens[r])
	}
	g.rows = rows
	if g.done = over; over {
		g.rows = g.sequences()
		return tokens, nil
	}
	if err := g.cache.Reorder(parents); err != nil {
		return nil, err
	}
	return tokens, g.cache.Append(tokens)
}

// End ends rows, as one of the tokens that do so would have; others stay as they are.
func (g *Generation) End(rows []bool) error {
	if g.beams != nil {
		return fault.New(fault.Input, "rows of a beam search end by eos_token_id alone")
	}
	if len(rows) != len(g.rows) {
		return fault.New(fault.Input, "%d rows are told to end or not, and there are %d", len(rows), len(g.rows))
	}
	for r, end := range rows {
		g.ended[r] = g.ended[r] || end
	}
	g.done = g.done || !slices.Contains(g.ended, false)
	return nil
}

// repeated gives each row so many times, side by side.
func repeated(rows [][]int64, times int) [][]int64 {
	if rows == nil || times <= 1 { // there may be no masks
		return rows
	}
	out := make([][]int64, 0, len(rows)*times)
	for _, row := range rows {
		for range times {
			out = append(out, row)
		}
	}
	return out
}

// Done reports whether all rows have ended, or have all tokens that were asked for.
func (g *Generation) Done() bool { return g.done }

// Searches reports whether this is a beam search.
func (g *Generation) Searches() bool { return g.beams != nil }

// Stop ends the generation before its time.
func (g *Generation) Stop() { g.done = true }

// Rows gives all tokens, prompts and padding included. Those of a beam search are its beams until it is
// done, and then the best it found, Returned of each prompt.
func (g *Generation) Rows() [][]int64 { return g.rows }

// Free gives the memory back. It may be called twice.
func (g *Generation) Free() {
	g.done = true
	for _, d := range g.draws {
		d.state.Free()
	}
	g.draws = nil
	g.cache.Free()
}
