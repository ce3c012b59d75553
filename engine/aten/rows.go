package aten

// Rows of tokens: a batch [rows, ..., tokens, ...] as a matrix with a row for each token, and back.

// chain applies operators one after the other to a handle of its own; an error ends it.
type chain struct {
	t   Tensor
	err error
}

func begin(t Tensor) *chain {
	own, err := t.Share()
	return &chain{own, err}
}

func (c *chain) then(name string, args ...Value) *chain {
	if c.err != nil {
		return c
	}
	next, err := run(name, append([]Value{TensorValue(c.t)}, args...)...)
	c.t.Free()
	c.t, c.err = next, err
	return c
}

func (c *chain) end() (Tensor, error) {
	if c.err != nil {
		c.t.Free()
		return Tensor{}, c.err
	}
	return c.t, nil
}

// Flatten gives a tensor [rows, ..., tokens, ...] whose axis seq has the tokens as [rows*tokens, ...], a view
// where strides allow it.
func Flatten(t Tensor, seq int) (Tensor, error) {
	return begin(t).then("aten::movedim.int", IntValue(int64(seq)), IntValue(1)).
		then("aten::flatten.using_ints", IntValue(0), IntValue(1)).end()
}

// Unflatten gives [rows*toks, ...] as a view [rows, ..., toks, ...] whose axis seq has the tokens.
func Unflatten(t Tensor, rows, toks int64, seq int) (Tensor, error) {
	return begin(t).then("aten::unflatten.int", IntValue(0), IntsValue(rows, toks)).
		then("aten::movedim.int", IntValue(1), IntValue(int64(seq))).end()
}

// Cat joins tensors along the first axis.
func Cat(ts []Tensor) (Tensor, error) {
	list := IntsValue()
	for _, t := range ts {
		list.L = append(list.L, TensorValue(t))
	}
	return run("aten::cat.default", list, IntValue(0))
}

// Take gives the rows of these numbers: a view where they follow each other, else a copy.
func Take(t Tensor, rows []int64) (Tensor, error) {
	if InOrder(rows) {
		if n := int64(len(rows)); n == t.Shape()[0] {
			return t.Share()
		}
		return Narrow(t, 0, rows[0], int64(len(rows)))
	}
	index, err := Index(rows, t.Device())
	if err != nil {
		return Tensor{}, err
	}
	defer index.Free()
	return Select(t, index)
}

// Select copies the rows whose numbers index holds.
func Select(t, index Tensor) (Tensor, error) {
	return run("aten::index_select.default", TensorValue(t), IntValue(0), TensorValue(index))
}

// Index makes an int64 tensor of numbers on a device.
func Index(numbers []int64, device string) (Tensor, error) {
	index, err := FillInt64s(func(to []int64) { copy(to, numbers) }, int64(len(numbers)))
	if err != nil || device == "cpu" {
		return index, err
	}
	defer index.Free()
	return To(index, device, "int64")
}

// InOrder reports whether numbers follow each other.
func InOrder(rows []int64) bool {
	for i := range rows {
		if rows[i] != rows[0]+int64(i) {
			return false
		}
	}
	return len(rows) > 0
}
