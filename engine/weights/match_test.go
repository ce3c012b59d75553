package weights

import (
	"fmt"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/stretchr/testify/require"
)

// shapes makes the infos of a checkpoint: "name 2 3" is a tensor of sizes [2, 3].
func shapes(t testing.TB, lines ...string) map[string]Info {
	out := map[string]Info{}
	for _, line := range lines {
		var i Info
		for k, word := range strings.Fields(line) {
			if k == 0 {
				i.Name = word
				continue
			}
			var n int64
			_, err := fmt.Sscan(word, &n)
			require.NoError(t, err)
			i.Shape = append(i.Shape, n)
		}
		out[i.Name] = i
	}
	return out
}

func TestMatch(t *testing.T) {
	specs := []Spec{
		{Name: "model.emb.weight", Shape: []int64{5, 2}},
		{Name: "model.norm.weight", Shape: []int64{2}},
		{Name: "model.norm.bias", Shape: []int64{2}, Optional: true},
		{Name: "head.weight", Shape: []int64{5, 2}, Tied: "model.emb.weight"},
	}
	o := MatchOptions{BasePrefix: "model", Ignore: []string{"*.mask", "*.rotary.inv_freq", "old.*.x.*.y"}}
	for name, c := range map[string]struct {
		have []string
		want map[string]string
		says []string // or the lines of the error
	}{
		"plain": {
			have: []string{"model.emb.weight 5 2", "model.norm.weight 2"},
			want: map[string]string{"model.emb.weight": "model.emb.weight", "model.norm.weight": "model.norm.weight"},
		},
		"optional there": {
			have: []string{"model.emb.weight 5 2", "model.norm.weight 2", "model.norm.bias 2"},
			want: map[string]string{"model.emb.weight": "model.emb.weight", "model.norm.weight": "model.norm.weight", "model.norm.bias": "model.norm.bias"},
		},
		"both of a tied pair": {
			have: []string{"model.emb.weight 5 2", "model.norm.weight 2", "head.weight 5 2"},
			want: map[string]string{"model.emb.weight": "model.emb.weight", "model.norm.weight": "model.norm.weight", "head.weight": "head.weight"},
		},
		"only the tied one": {
			have: []string{"head.weight 5 2", "model.norm.weight 2"},
			want: map[string]string{"model.emb.weight": "head.weight", "model.norm.weight": "model.norm.weight", "head.weight": "head.weight"},
		},
		"base model": {
			have: []string{"emb.weight 5 2", "norm.weight 2"},
			want: map[string]string{"model.emb.weight": "emb.weight", "model.norm.weight": "norm.weight"},
		},
		"ignored surplus": {
			have: []string{"model.emb.weight 5 2", "model.norm.weight 2", "model.h.0.mask 1", "rotary.inv_freq 4",
				"model.rotary.inv_freq 4", "old.1.x.2.y 1"},
			want: map[string]string{"model.emb.weight": "model.emb.weight", "model.norm.weight": "model.norm.weight"},
		},
		"missing": {
			have: []string{"model.emb.weight 5 2"},
			says: []string{"missing: model.norm.weight [2]"},
		},
		"nothing there": {
			says: []string{"missing: model.emb.weight [5 2]", "missing: model.norm.weight [2]"},
		},
		"wrong shape": {
			have: []string{"model.emb.weight 2 5", "model.norm.weight 2"},
			says: []string{"wrong shape: model.emb.weight has [2 5], the config asks for [5 2]"},
		},
		"wrong number of axes": {
			have: []string{"model.emb.weight 5 2", "model.norm.weight"},
			says: []string{"wrong shape: model.norm.weight has [], the config asks for [2]"},
		},
		"wrong shape of a tied one": {
			have: []string{"model.emb.weight 5 2", "model.norm.weight 2", "head.weight 6 2"},
			says: []string{"wrong shape: head.weight has [6 2], the config asks for [5 2]"},
		},
		"wrong shape of an optional one": {
			have: []string{"model.emb.weight 5 2", "model.norm.weight 2", "model.norm.bias 3"},
			says: []string{"wrong shape: model.norm.bias has [3], the config asks for [2]"},
		},
		"surplus": {
			have: []string{"model.emb.weight 5 2", "model.norm.weight 2", "model.z 1", "model.a 3 4"},
			says: []string{"surplus: model.a [3 4]", "surplus: model.z [1]"},
		},
		"both with and without the prefix": {
			have: []string{"model.emb.weight 5 2", "emb.weight 5 2", "model.norm.weight 2"},
			says: []string{"surplus: emb.weight [5 2]"},
		},
		"a prefix of the name alone does not count": {
			have: []string{"model.emb.weight 5 2", "model.norm.weight 2", "model.h.0.mask.weight 1", "old.x.y 1"},
			says: []string{"surplus: model.h.0.mask.weight [1]", "surplus: old.x.y [1]"},
		},
		"all kinds at once": {
			have: []string{"model.emb.weight 7 2", "other 1"},
			says: []string{"wrong shape: model.emb.weight has [7 2], the config asks for [5 2]", "missing: model.norm.weight [2]", "surplus: other [1]"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Match(specs, shapes(t, c.have...), o)
			if c.says == nil {
				require.NoError(t, err)
				require.Equal(t, c.want, got)
				return
			}
			require.Nil(t, got)
			e := fault.As(err)
			require.Equal(t, fault.ModelLoad, e.Code)
			require.Equal(t, c.says, strings.Split(e.Message, "\n  ")[1:])
		})
	}
}

func TestMatchListsTheFirstTen(t *testing.T) {
	var have []string
	for i := range 13 {
		have = append(have, fmt.Sprintf("t%02d 1", i))
	}
	_, err := Match(nil, shapes(t, have...), MatchOptions{})
	lines := strings.Split(fault.As(err).Message, "\n  ")[1:]
	require.Len(t, lines, 11)
	require.Equal(t, "surplus: t09 [1]", lines[9])
	require.Equal(t, "and 3 more", lines[10])
}

func TestLike(t *testing.T) {
	for pattern, c := range map[string]struct{ yes, no string }{
		"a.b":    {"a.b", "a.bc"},
		"*":      {"", "-"},
		"a*":     {"a", "ba"},
		"*a":     {"ba", "ab"},
		"a*a":    {"aa", "a"},
		"a*b*c":  {"axbyc", "acb"},
		"*b*b*":  {"bb", "b"},
		"a*bc*d": {"abcbcd", "abcbc"},
	} {
		require.True(t, like(c.yes, pattern), "%q %q", c.yes, pattern)
		if c.no != "-" {
			require.False(t, like(c.no, pattern), "%q %q", c.no, pattern)
		}
	}
}
