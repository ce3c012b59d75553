package host

import (
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Batches change between two steps, once the tokens of the last one have been appended: rows come to those that are there,
// and rows leave. Each row keeps its keys and values; what changes is how much padding stands before them.

// between is the error of a cache that is not between two steps, the first one behind it.
func (c *Cache) between() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.freed || c.run != nil || !c.logits.IsZero() || c.past == 0 {
		return fault.New(fault.Internal, "rows come and leave between two steps")
	}
	return nil
}

// Join puts the rows of another cache of the same model behind those of this one, and frees the other. Both are between
// two steps. Where it fails both are as they were.
func (c *Cache) Join(o *Cache) error {
	if err := c.between(); err != nil {
		return err
	}
	if err := o.between(); err != nil {
		return err
	}
	past := max(c.past, o.past)
	room := past + max(c.room-c.past, o.room-o.past)
	rows := int64(len(c.rows) + len(o.rows))
	if rows*room > graph.MaxTokens {
		return fault.New(fault.Internal, "%d rows of %d tokens are %d tokens; %d are allowed", rows, room, rows*room, graph.MaxTokens)
	}
	joined, err := c.anew(rows, room, func(name string, to aten.Tensor) error {
		if err := transfer(to, c.tensors[name], 0, past-c.past, 0, c.past, nil); err != nil {
			return err
		}
		return transfer(to, o.tensors[name], int64(len(c.rows)), past-o.past, 0, o.past, nil)
	})
	if err != nil {
		return err
	}
	real := append(shifted(c.real, past-c.past, room), shifted(o.real, past-o.past, room)...)
	c.become(joined, append(slices.Clone(c.rows), o.rows...), real, past, room)
	o.Free()
	return nil
}

// Keep drops all rows but these, and the padding that none of them needs. It comes between two steps. Where it fails the
// cache is as it was.
func (c *Cache) Keep(rows []int) error {
	if err := c.between(); err != nil {
		return err
	}
	padding := c.past
	index := make([]int64, len(rows))
	var tokens [][]int64
	var real [][]bool
	for i, r := range rows {
		index[i] = int64(r)
		tokens, real = append(tokens, c.rows[r]), append(real, c.real[r])
		if first := slices.Index(c.real[r], true); first >= 0 {
			padding = min(padding, int64(first))
		}
	}
	past, room := c.past-padding, c.room-padding
	kept, err := c.anew(int64(len(rows)), room, func(name string, to aten.Tensor) error {
		return transfer(to, c.tensors[name], 0, 0, padding, past, index)
	})
	if err != nil {
		return err
	}
	for r := range real {
		real[r] = append(make([]bool, 0, room), real[r][padding:]...)
	}
	c.become(kept, tokens, real, past, room)
	return nil
}

// shifted puts padding before rows.
func shifted(real [][]bool, padding, room int64) (out [][]bool) {
	for _, row := range real {
		out = append(out, append(append(make([]bool, 0, room), make([]bool, padding)...), row...))
	}
	return out
}

// anew makes other tensors for keys and values, and fills each; those that there are stay.
func (c *Cache) anew(rows, room int64, fill func(name string, to aten.Tensor) error) (_ map[string]aten.Tensor, err error) {
	defer plainMode()()
	out := map[string]aten.Tensor{}
	defer func() {
		if err != nil {
			for _, t := range out {
				t.Free()
			}
		}
	}()
	for name, t := range c.tensors {
		sizes := t.Shape()
		sizes[0], sizes[2] = rows, room
		if out[name], err = aten.Zeros(t.DType(), c.model.device, sizes...); err != nil {
			delete(out, name)
			return nil, err
		}
		if err = fill(name, out[name]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// become takes other tensors over.
func (c *Cache) become(tensors map[string]aten.Tensor, rows [][]int64, real [][]bool, past, room int64) {
	for _, t := range c.tensors {
		t.Free()
	}
	c.tensors, c.rows, c.real, c.past, c.room, c.masked = tensors, rows, real, past, room, false
	for _, row := range real {
		c.masked = c.masked || slices.Contains(row, false)
	}
}

// transfer copies n tokens of rows, all or those of an index, to a place in another tensor.
func transfer(to, from aten.Tensor, row, at, start, n int64, index []int64) error {
	part, err := aten.Narrow(from, 2, start, n)
	if err != nil {
		return err
	}
	defer func() { part.Free() }()
	if index != nil {
		chosen, err := aten.Take(part, index)
		if err != nil {
			return err
		}
		part.Free()
		part = chosen
	}
	rows, err := aten.Narrow(to, 0, row, part.Shape()[0])
	if err != nil {
		return err
	}
	defer rows.Free()
	place, err := aten.Narrow(rows, 2, at, n)
	if err != nil {
		return err
	}
	defer place.Free()
	return aten.CopyInto(place, part)
}
