package host

import (
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Reorder makes row r of the cache what row parents[r] was. It comes between the end of a step and
// [Cache.Append]. Rows that change places are of one prompt, so their padding is the same.
func (c *Cache) Reorder(parents []int64) error {
	same := true
	for r, p := range parents {
		if p < 0 || p >= int64(len(c.rows)) {
			return fault.New(fault.Internal, "row %d is to become row %d of %d", r, p, len(c.rows))
		}
		same = same && p == int64(r)
	}
	if same {
		return nil
	}
	defer plainMode()()
	index, err := aten.FillInt64s(func(ids []int64) { copy(ids, parents) }, int64(len(parents)))
	if err != nil {
		return err
	}
	if index, err = c.model.place(index, "int64"); err != nil {
		return err
	}
	defer index.Free()
	for _, t := range c.tensors {
		if err := permute(t, index, c.past+c.seq); err != nil {
			return err
		}
	}
	return nil
}

// permute changes the order of the rows of a tensor of keys or values, in place, of which so many tokens are in use.
func permute(t, index aten.Tensor, used int64) error {
	view, err := aten.Narrow(t, 2, 0, used)
	if err != nil {
		return err
	}
	defer view.Free()
	op, err := aten.Find("aten::index_select.default")
	if err != nil {
		return err
	}
	chosen, err := op.Call([]aten.Value{aten.TensorValue(view), aten.IntValue(0), aten.TensorValue(index)})
	if err != nil {
		return err
	}
	defer chosen.Free()
	return aten.CopyInto(view, chosen.T)
}
