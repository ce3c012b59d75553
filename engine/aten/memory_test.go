package aten

import (
	"fmt"
	"sync"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

const mib = 1 << 20

// capped bounds the memory of this process for one test.
func capped(t testing.TB, bytes int64) {
	require.NoError(t, CapMemory(bytes))
	t.Cleanup(func() { require.NoError(t, CapMemory(-1)) })
}

func TestAllocatedCountsWhatThereIs(t *testing.T) {
	old, err := Zeros("float32", "cpu", mib)
	require.NoError(t, err)
	capped(t, 64*mib)
	before := Allocated()
	made, err := Zeros("uint8", "cpu", 8*mib)
	require.NoError(t, err)
	require.InDelta(t, 8*mib, Allocated()-before, 4096)
	view, err := Narrow(made, 0, 0, 3)
	require.NoError(t, err)
	made.Free()
	require.InDelta(t, 8*mib, Allocated()-before, 4096, "a view keeps it")
	view.Free()
	require.Equal(t, before, Allocated())
	require.InDelta(t, 8*mib, PeakAllocated()-before, 4096)
	old.Free()
	require.Equal(t, before, Allocated(), "what was there before the first cap is freed, and was never counted")
	none, err := Zeros("float32", "cpu", 0)
	require.NoError(t, err)
	none.Free()
	lent, err := FromBlob(nil, []int64{0}, "float32", nil)
	require.NoError(t, err)
	lent.Free()
	require.Equal(t, before, Allocated())
}

func TestCapIsAboveWhatIsThere(t *testing.T) {
	capped(t, 4*mib)
	held, err := Zeros("uint8", "cpu", 3*mib)
	require.NoError(t, err)
	defer func() { held.Free() }()
	_, err = Zeros("uint8", "cpu", 2*mib)
	require.ErrorContains(t, err, fmt.Sprintf("a tensor needs %d bytes, and ", 2*mib))
	require.ErrorContains(t, err, "are allowed")
	require.Equal(t, fault.Op, fault.As(err).Code)
	require.NoError(t, CapMemory(4*mib))
	more, err := Zeros("uint8", "cpu", 2*mib)
	require.NoError(t, err, "so many bytes more than there are now")
	more.Free()
	require.NoError(t, CapMemory(0))
	_, err = Zeros("uint8", "cpu", 1)
	require.ErrorContains(t, err, "0 are allowed")
	require.NoError(t, CapMemory(1<<62))
	require.NoError(t, CapMemory(-1))
}

// bombs are calls of little text that ask for much memory.
func bombs(t *testing.T, x Tensor) map[string]func() (Value, error) {
	call := func(op string, args ...Value) func() (Value, error) {
		return func() (Value, error) {
			o, err := Find("aten::" + op)
			require.NoError(t, err)
			return o.Call(args)
		}
	}
	wide, err := Expand(x, []int64{1 << 20, 1 << 10})
	require.NoError(t, err)
	t.Cleanup(wide.Free)
	w, many := TensorValue(wide), Value{Kind: graph.ArgList}
	for range 64 {
		many.L = append(many.L, w)
	}
	return map[string]func() (Value, error){
		"zeros":             call("zeros", IntsValue(1e6, 1e6)),
		"full":              call("full", IntsValue(1<<40), FloatValue(1)),
		"sizes overflow":    call("zeros", IntsValue(1<<40, 1<<40)),
		"arange":            call("arange", IntValue(1<<40)),
		"linspace":          call("linspace", IntValue(0), IntValue(1), IntValue(1<<40)),
		"eye":               call("eye", IntValue(1<<20)),
		"repeat":            call("repeat", TensorValue(x), IntsValue(1<<20, 1)),
		"tile":              call("tile", TensorValue(x), IntsValue(1<<20, 1)),
		"repeated":          call("repeat_interleave", TensorValue(x), IntValue(1<<30)),
		"contiguous":        call("contiguous", w),
		"clone":             call("clone", w),
		"reshape":           call("reshape", w, IntsValue(-1)),
		"a sum":             call("add", w, FloatValue(1)),
		"broadcast":         call("einsum", Value{Kind: graph.ArgString, S: "ai,bj->abij"}, Value{Kind: graph.ArgList, L: []Value{w, TensorValue(x)}}),
		"cat":               call("cat", many),
		"stack":             call("stack", many),
		"outer":             call("outer", TensorValue(flat(t, wide)), TensorValue(flat(t, wide))),
		"one_hot":           call("one_hot", TensorValue(ints(t)), IntValue(1<<40)),
		"padding":           call("constant_pad_nd", TensorValue(x), IntsValue(1<<30, 1<<30)),
		"cartesian":         call("cartesian_prod", Value{Kind: graph.ArgList, L: []Value{TensorValue(flat(t, wide)), TensorValue(flat(t, wide))}}),
		"distances":         call("cdist", w, w),
		"bincount":          call("bincount", TensorValue(ints(t))),
		"upsampled":         call("upsample_nearest1d", TensorValue(three(t, x)), IntsValue(1<<40)),
		"float64":           call("to", w, Value{Kind: graph.ArgDType, S: "float64"}),
		"diag":              call("diag_embed", w),
		"a large fft":       call("fft_fft", TensorValue(x), IntValue(1<<40)),
		"windows, unfolded": call("im2col", TensorValue(four(t, x)), IntsValue(1, 1), IntsValue(1, 1), IntsValue(1<<20, 1<<20), IntsValue(1, 1)),
	}
}

func shaped(t *testing.T, x Tensor, op string, args ...Value) Tensor {
	out, err := run("aten::"+op, append([]Value{TensorValue(x)}, args...)...)
	require.NoError(t, err)
	t.Cleanup(out.Free)
	return out
}

// flat is a row of a matrix.
func flat(t *testing.T, x Tensor) Tensor { return shaped(t, x, "select", IntValue(1), IntValue(0)) }

func three(t *testing.T, x Tensor) Tensor { return shaped(t, x, "unsqueeze", IntValue(0)) }

func four(t *testing.T, x Tensor) Tensor { return three(t, three(t, x)) }

// ints is one large number.
func ints(t *testing.T) Tensor {
	out, err := FillInt64s(func(ids []int64) { ids[0] = 1 << 39 }, 1)
	require.NoError(t, err)
	t.Cleanup(out.Free)
	return out
}

func TestMemoryBombs(t *testing.T) {
	x, err := Zeros("float32", "cpu", 1, 1<<10)
	require.NoError(t, err)
	defer x.Free()
	calls := bombs(t, x)
	capped(t, 256*mib)
	live, bytes := Live(), Allocated()
	for name, call := range calls {
		out, err := call()
		require.Error(t, err, name)
		out.Free()
		require.Equal(t, fault.Op, fault.As(err).Code)
		require.LessOrEqual(t, Allocated(), bytes+256*mib)
		require.Equal(t, live, Live(), name)
		require.Equal(t, bytes, Allocated(), name)
	}
	again, err := Zeros("float32", "cpu", mib)
	require.NoError(t, err, "the process goes on")
	again.Free()
}

// No two threads are promised the same bytes.
func TestCapHoldsForAllThreads(t *testing.T) {
	capped(t, 32*mib)
	before := Allocated()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for i := range 300 {
				x, err := Zeros("uint8", "cpu", int64(mib+4096*(i%7)))
				if Allocated() > before+32*mib+8*8192 {
					t.Error("more than allowed")
				}
				if err == nil {
					x.Free()
				}
				y, err := Zeros("uint8", "cpu", 6*mib)
				if err == nil {
					y.Free()
				}
			}
		})
	}
	all.Wait()
	require.Equal(t, before, Allocated())
	require.LessOrEqual(t, PeakAllocated(), before+32*mib+8*8192)
}

// Storages that change their size ask the same allocator.
func TestResizedMemoryCounts(t *testing.T) {
	capped(t, 16*mib)
	before := Allocated()
	x, err := Zeros("uint8", "cpu", 1)
	require.NoError(t, err)
	op, err := Find("aten::resize_.default")
	require.NoError(t, err)
	out, err := op.Call([]Value{TensorValue(x), IntsValue(4 * mib)})
	require.NoError(t, err)
	out.Free()
	require.InDelta(t, 4*mib, Allocated()-before, 4096)
	_, err = op.Call([]Value{TensorValue(x), IntsValue(64 * mib)})
	require.ErrorContains(t, err, "are allowed")
	x.Free()
	require.Equal(t, before, Allocated())
}

// BenchmarkAllocation is what counting costs a small tensor.
func BenchmarkAllocation(b *testing.B) {
	for _, n := range []int64{16, 1 << 16} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				x, err := Zeros("uint8", "cpu", n)
				require.NoError(b, err)
				x.Free()
			}
		})
	}
}
