package host

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestWorkIsEstimatedFromSizes(t *testing.T) {
	for name, c := range map[string]struct {
		op    string
		sizes [][]int64
		text  string
		want  float64
	}{
		"matrices":                 {"mm", [][]int64{{3, 5}, {5, 7}}, "", 105},
		"batches":                  {"bmm", [][]int64{{2, 3, 5}, {2, 5, 7}}, "", 210},
		"a matrix for each":        {"matmul", [][]int64{{3, 5}, {4, 5, 7}}, "", 420},
		"batches of both":          {"matmul", [][]int64{{4, 3, 5}, {5, 7}}, "", 420},
		"a vector":                 {"matmul", [][]int64{{3, 5}, {5}}, "", 15},
		"a linear layer":           {"linear", [][]int64{{2, 3, 5}, {7, 5}}, "", 210},
		"with what is added":       {"addmm", [][]int64{{7}, {3, 5}, {5, 7}}, "", 105},
		"einsum":                   {"einsum", [][]int64{{3, 5}, {5, 7}}, "ij, jk -> ik", 105},
		"einsum of batches":        {"einsum", [][]int64{{2, 4, 3, 5}, {5, 7}}, "...ij,jk->...ik", 840},
		"distances":                {"cdist", [][]int64{{3, 5}, {7, 5}}, "", 105},
		"several matrices":         {"chain_matmul", [][]int64{{3, 5}, {5, 7}, {7, 2}}, "", 105 + 42},
		"attention":                {"scaled_dot_product_attention", [][]int64{{2, 4, 3, 5}, {2, 4, 7, 5}, {2, 4, 7, 5}}, "", 2 * 2 * 4 * 3 * 7 * 5},
		"a convolution":            {"conv2d", [][]int64{{2, 3, 8, 8}, {4, 3, 3, 3}}, "", 2 * 8 * 8 * 4 * 3 * 9},
		"without a batch":          {"conv1d", [][]int64{{3, 8}, {4, 3, 3}}, "", 8 * 4 * 3 * 3},
		"a bilinear form":          {"bilinear", [][]int64{{2, 3}, {2, 4}, {5, 3, 4}}, "", 2 * 60},
		"a tensor product":         {"tensordot", [][]int64{{3, 5}, {5, 7}}, "", 105},
		"a decomposition":          {"linalg_svd", [][]int64{{2, 6, 4}}, "", 30 * 2 * 6 * 4 * 4},
		"equations":                {"linalg_solve", [][]int64{{4, 4}, {4, 3}}, "", 2 * (64 + 48)},
		"rows with one another":    {"pdist", [][]int64{{6, 4}}, "", 6 * 4 * 6},
		"nonsense":                 {"mm", [][]int64{{3}}, "", 0},
		"nothing":                  {"bmm", [][]int64{{0, 3, 5}, {0, 5, 7}}, "", 0},
		"a convolution of scalars": {"conv2d", [][]int64{{}, {}}, "", 0},
	} {
		require.Equal(t, c.want, works["aten::"+c.op](c.sizes, c.text), name)
	}
	for name, f := range works { // whatever they are given, there is an answer
		for _, sizes := range [][][]int64{nil, {{}}, {{}, {}}, {{1}}, {{1}, {}}, {{0, 0}, {0, 0}}, {{2, 2}, {2}, {2}}} {
			for _, text := range []string{"", "->", ",", "...", "i...j,..", "ij,jk,kl->"} {
				require.NotPanics(t, func() { f(sizes, text) }, name)
			}
		}
	}
}
