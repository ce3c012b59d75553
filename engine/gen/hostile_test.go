package gen

import (
	"math"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
)

// A run borrows the cache's tensors, so these live until it has ended.
func TestRunsEndWithTheirGeneration(t *testing.T) {
	m := open(t, enginetest.GPT2)
	live := aten.Live()
	for _, stepped := range []bool{true, false} {
		g, err := New(m, [][]int64{{1, 2, 3}}, nil, Settings{MaxNewTokens: 4})
		require.NoError(t, err)
		run, err := g.Begin(&graph.Graph{}, nil, true)
		require.NoError(t, err)
		if stepped {
			_, err = run.Step(0)
			require.NoError(t, err)
		}
		g.Free()
		if stepped {
			_, _, err = run.Results()
		} else {
			_, err = run.Step(0)
		}
		require.ErrorContains(t, err, "the generation of this run has ended")
		run.Free()
		_, err = g.Next()
		require.ErrorContains(t, err, "has not come to its end")
	}
	require.LessOrEqual(t, aten.Live(), live+int64(len(m.Describe().Params)), "nothing but the weights stays")
}

func TestOneRunAStep(t *testing.T) {
	m := open(t, enginetest.GPT2)
	g, err := New(m, [][]int64{{1, 2, 3}}, nil, Settings{MaxNewTokens: 4})
	require.NoError(t, err)
	defer g.Free()
	run, err := g.Begin(&graph.Graph{}, nil, true)
	require.NoError(t, err)
	_, err = g.Begin(&graph.Graph{}, nil, true)
	require.ErrorContains(t, err, "has a run already")
	_, err = run.Step(0)
	require.NoError(t, err)
	_, _, err = run.Results()
	require.NoError(t, err)
	_, err = g.Begin(&graph.Graph{}, nil, true)
	require.ErrorContains(t, err, "this step is done")
	_, err = g.Next()
	require.NoError(t, err)
	_, err = g.Plain()
	require.NoError(t, err)
}

func TestStepsBringNoRows(t *testing.T) {
	m := open(t, enginetest.GPT2)
	g, err := New(m, [][]int64{{1, 2, 3}}, nil, Settings{MaxNewTokens: 4})
	require.NoError(t, err)
	defer g.Free()
	run, err := g.Begin(&graph.Graph{}, nil, false)
	require.NoError(t, err)
	_, err = run.Step(0)
	require.NoError(t, err)
	err = run.Extend(func(own *graph.Graph) error {
		own.Invokes = append(own.Invokes, graph.Invoke{Rows: [][]int64{{4, 5}}})
		return nil
	}, nil, true)
	require.ErrorContains(t, err, "one invoke")
	_, err = g.Begin(&graph.Graph{Invokes: []graph.Invoke{{}, {Edit: true}}}, nil, true)
	require.ErrorContains(t, err, "after the edits")
	_, err = g.Plain() // the step can be done anew
	require.NoError(t, err)
}

func TestHostileNumbers(t *testing.T) {
	m := open(t, enginetest.GPT2)
	_, err := New(m, [][]int64{{1, 2, 3}}, nil, Settings{MaxNewTokens: math.MaxInt64})
	require.ErrorContains(t, err, "at most 30 new tokens")
	require.Equal(t, fault.Input, fault.As(err).Code)
	for _, pad := range []int64{-1, 1 << 40} {
		g, err := New(m, [][]int64{{1, 2, 3}, {4}}, nil, Settings{MaxNewTokens: 2, Pad: pad, NoRepeatNgram: 1, Repetition: 1.5})
		require.NoError(t, err)
		_, err = g.Plain()
		require.NoError(t, err)
		g.Free()
	}
}

// Rows that have ended go on with what is no token, until the others have ended as well.
func TestPaddingThatIsNoToken(t *testing.T) {
	m := open(t, enginetest.GPT2)
	for _, pad := range []int64{-1, 1 << 40} {
		g, err := New(m, [][]int64{{1, 2}, {3, 4}}, nil, Settings{MaxNewTokens: 4, Pad: pad, EOS: []int64{1 << 20}})
		require.NoError(t, err)
		defer g.Free()
		_, err = g.Plain()
		require.NoError(t, err)
		require.NoError(t, g.End([]bool{true, false}))
		for range 2 {
			tokens, err := g.Plain()
			require.NoError(t, err)
			require.Equal(t, pad, tokens[0])
		}
	}
}
