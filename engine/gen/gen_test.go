package gen

import (
	"cmp"
	"math"
	"os"
	"slices"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
	"github.com/stretchr/testify/require"
)

// TestMain holds the count of tensors to zero at the end.
func TestMain(m *testing.M) {
	code := m.Run()
	if n := aten.Live(); n != 0 && code == 0 {
		println("tensors left at the end:", n)
		code = 1
	}
	os.Exit(code)
}

func open(t *testing.T, config string) *host.Native {
	m, err := host.Open(enginetest.Directory(t, config, 1), host.Options{Load: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

// whole runs a trace of full rows and gives a tensor of it.
func whole(t *testing.T, m *host.Native, rows [][]int64, path, leaf string) []float32 {
	g := &graph.Graph{Invokes: []graph.Invoke{{Rows: rows}}, Nodes: []graph.Node{
		{Kind: graph.KindRead, Path: path, Port: graph.PortOutput, Leaf: leaf, Pos: -1},
		{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(0)}, Pos: -1},
	}}
	r, err := m.Start(g, nil)
	require.NoError(t, err)
	defer r.Free()
	_, err = r.Step(0)
	require.NoError(t, err)
	_, tensors, err := r.Results()
	require.NoError(t, err)
	defer tensors[0].Free()
	data, err := tensors[0].Float32s()
	require.NoError(t, err)
	return data
}

var configs = map[string]string{"gpt2": enginetest.GPT2, "llama": enginetest.Llama}

func TestGreedyIsThatOfWholeRows(t *testing.T) {
	for name, config := range configs {
		for _, prompts := range [][][]int64{{{1, 2, 3}}, {{4}}, {{1, 2, 3}, {4, 5, 6}}, {{1, 2, 3, 4, 5}, {6}, {7, 8, 9}}} {
			m := open(t, config)
			g, err := New(m, prompts, nil, Settings{MaxNewTokens: 12})
			require.NoError(t, err)
			got := make([][]int64, len(prompts))
			for !g.Done() {
				tokens, err := g.Plain()
				require.NoError(t, err)
				for r, token := range tokens {
					got[r] = append(got[r], token)
				}
			}
			for r, prompt := range prompts {
				row := append([]int64{}, prompt...)
				var want []int64
				for range 12 {
					logits := whole(t, m, [][]int64{row}, "lm_head", "")
					last := logits[len(logits)-m.Describe().Vocab:]
					best := 0
					for i, x := range last {
						if x > last[best] {
							best = i
						}
					}
					want = append(want, int64(best))
					row = append(row, int64(best))
				}
				require.Equal(t, want, got[r], "%s, row %d of %v", name, r, prompts)
				require.Equal(t, row, g.Rows()[r][len(g.Rows()[r])-len(row):])
			}
			_, err = g.Plain()
			require.ErrorContains(t, err, "has ended")
			g.Free()
			g.Free()
		}
	}
}

// A program sees one token a step, and what it changes stays in the cache.
func TestProgramsOfSteps(t *testing.T) {
	for name, config := range configs {
		m := open(t, config)
		block, scale := map[string]string{"gpt2": "transformer.h.0", "llama": "model.layers.0"}[name], 0.5
		g, err := New(m, [][]int64{{1, 2, 3}}, nil, Settings{MaxNewTokens: 5})
		require.NoError(t, err)
		live := aten.Live()
		var rows []int64
		for step := 0; !g.Done(); step++ {
			program := &graph.Graph{Nodes: []graph.Node{
				{Kind: graph.KindRead, Path: block, Port: graph.PortOutput, Leaf: "0", Pos: -1},
				{Kind: graph.KindCall, Op: "aten::mul_", Args: []graph.Arg{graph.Ref(0), graph.Float(scale)}, Pos: -1},
				{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(0)}, Pos: -1},
			}}
			run, err := g.Begin(program, nil, true)
			require.NoError(t, err)
			_, err = run.Step(0)
			require.NoError(t, err)
			saved, tensors, err := run.Results()
			require.NoError(t, err)
			require.Len(t, saved, 1, "the logits are the generation's own")
			tokens := map[bool]int64{true: 3, false: 1}[step == 0]
			require.Equal(t, []int64{1, tokens, 16}, tensors[0].Shape())
			tensors[0].Free()
			run.Free()
			next, err := g.Next()
			require.NoError(t, err)
			require.Equal(t, live, aten.Live())
			rows = append(rows, next...)
		}
		g.Free()

		row := []int64{1, 2, 3}
		for range 5 { // the same change of all tokens of whole rows
			trace := &graph.Graph{Invokes: []graph.Invoke{{Rows: [][]int64{row}}}, Nodes: []graph.Node{
				{Kind: graph.KindRead, Path: block, Port: graph.PortOutput, Leaf: "0", Pos: -1},
				{Kind: graph.KindCall, Op: "aten::mul_", Args: []graph.Arg{graph.Ref(0), graph.Float(scale)}, Pos: -1},
				{Kind: graph.KindRead, Path: "lm_head", Port: graph.PortOutput, Pos: -1},
				{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(2)}, Pos: -1},
			}}
			r, err := m.Start(trace, nil)
			require.NoError(t, err)
			_, err = r.Step(0)
			require.NoError(t, err)
			_, tensors, err := r.Results()
			require.NoError(t, err)
			data, err := tensors[0].Float32s()
			require.NoError(t, err)
			tensors[0].Free()
			r.Free()
			last, best := data[len(data)-24:], 0
			for i, x := range last {
				if x > last[best] {
					best = i
				}
			}
			row = append(row, int64(best))
		}
		require.Equal(t, row[3:], rows, name)
	}
}

func TestEnds(t *testing.T) {
	m := open(t, enginetest.GPT2)
	g, err := New(m, [][]int64{{1, 2}, {3}}, nil, Settings{MaxNewTokens: 6})
	require.NoError(t, err)
	var free [][]int64
	for !g.Done() {
		tokens, err := g.Plain()
		require.NoError(t, err)
		free = append(free, tokens)
	}
	g.Free()
	g, err = New(m, [][]int64{{1, 2}, {3}}, nil, Settings{MaxNewTokens: 6, EOS: []int64{free[1][0]}, Pad: 9})
	require.NoError(t, err)
	defer g.Free()
	ended := false
	for step := 0; !g.Done(); step++ {
		tokens, err := g.Plain()
		require.NoError(t, err)
		if ended {
			require.Equal(t, int64(9), tokens[0])
		}
		ended = ended || tokens[0] == free[1][0]
	}
	require.True(t, ended)
	g.Stop()
	require.True(t, g.Done())
}

func TestRefused(t *testing.T) {
	m := open(t, enginetest.GPT2)
	for says, c := range map[string]struct {
		rows [][]int64
		s    Settings
	}{
		"0 new tokens":              {[][]int64{{1}}, Settings{}},
		"30 tokens of prompt and 4": {[][]int64{make([]int64, 30)}, Settings{MaxNewTokens: 4}},
		"no prompt":                 {nil, Settings{MaxNewTokens: 4}},
		"has no tokens":             {[][]int64{{}}, Settings{MaxNewTokens: 4}},
		"is id 24":                  {[][]int64{{24}}, Settings{MaxNewTokens: 4}},
		"top_p is 2":                {[][]int64{{1}}, Settings{MaxNewTokens: 4, TopP: 2}},
		"does not sample":           {[][]int64{{1}}, Settings{MaxNewTokens: 4, Beams: 2, Sample: true}},
		"there are 2 beams":         {[][]int64{{1}}, Settings{MaxNewTokens: 4, Beams: 2, Returned: 3}},
		"early_stopping is":         {[][]int64{{1}}, Settings{MaxNewTokens: 4, Beams: 2}},
	} {
		_, err := New(m, c.rows, nil, c.s)
		require.ErrorContains(t, err, says)
		require.Equal(t, fault.Input, fault.As(err).Code)
	}
}

func TestFilters(t *testing.T) {
	logits := []float32{1, 3, 2, 0.5, -1}
	left := func(f func(*scores)) []int {
		x, err := aten.FromFloat32s(append([]float32{}, logits...), 1, 5)
		require.NoError(t, err)
		s := &scores{t: x}
		f(s)
		require.NoError(t, s.err)
		data, err := s.t.Float32s()
		require.NoError(t, err)
		s.t.Free()
		var out []int
		for i, v := range data {
			if !math.IsInf(float64(v), -1) {
				require.Equal(t, logits[i], v)
				out = append(out, i)
			}
		}
		return out
	}
	// softmax: 0.084 0.618 0.227 0.051 0.011
	require.Equal(t, []int{1, 2}, left(func(s *scores) { s.topK(2) }))
	require.Equal(t, []int{0, 1, 2, 3, 4}, left(func(s *scores) { s.topK(50) }))
	require.Equal(t, []int{1}, left(func(s *scores) { s.nucleus(0.5) }))
	require.Equal(t, []int{1, 2}, left(func(s *scores) { s.nucleus(0.8) }))
	require.Equal(t, []int{0, 1, 2}, left(func(s *scores) { s.nucleus(0.9) }))
	require.Equal(t, []int{1, 2}, left(func(s *scores) { s.minP(0.2) }))
	require.Equal(t, []int{2}, left(func(s *scores) { s.typical(0.2) })) // entropy 1.04, and -log 0.227 is 1.48
	require.Equal(t, []int{1, 2}, left(func(s *scores) { s.typical(0.3) }))
	require.Equal(t, []int64{5}, banned([]int64{1, 2, 5, 3, 1, 2}, 3))
	require.Nil(t, banned([]int64{1, 2, 5}, 3))
	require.Equal(t, []int64{1, 2}, banned([]int64{1, 2}, 1))
	require.Nil(t, banned([]int64{1}, 0))
}

func TestScoresOfTheCallers(t *testing.T) {
	m := open(t, enginetest.Llama)
	g, err := New(m, [][]int64{{1, 2, 3}, {4}}, [][]int64{{1, 1, 1}, {1}}, Settings{MaxNewTokens: 5, Returned: 2, EOS: []int64{9}, Pad: 8})
	require.NoError(t, err)
	defer g.Free()
	step := func() aten.Tensor {
		run, err := g.Begin(&graph.Graph{}, nil, true)
		require.NoError(t, err)
		defer run.Free()
		_, err = run.Step(0)
		require.NoError(t, err)
		_, _, err = run.Results()
		require.NoError(t, err)
		scores, err := g.Scores()
		require.NoError(t, err)
		return scores
	}
	scores := step()
	_, err = g.Scores()
	require.ErrorContains(t, err, "not come to its end")
	require.Equal(t, []int64{4, 24}, scores.Shape())
	data, err := scores.Float32s()
	require.NoError(t, err)
	require.Equal(t, data[:24], data[24:48], "the rows of a prompt stand side by side")
	require.NotEqual(t, data[:24], data[48:72])
	wrong, err := aten.FromFloat32s(data[:48], 2, 24)
	require.NoError(t, err)
	_, _, err = g.Choose(wrong)
	wrong.Free()
	require.ErrorContains(t, err, "these scores are [2 24]")
	for r, id := range []int{9, 5, 6, 7} {
		data[r*24+id] = 100
	}
	changed, err := aten.FromFloat32s(data, 4, 24)
	require.NoError(t, err)
	tokens, filtered, err := g.Choose(changed)
	require.NoError(t, err)
	require.Equal(t, []int64{9, 5, 6, 7}, tokens)
	left, err := filtered.Float32s()
	require.NoError(t, err)
	require.Equal(t, data, left)
	filtered.Free()
	_, _, err = g.Choose(changed)
	require.ErrorContains(t, err, "no scores were asked for")
	require.ErrorContains(t, g.End([]bool{true}), "1 rows are told to end or not, and there are 4")
	require.NoError(t, g.End([]bool{false, true, true, false}))
	require.False(t, g.Done())
	scores.Free()

	scores = step()
	tokens, filtered, err = g.Choose(changed)
	require.NoError(t, err)
	require.Equal(t, []int64{8, 8, 8, 7}, tokens)
	require.NoError(t, g.End([]bool{false, false, false, true}))
	require.True(t, g.Done())
	for _, x := range []aten.Tensor{scores, filtered, changed} {
		x.Free()
	}
}

func TestBeamsFindTheBest(t *testing.T) {
	for name, config := range configs {
		m := open(t, config)
		logProbs := func(row []int64) []float64 {
			logits := whole(t, m, [][]int64{row}, "lm_head", "")
			p := probabilities(logits[len(logits)-24:])
			for i := range p {
				p[i] = math.Log(p[i])
			}
			return p
		}
		// with as many beams as there are tokens, two steps leave nothing out
		prompts := [][]int64{{1, 2, 3}, {4}}
		g, err := New(m, prompts, nil, Settings{MaxNewTokens: 2, Beams: 24, Returned: 2, LengthPenalty: 1, EarlyStopping: "false"})
		require.NoError(t, err)
		for !g.Done() {
			tokens, err := g.Plain()
			require.NoError(t, err)
			require.Len(t, tokens, 48)
		}
		require.ErrorContains(t, g.End(make([]bool, 48)), "eos_token_id alone")
		got := g.Rows()
		g.Free()
		require.Len(t, got, 4)
		for p, prompt := range prompts {
			type pair struct {
				score float64
				row   []int64
			}
			var all []pair
			for a, first := range logProbs(prompt) {
				row := append(append([]int64{}, prompt...), int64(a))
				for b, second := range logProbs(row) {
					all = append(all, pair{first + second, append(append([]int64{}, row...), int64(b))})
				}
			}
			slices.SortFunc(all, func(x, y pair) int { return cmp.Compare(y.score, x.score) })
			for k := range 2 {
				require.Equal(t, all[k].row, got[2*p+k][5-len(all[k].row):], name)
			}
		}
	}
}
