package host

import (
	"strconv"
	"sync"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/stretchr/testify/require"
)

// roomy is a GPT-2 whose weights are large enough to be packed.
const roomy = `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 256,
	"n_positions": 64, "vocab_size": 300}`

// shelfOf has weights of so many elements each, in float32.
func shelfOf(room int64, elements ...int64) (*shelf, []*packed) {
	s := &shelf{room: room, weights: map[string]*packed{}}
	var all []*packed
	for i, n := range elements {
		w := &packed{elements: n, bytes: 4 * n}
		s.weights[strconv.Itoa(i)] = w
		all = append(all, w)
	}
	return s, all
}

// pass goes once through weights of 1024 inputs and gives how many elements it packed.
func pass(s *shelf, weights []*packed) (elements int64) {
	for _, w := range weights {
		outputs := w.elements / 1024
		if from, to := s.pass(w, outputs); from < to {
			elements += (to - from) * 1024
			w.busy = false // as put does, which wants a tensor
			w.done, w.whole = to, to == outputs
		}
	}
	return elements
}

func TestPackingIsSpread(t *testing.T) {
	sizes := []int64{40 << 20}
	for range 16 {
		sizes = append(sizes, 2<<20)
	}
	s, weights := shelfOf(1<<40, sizes...)
	total, passes := int64(0), 0
	for ; total < 72<<20; passes++ {
		packed := pass(s, weights)
		if passes < packAfter-1 {
			require.Zero(t, packed)
		}
		require.LessOrEqual(t, packed, int64(72<<20)/packShare+packPiece)
		total += packed
		require.Less(t, passes, 60)
	}
	require.Greater(t, passes, packShare)
	require.Zero(t, pass(s, weights), "all are packed")
	require.Equal(t, int64(1<<40-4*72<<20), s.room)
}

func TestPackingKeepsToItsRoom(t *testing.T) {
	s, weights := shelfOf(20<<20, 1<<20, 2<<20, 3<<20, 1<<20)
	for range 100 {
		pass(s, weights)
	}
	var whole []bool
	for _, w := range weights {
		whole = append(whole, w.whole)
	}
	require.Equal(t, []bool{true, true, false, true}, whole)
	require.Equal(t, int64(4<<20), s.room)
	s.hand("1")
	require.Equal(t, int64(12<<20), s.room)
	require.False(t, weights[1].whole)
	for range 100 {
		pass(s, weights)
	}
	require.False(t, weights[1].whole, "it stays as it is")
}

// opened opens a model with so much room for packed weights.
func opened(t testing.TB, dir string, o Options) *Native {
	o.Load = true
	m, err := Open(dir, o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

// many tokens are more than are multiplied as a weight lies.
const many = 40

// warm traces until everything that is multiplied is packed.
func warm(t testing.TB, m *Native) {
	for range 100 {
		finish(t, m, logits(ids(many)...))
	}
	for _, name := range []string{"transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight", "lm_head.weight"} {
		if w := m.shelf.weights[name]; !w.closed {
			require.True(t, w.whole, name)
		}
	}
}

// near holds two results against each other, relative to the largest number.
func near(t testing.TB, want, got []float32, tolerance float64) {
	t.Helper()
	largest := 0.0
	for _, x := range want {
		largest = max(largest, float64(x), float64(-x))
	}
	require.InDeltaSlice(t, want, got, tolerance*largest)
}

func TestPackedWeightsGiveTheSame(t *testing.T) {
	dir := enginetest.Directory(t, roomy, 1)
	for dtype, tolerance := range map[string]float64{"float32": 1e-5, "bfloat16": 4e-2} {
		plain, m := opened(t, dir, Options{Prepack: -1, DType: dtype}), opened(t, dir, Options{DType: dtype})
		require.Empty(t, plain.shelf.weights)
		warm(t, m)
		for _, n := range []int{1, 2, 8, 9, 17, 32, 33} {
			near(t, finish(t, plain, logits(ids(n)...))[0], finish(t, m, logits(ids(n)...))[0], tolerance)
		}
		two := func() *program {
			p := &program{}
			p.on(ids(19), ids(27))
			p.save(p.read("lm_head", ""))
			return p
		}
		near(t, finish(t, plain, two())[0], finish(t, m, two())[0], tolerance)
	}
}

func TestPackedWeightsAreGivenBack(t *testing.T) {
	before := aten.Live()
	m, err := Open(enginetest.Directory(t, roomy, 1), Options{Load: true})
	require.NoError(t, err)
	loaded := aten.Live()
	warm(t, m)
	require.Equal(t, loaded+int64(len(m.shelf.weights))-1, aten.Live(), "the head is the embedding")
	r, err := m.Start(&logits(ids(3)...).Graph, nil)
	require.NoError(t, err)
	require.NoError(t, m.Close())
	_, err = r.Step(0)
	require.NoError(t, err)
	r.Free()
	require.Equal(t, before, aten.Live())
}

// A weight that the user has in hand may change in ways that leave no trace.
func TestHandedWeightsAreNotPacked(t *testing.T) {
	dir := enginetest.Directory(t, roomy, 1)
	plain, m := opened(t, dir, Options{Prepack: -1}), opened(t, dir, Options{})
	warm(t, m)
	for _, model := range []*Native{plain, m} {
		for _, name := range []string{"transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"} {
			w, err := model.Parameter(name)
			require.NoError(t, err)
			number := full(t, 0.01, 1)
			require.NoError(t, aten.CopyInto(w, number))
			number.Free()
			w.Free()
		}
	}
	require.False(t, m.shelf.weights["lm_head.weight"].whole, "the other name of the embedding")
	warm(t, m)
	near(t, finish(t, plain, logits(ids(many)...))[0], finish(t, m, logits(ids(many)...))[0], 1e-5)
}

func TestPackingByManyThreads(t *testing.T) {
	dir := enginetest.Directory(t, roomy, 1)
	want := finish(t, opened(t, dir, Options{Prepack: -1}), logits(ids(many)...))[0]
	m := opened(t, dir, Options{})
	var wait sync.WaitGroup
	for i := range 4 {
		wait.Go(func() {
			for k := range 25 {
				near(t, want, finish(t, m, logits(ids(many)...))[0], 1e-5)
				if i == 0 && k == 12 {
					w, err := m.Parameter("transformer.h.0.mlp.c_fc.weight")
					require.NoError(t, err)
					w.Free()
				}
			}
		})
	}
	wait.Wait()
}
