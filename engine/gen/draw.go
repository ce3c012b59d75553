package gen

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// check refuses settings that mean nothing.
func (s *Settings) check() error {
	bad := func(name string, value, low, high any) error {
		return fault.New(fault.Input, "%s is %v, which is not between %v and %v", name, value, low, high)
	}
	switch {
	case s.Temperature < 0:
		return bad("temperature", s.Temperature, 0, "infinity").(*fault.Error).WithHint("0 leaves scores as they are.")
	case s.TopK < 0:
		return bad("top_k", s.TopK, 0, "the vocabulary")
	case s.TopP < 0 || s.TopP > 1:
		return bad("top_p", s.TopP, 0, 1)
	case s.MinP < 0 || s.MinP > 1:
		return bad("min_p", s.MinP, 0, 1)
	case s.TypicalP < 0 || s.TypicalP > 1:
		return bad("typical_p", s.TypicalP, 0, 1)
	case s.Repetition < 0:
		return bad("repetition_penalty", s.Repetition, 0, "infinity")
	case s.NoRepeatNgram < 0:
		return bad("no_repeat_ngram_size", s.NoRepeatNgram, 0, "the length")
	case s.MinNewTokens < 0:
		return bad("min_new_tokens", s.MinNewTokens, 0, "max_new_tokens")
	case s.Beams > 1 && s.Sample:
		return fault.New(fault.Input, "a beam search does not sample in this version").WithHint("Give num_beams=1, or do_sample=False.")
	case s.Beams > 1 && s.Returned > s.Beams:
		return fault.New(fault.Input, "num_return_sequences is %d, and there are %d beams", s.Returned, s.Beams).WithHint("Give at most num_beams.")
	case s.Beams > 1 && !slices.Contains([]string{"true", "false", "never"}, s.EarlyStopping):
		return fault.New(fault.Input, "early_stopping is %q", s.EarlyStopping).WithHint("It is true, false or never.")
	}
	return nil
}

// scores is [batch, vocab] in float32, and what is left to be freed with it.
type scores struct {
	t   aten.Tensor
	err error
}

// set replaces the scores by what an operator gives.
func (s *scores) set(name string, args ...aten.Value) {
	if s.err != nil {
		return
	}
	t, err := call(name, args...)
	s.err = err
	if err == nil {
		s.t.Free()
		s.t = t
	}
}

// call calls an operator that gives one tensor.
func call(name string, args ...aten.Value) (aten.Tensor, error) {
	op, err := aten.Find(name)
	if err != nil {
		return aten.Tensor{}, err
	}
	v, err := op.Call(args)
	if err == nil && v.Kind != graph.ArgRef {
		v.Free()
		err = fault.New(fault.Internal, "%s gave no tensor", name)
	}
	return v.T, err
}

// scored makes scores [batch, vocab] of logits [batch, 1, vocab], as transformers does: in float32, with
// the processors that come before any of the user's applied.
func (g *Generation) scored(logits aten.Tensor) (aten.Tensor, error) {
	s := &scores{}
	s.t, s.err = call("aten::select.int", aten.TensorValue(logits), aten.IntValue(1), aten.IntValue(-1))
	s.float32()
	if g.beams != nil {
		s.set("aten::log_softmax.int", aten.TensorValue(s.t), aten.IntValue(-1))
	}
	if s.err == nil {
		s.err = g.process(s)
	}
	return s.give()
}

// float32 makes the scores a copy of that type.
func (s *scores) float32() {
	s.set("aten::to.dtype", aten.TensorValue(s.t), aten.Value{Kind: graph.ArgDType, S: "float32"}, aten.BoolValue(false), aten.BoolValue(true))
}

// give hands the scores over, or frees them where something went wrong.
func (s *scores) give() (aten.Tensor, error) {
	if s.err != nil && !s.t.IsZero() {
		s.t.Free()
		s.t = aten.Tensor{}
	}
	return s.t, s.err
}

// filtered copies scores and, where tokens are sampled, narrows what they are sampled from.
func (g *Generation) filtered(given aten.Tensor) (aten.Tensor, error) {
	s := &scores{}
	s.t, s.err = given.Share()
	s.float32()
	if g.settings.Sample && s.err == nil {
		s.err = g.filter(s)
	}
	return s.give()
}

// pick chooses a token for each row: the one of the highest score, or one drawn from their softmax.
func (g *Generation) pick(t aten.Tensor) ([]int64, error) {
	var out aten.Tensor
	var err error
	if g.settings.Sample {
		var p aten.Tensor
		if p, err = call("aten::softmax.int", aten.TensorValue(t), aten.IntValue(-1)); err == nil {
			defer p.Free()
			if g.draws != nil {
				return g.drawEach(p), nil
			}
			out, err = call("aten::multinomial", aten.TensorValue(p), aten.IntValue(1))
		}
	} else {
		out, err = call("aten::argmax", aten.TensorValue(t), aten.IntValue(-1))
	}
	if err != nil {
		return nil, err
	}
	defer out.Free()
	onCPU, err := aten.To(out, "cpu", "int64")
	if err != nil {
		return nil, err
	}
	defer onCPU.Free()
	return onCPU.Int64s()
}

// process changes single scores: penalties, and tokens that may not come.
func (g *Generation) process(s *scores) error {
	o := &g.settings
	penalty := o.Repetition != 0 && o.Repetition != 1
	barred := len(o.EOS) > 0 && slices.ContainsFunc(g.begun, g.young)
	if !penalty && !barred && o.NoRepeatNgram == 0 {
		return nil
	}
	r := 0
	s.rows(func(line []float32) {
		row, lead, young := g.rows[r], g.lead[r], g.young(g.begun[r])
		r++
		if penalty {
			seen := map[int64]bool{}
			for _, id := range row[lead:] {
				if seen[id] || id < 0 || id >= int64(len(line)) {
					continue
				}
				seen[id] = true
				if line[id] < 0 {
					line[id] *= float32(o.Repetition)
				} else {
					line[id] /= float32(o.Repetition)
				}
			}
		}
		for _, id := range banned(row, o.NoRepeatNgram) {
			if id >= 0 && id < int64(len(line)) { // padding may be no token
				line[id] = never
			}
		}
		if barred && young {
			for _, id := range o.EOS {
				if id >= 0 && id < int64(len(line)) {
					line[id] = never
				}
			}
		}
	})
	return s.err
}

// young tells of a row that began at a step whether it may not end yet.
func (g *Generation) young(begun int) bool { return g.step-begun < g.settings.MinNewTokens }

// banned lists the tokens that would make an n-gram of the row's come a second time.
func banned(row []int64, n int) []int64 {
	if n == 0 || len(row) < n-1 {
		return nil
	}
	var out []int64
	last := row[len(row)-(n-1):]
next:
	for i := 0; i+n <= len(row); i++ {
		for k, id := range last {
			if row[i+k] != id {
				continue next
			}
		}
		out = append(out, row[i+n-1])
	}
	return out
}

// filter narrows what is sampled from, in transformers' order.
func (g *Generation) filter(s *scores) error {
	o := &g.settings
	if o.Temperature != 0 && o.Temperature != 1 {
		s.set("aten::div.Scalar", aten.TensorValue(s.t), aten.FloatValue(o.Temperature))
	}
	if o.TopK > 0 && s.err == nil {
		s.topK(o.TopK)
	}
	if o.TopP > 0 && o.TopP < 1 && s.err == nil {
		s.nucleus(o.TopP)
	}
	if o.MinP > 0 && s.err == nil {
		s.minP(o.MinP)
	}
	if o.TypicalP > 0 && o.TypicalP < 1 && s.err == nil {
		s.typical(o.TypicalP)
	}
	return s.err
}
