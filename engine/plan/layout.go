package plan

import (
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Forward is one pass of the model over a batch of rows.
type Forward struct {
	Rows   [][]int64 // token ids, unpadded
	Masks  [][]int64 // attention masks of the rows, nil entries where every token counts
	Seq    int64     // tokens of the longest row
	Masked bool      // rows are padded on the left and need a mask; else padded on the right, unseen
}

// Batch is the number of rows.
func (f *Forward) Batch() int64 { return int64(len(f.Rows)) }

// extent is where an invoke lies in its forward pass.
type extent struct {
	forward   int
	row, rows int64
	tok, toks int64
}

// covers reports whether the invoke sees the whole batch as it is, so that it may share the
// model's own tensors.
func (e extent) covers(f *Forward) bool {
	return e.rows == f.Batch() && e.toks == f.Seq
}

// window is the part of a value of that symbolic shape that the invoke sees.
func (e extent) window(f *Forward, shape graph.Shape) Window {
	w := Window{Batch: f.Batch(), BatchAxis: -1, Row: e.row, Rows: e.rows, Tok: e.tok, Toks: e.toks}
	for axis, d := range shape {
		switch d {
		case graph.DimBatch:
			w.BatchAxis = axis
		case graph.DimSeq:
			if e.toks != f.Seq {
				w.SeqAxes = append(w.SeqAxes, axis)
			}
		}
	}
	if e.rows == f.Batch() {
		w.BatchAxis = -1
	}
	return w
}

// layout places the members among the invokes in new forward passes, numbered from base on:
// forwardOf[i] is the pass that invoke i needs (from [orderInvokes]). An invoke without input sees all
// rows of its pass. Where the members lie goes into extents.
func layout(invokes []graph.Invoke, members, forwardOf []int, base int, extents []extent) ([]Forward, error) {
	count := 0
	for _, i := range members {
		count = max(count, forwardOf[i]-base+1)
	}
	forwards := make([]Forward, count)
	whole := make([]bool, count)
	for _, i := range members {
		f := &forwards[forwardOf[i]-base]
		extents[i] = extent{forward: forwardOf[i]}
		if invokes[i].WholeBatch() {
			whole[forwardOf[i]-base] = true
			continue
		}
		extents[i].row, extents[i].rows = f.Batch(), int64(len(invokes[i].Rows))
		for r, row := range invokes[i].Rows {
			if len(row) == 0 {
				err := fault.New(fault.Input, "row %d of invoke %d has no tokens", r, i).
					WithHint("Give a prompt of at least one token.")
				err.Invoke = i
				return nil, err
			}
			var mask []int64
			if len(invokes[i].Masks) > 0 {
				mask = invokes[i].Masks[r]
				if len(mask) != len(row) {
					err := fault.New(fault.Input, "row %d of invoke %d has %d tokens and an attention mask of %d",
						r, i, len(row), len(mask))
					err.Invoke = i
					return nil, err
				}
			}
			f.Rows = append(f.Rows, row)
			f.Masks = append(f.Masks, mask)
			extents[i].toks = max(extents[i].toks, int64(len(row)))
		}
	}
	for k := range forwards {
		f := &forwards[k]
		if len(f.Rows) == 0 {
			return nil, errNoInput()
		}
		ragged := false
		for r, row := range f.Rows {
			f.Seq = max(f.Seq, int64(len(row)))
			ragged = ragged || len(row) != len(f.Rows[0])
			for _, m := range f.Masks[r] {
				f.Masked = f.Masked || m == 0
			}
		}
		f.Masked = f.Masked || ragged && whole[k]
	}
	for _, i := range members {
		f := &forwards[forwardOf[i]-base]
		if invokes[i].WholeBatch() {
			extents[i].rows, extents[i].toks = f.Batch(), f.Seq
			continue
		}
		for _, row := range invokes[i].Rows {
			f.Masked = f.Masked || int64(len(row)) != extents[i].toks
		}
	}
	for _, i := range members {
		f := &forwards[forwardOf[i]-base]
		if f.Masked {
			extents[i].tok = f.Seq - extents[i].toks
		}
	}
	return forwards, nil
}

func errNoInput() error {
	return fault.New(fault.Input, "the trace has no input").WithHint("Give the trace or one of its invokes a prompt.")
}
