package host

import (
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// What package pack writes into a schedule: batches of tokens as matrices, and back.

// pack gives tokens of a batch, one a row.
func (r *Run) pack(in *plan.Instr) (value, error) {
	t, err := r.tensor(&in.Args[0])
	if err != nil {
		return value{}, err
	}
	if err := r.fits(in, t); err != nil {
		return value{}, err
	}
	seq := in.Window.SeqAxes[0]
	if sizes := t.Shape(); len(sizes) <= seq {
		return value{}, fault.New(fault.Op, "a value of sizes %v cannot be cut into tokens", sizes)
	}
	flat, err := aten.Flatten(t, seq)
	if err != nil {
		return value{}, err
	}
	defer flat.Free()
	out, err := r.rows(flat, in)
	if err != nil || !in.Fresh {
		return value{tensor: out}, err
	}
	return owned(out)
}

// owned is a copy in the place of what may be a view.
func owned(t aten.Tensor) (value, error) {
	defer t.Free()
	own, err := aten.Clone(t)
	return value{tensor: own}, err
}

// fits is the error of an invoke's replacement whose sizes or dtype are others than the batch has room for.
func (r *Run) fits(in *plan.Instr, t aten.Tensor) error {
	if in.Want == nil {
		return nil
	}
	dtype := t.DType()
	if len(in.Args) > 1 {
		of, err := r.tensor(&in.Args[1])
		if err != nil {
			return err
		}
		dtype = of.DType()
	}
	return r.misfit(in, t, dtype)
}

// take gives rows of several packed tensors.
func (r *Run) take(in *plan.Instr) (value, error) {
	parts := make([]aten.Tensor, len(in.Args))
	for i := range in.Args {
		t, err := r.tensor(&in.Args[i])
		if err != nil {
			return value{}, err
		}
		parts[i] = t
	}
	if len(parts) == 1 {
		out, err := r.rows(parts[0], in)
		return value{tensor: out}, err
	}
	all, err := aten.Cat(parts)
	if err != nil {
		return value{}, err
	}
	defer all.Free()
	out, err := r.rows(all, in)
	return value{tensor: out}, err
}

// rows takes the rows that an instruction names out of a packed tensor.
func (r *Run) rows(t aten.Tensor, in *plan.Instr) (aten.Tensor, error) {
	if index, ok := r.helpers[in]; ok {
		return aten.Select(t, index)
	}
	return aten.Take(t, in.Tokens)
}

// helper is what an instruction brings from the CPU to the model's device, the same each time; no tensor where it brings
// nothing.
func (r *Run) helper(in *plan.Instr) (aten.Tensor, error) {
	switch in.Op {
	case plan.OpMask:
		return r.visible(in)
	case plan.OpPack, plan.OpTake:
		if !aten.InOrder(in.Tokens) {
			return aten.Index(in.Tokens, r.model.device)
		}
	}
	return aten.Tensor{}, nil
}

// unpack gives tokens as a batch.
func (r *Run) unpack(in *plan.Instr) (value, error) {
	t, err := r.tensor(&in.Args[0])
	if err != nil {
		return value{}, err
	}
	out, err := aten.Unflatten(t, in.Window.Rows, in.Window.Toks, in.Window.SeqAxes[0])
	if err != nil || !in.Fresh {
		return value{tensor: out}, err
	}
	return owned(out)
}

// mask says which keys each query looks at.
func (r *Run) mask(in *plan.Instr) (value, error) {
	if known, ok := r.helpers[in]; ok {
		out, err := known.Share()
		return value{tensor: out}, err
	}
	out, err := r.visible(in)
	return value{tensor: out}, err
}

func (r *Run) visible(in *plan.Instr) (aten.Tensor, error) {
	rows, keys := in.Window.Rows, in.Window.Toks
	queries := int64(len(in.Tokens)) / rows
	t, err := aten.FillBools(func(mask []bool) {
		for q, n := range in.Tokens {
			for k := range n {
				mask[int64(q)*keys+k] = true
			}
		}
	}, rows, 1, queries, keys)
	if err != nil {
		return aten.Tensor{}, err
	}
	return r.model.place(t, "bool")
}
