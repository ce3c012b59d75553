// Package pack has each distinct token computed once, and only those that somebody looks at.
//
// A forward pass computes [batch, seq, ...] tensors, though nearly all it does happens to each token by
// itself: what a layer gives for a token depends on that token alone, but for attention, which looks
// at the tokens before it. So where two rows begin alike, where an invoke changes one token of a prompt
// that others have too, where rows are padded, or where only the last token's logits are read, most of
// the work is done twice or for nobody. [Tokens] rewrites a schedule so that such activations are held
// as a matrix with a row for each token that differs from all others and is wanted.
//
// Phases: [Tokens] goes through the schedule and finds which tokens of an activation have equal
// values (trace.go; classes.go is the arithmetic, ops.go the table of operators); goes back through it and
// finds which are wanted (demand.go); and writes the instructions anew (write.go, attention.go). What it
// does not know it leaves as it was, on whole tensors. All of it is pure, like package plan.
package pack

import (
	"fmt"

	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// enough is how few of a tensor's tokens must be left for it to be packed, in tenths: to gather tokens
// and to mask attention has its price, too.
const enough = 8

// Tokens gives a schedule that computes the same, or the schedule itself where nothing is to be gained:
// where it is not that of a whole program, where gradients are asked for, or where no token can be saved.
func Tokens(s *plan.Schedule) (*plan.Schedule, []Report) {
	if s.Groups == nil || !promising(s) {
		return s, nil
	}
	t := follow(s)
	if !t.demand() {
		return s, nil
	}
	return newWriter(t).write()
}

// most is how many tokens are numbered at most, over all activations that are given new numbers: about a second's work.
const most = 1 << 27

// promising reports whether there may be tokens to save, at a price that is worth it.
func promising(s *plan.Schedule) bool {
	rows, tokens, renewed := false, int64(0), int64(0)
	for i := range s.Forwards {
		rows = rows || s.Forwards[i].Batch() > 1
		tokens = max(tokens, s.Forwards[i].Batch()*s.Forwards[i].Seq)
	}
	for i := range s.Instrs {
		switch in := &s.Instrs[i]; in.Op {
		case plan.OpTrack, plan.OpBackward, plan.OpSetGrad, plan.OpFetch, plan.OpGive:
			return false
		case plan.OpIndex:
			rows = true
		case plan.OpPut:
			renewed++
		case plan.OpCall:
			if baseOf(in.Name) == attention {
				renewed++
			}
		}
	}
	return rows && tokens <= graph.MaxTokens && tokens*(renewed+1) <= most
}

// Report is a matrix product that a rewritten schedule does for other tokens than the batch has.
type Report struct {
	Path  string // of the module
	Of    int    // which forward pass
	Done  int    // tokens that are computed
	Total int    // tokens that the batch has
}

func (r Report) String() string { return fmt.Sprintf("%s: %d of %d tokens", r.Path, r.Done, r.Total) }

// axes gives a symbolic shape's axis of tokens, and whether it has rows. ok is false for shapes that
// are not of the form [rows, ..., tokens, ...].
func axes(shape graph.Shape) (seq int, rows, ok bool) {
	seq = shape.Find(graph.DimSeq)
	if seq < 1 || shape[0] != graph.DimBatch && shape[0] != 1 {
		return 0, false, false
	}
	for axis, d := range shape {
		if d < 0 && axis != 0 && axis != seq {
			return 0, false, false
		}
	}
	return seq, shape[0] == graph.DimBatch, true
}

// packedAxis is where an axis of a shape lies once its rows and tokens are one axis, the first.
func packedAxis(axis, seq int) int {
	if axis < seq {
		return axis
	}
	return axis - 1
}
