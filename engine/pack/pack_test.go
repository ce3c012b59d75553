package pack

import (
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/arch"
	_ "github.com/nnsight-go/nnsight-go/engine/arch/all"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/nn"
	"github.com/nnsight-go/nnsight-go/engine/plan"
	"github.com/stretchr/testify/require"
)

func TestClassesAreNumberedByTheirFirstToken(t *testing.T) {
	c := number(5, func(t token) string { return []string{"a", "b", "a", "c", "b"}[t] })
	require.Equal(t, &classes{of: []int32{0, 1, 0, 2, 1}, first: []token{0, 1, 3}}, c)
	require.Equal(t, &classes{of: []int32{0, 1, 2, 3, 1}, first: []token{0, 1, 2, 3}}, c.split([]token{2}))
	require.Equal(t, &classes{of: []int32{0, 1, 2, 3, 1}, first: []token{0, 1, 2, 3}}, c.split([]token{0}), "the first of a class may leave it")
	require.Equal(t, &classes{of: []int32{0, 1, 0}, first: []token{0, 1}}, c.part([]token{4, 3, 1}))
	require.Same(t, c, join(c, nil))
	require.Same(t, c, join(nil, c))
	require.Len(t, join(c, number(5, func(t token) bool { return t < 2 })).first, 5)
}

func TestPromptsBeginAlike(t *testing.T) {
	f := &plan.Forward{Rows: [][]int64{{7, 8, 9}, {7, 8, 1}, {7}}, Masks: make([][]int64, 3), Seq: 3}
	sp := &space{rows: 3, toks: 3}
	c := begin(f, sp)
	require.Equal(t, []int32{0, 1, 2, 0, 1, 3, 0}, c.of[:7])
	require.Equal(t, []int32{0, 1, 2, 0, 1, 3, 0}, sp.attend(c, c, c).of[:7], "attention looks back alone")
	changed := c.split([]token{1})
	after := sp.attend(changed, changed, changed)
	require.NotEqual(t, after.of[1], after.of[4], "the token itself")
	require.Equal(t, after.of[0], after.of[3], "what is before it stays equal")
	f = &plan.Forward{Rows: [][]int64{{7, 7}, {7, 7}}, Masks: make([][]int64, 2), Seq: 2}
	sp = &space{rows: 2, toks: 2}
	c = begin(f, sp)
	require.Equal(t, []int32{0, 1, 0, 1}, c.of, "equal ids at other positions are others")
	later := sp.attend(c, c.split([]token{0}), c)
	require.NotEqual(t, later.of[1], later.of[3], "the key of an earlier token counts")
}

func TestPaddingOnTheLeftIsNotLookedAt(t *testing.T) {
	f := &plan.Forward{Rows: [][]int64{{5, 6, 7}, {5, 6}}, Masks: make([][]int64, 2), Seq: 3, Masked: true}
	sp := &space{rows: 2, toks: 3, real: realTokens(f, 3)}
	require.Equal(t, []bool{true, true, true, false, true, true}, sp.real)
	c := begin(f, sp)
	require.Equal(t, c.of[0], c.of[4], "the same token at the same position of its prompt")
	after := sp.attend(c, c, c)
	require.Equal(t, after.of[1], after.of[5])
	require.Equal(t, []token{4, 5}, sp.seen(5))
	require.Equal(t, []token{3}, sp.seen(3))
	f.Masks[0] = []int64{1, 0, 1}
	sp.real = realTokens(f, 3)
	require.Equal(t, []token{0, 2}, sp.seen(2), "what the user masks")
}

func TestSpans(t *testing.T) {
	all := graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{graph.Null(), graph.Null(), graph.Null()}}
	from := func(lo, hi, step graph.Arg) graph.Arg {
		return graph.Arg{Kind: graph.ArgSlice, L: []graph.Arg{lo, hi, step}}
	}
	dots := graph.Arg{Kind: graph.ArgEllipsis}
	for name, c := range map[string]struct {
		key  graph.Arg
		want span
		ok   bool
	}{
		"last":          {graph.Tuple(all, graph.Int(-1)), span{9, 10, 1}, true},
		"row and token": {graph.Tuple(graph.Int(0), graph.Int(3), graph.Int(5)), span{3, 4, 1}, true},
		"slice":         {graph.Tuple(all, from(graph.Int(-4), graph.Int(-1), graph.Null())), span{6, 9, 1}, true},
		"step 1":        {graph.Tuple(all, from(graph.Null(), graph.Int(2), graph.Int(1))), span{0, 2, 1}, true},
		"dots":          {graph.Tuple(dots, graph.Int(-1), all), span{9, 10, 1}, true},
		"step 2":        {graph.Tuple(all, from(graph.Null(), graph.Null(), graph.Int(2))), span{}, false},
		"outside":       {graph.Tuple(all, graph.Int(10)), span{}, false},
		"nothing":       {graph.Tuple(all, from(graph.Int(5), graph.Int(5), graph.Null())), span{}, false},
		"rows alone":    {graph.Int(0), span{}, false},
		"new axis":      {graph.Tuple(all, graph.Null(), graph.Int(1)), span{}, false},
		"a list":        {graph.Tuple(all, graph.List(graph.Int(1), graph.Int(2))), span{}, false},
		"list behind":   {graph.Tuple(all, graph.Int(1), graph.List(graph.Int(2))), span{}, false},
		"a tensor":      {graph.Tuple(all, graph.Ref(3)), span{}, false},
		"by value":      {graph.Tuple(all, from(graph.Ref(3), graph.Null(), graph.Null())), span{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := spanOf(&c.key, 3, 1, 10)
			require.Equal(t, c.ok, ok)
			if ok {
				require.Equal(t, c.want, got)
			}
		})
	}
	key := graph.Tuple(all, graph.Int(-1))
	require.Equal(t, graph.Tuple(all, graph.Int(2)), shifted(&key, span{9, 10, 1}, 7))
}

func TestQueriesOfARowAreDoneTogether(t *testing.T) {
	sp := &space{rows: 3, toks: 4}
	all := groups(sp, []token{11, 0, 3, 1, 2, 6})
	require.Equal(t, []group{
		{queries: []token{0, 1, 2, 3}, limits: []int{1, 2, 3, 4}, keys: []token{0, 1, 2, 3}},
		{queries: []token{6}, limits: []int{3}, keys: []token{4, 5, 6}},
		{queries: []token{11}, limits: []int{4}, keys: []token{8, 9, 10, 11}},
	}, all)
	require.Equal(t, [][]group{{all[0]}, {all[1], all[2]}}, buckets(all))
}

// TestOperatorsOfModelsAreKnown holds the table against the sizes that architectures say their operators give. An
// operator that it lacks is no error; here are those that are meant to be missing.
func TestOperatorsOfModelsAreKnown(t *testing.T) {
	configs := map[string]string{
		"GPT2LMHeadModel":  `{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 12, "vocab_size": 7, "n_positions": 16}`,
		"LlamaForCausalLM": `{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 12, "intermediate_size": 20, "vocab_size": 7}`,
	}
	for name, config := range configs {
		for _, masked := range []bool{false, true} {
			a, err := arch.Open([]byte(config))
			require.NoError(t, err)
			m, _, err := nn.Build(nn.Variant{Masked: masked}, a.Build)
			require.NoError(t, err)
			invokes := []graph.Invoke{{Rows: [][]int64{{1, 2, 3}}}, {Rows: [][]int64{{1, 2}}}}
			if masked { // rows of one invoke are padded on the left
				invokes[0].Rows = append(invokes[0].Rows, []int64{1, 2})
			}
			s, err := plan.Splice(&graph.Graph{
				Invokes: invokes,
				Nodes: []graph.Node{
					{Kind: graph.KindRead, Port: graph.PortOutput, Leaf: "logits", Pos: -1},
					{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(0)}, Pos: -1},
					{Kind: graph.KindRead, Port: graph.PortOutput, Leaf: "logits", Invoke: 1, Pos: -1},
					{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(2)}, Invoke: 1, Pos: -1},
				},
			}, plan.Models{Causal: m, Masked: m})
			require.NoError(t, err)
			known := 0
			for _, st := range follow(s).steps {
				in := st.in
				if in.Op != plan.OpCall || in.Shape.Find(graph.DimBatch) < 0 {
					continue
				}
				require.NotEqual(t, asIs, st.kind, "%s, masked %v: %s", name, masked, in)
				known++
			}
			require.Greater(t, known, 20)
			packed, reports := Tokens(s)
			require.NotSame(t, s, packed)
			require.NotEmpty(t, reports)
			require.Equal(t, map[bool]int{false: 6, true: 9}[masked], reports[0].Total)
			require.True(t, strings.HasSuffix(reports[0].String(), " tokens"))
		}
	}
}
