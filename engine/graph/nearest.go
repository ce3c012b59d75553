package graph

import "slices"

// maxNearest is the longest name compared: a wrong name may be a stranger's and of any length, and
// the work grows with the product of the lengths.
const maxNearest = 256

// Nearest gives the n of the names that are most like a wrong one, by edit distance, nearest first;
// names equally near keep their order. Empty names are left out. Overlong names are compared by
// their beginnings.
func Nearest(name string, names []string, n int) []string {
	type scored struct {
		name  string
		edits int
	}
	name = name[:min(len(name), maxNearest)]
	all := make([]scored, 0, len(names))
	for _, c := range names {
		if c != "" {
			all = append(all, scored{c, edits(name, c[:min(len(c), maxNearest)])})
		}
	}
	slices.SortStableFunc(all, func(a, b scored) int { return a.edits - b.edits })
	out := make([]string, 0, n)
	for i := 0; i < len(all) && i < n; i++ {
		out = append(out, all[i].name)
	}
	return out
}

// edits is the Levenshtein distance of two names, in bytes.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
