package gen

import (
	"math"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
)

// rows lets f change the scores of each row, as float32 numbers on the CPU.
func (s *scores) rows(f func(line []float32)) {
	if s.err != nil {
		return
	}
	sizes, device := s.t.Shape(), s.t.Device()
	onCPU, err := aten.To(s.t, "cpu", "float32")
	if s.err = err; err != nil {
		return
	}
	all, err := onCPU.Float32s()
	onCPU.Free()
	if s.err = err; err != nil {
		return
	}
	for r := range sizes[0] {
		f(all[r*sizes[1] : (r+1)*sizes[1]])
	}
	t, err := aten.FromFloat32s(all, sizes...)
	if s.err = err; err != nil {
		return
	}
	defer t.Free()
	moved, err := aten.To(t, device, "float32")
	if s.err = err; err == nil {
		s.t.Free()
		s.t = moved
	}
}

var never = float32(math.Inf(-1))

// probabilities is the softmax of scores, in double precision, since sums of them are compared.
func probabilities(line []float32) []float64 {
	top := slices.Max(line)
	out, sum := make([]float64, len(line)), 0.0
	for i, x := range line {
		out[i] = math.Exp(float64(x - top))
		sum += out[i]
	}
	for i := range out {
		out[i] /= sum
	}
	return out
}

// order gives the indices of a row by a key, smallest first; equal ones in their order.
func order(n int, key func(i int) float64) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	slices.SortStableFunc(out, func(a, b int) int {
		switch x, y := key(a), key(b); {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	})
	return out
}

// topK keeps the k largest scores, and what is as large as the last of them.
func (s *scores) topK(k int64) {
	s.rows(func(line []float32) {
		sorted := slices.Clone(line)
		slices.Sort(sorted)
		least := sorted[len(sorted)-int(min(k, int64(len(sorted))))]
		for i, x := range line {
			if x < least {
				line[i] = never
			}
		}
	})
}

// nucleus keeps the likeliest tokens whose probabilities come to p, one at least (Holtzman et al. 2019).
func (s *scores) nucleus(p float64) {
	s.rows(func(line []float32) {
		probs, sum := probabilities(line), 0.0
		least := order(len(line), func(i int) float64 { return float64(line[i]) })
		for _, i := range least[:len(least)-1] {
			if sum += probs[i]; sum <= 1-p {
				line[i] = never
			}
		}
	})
}

// minP keeps tokens that are at least p times as likely as the likeliest (Nguyen et al. 2024).
func (s *scores) minP(p float64) {
	s.rows(func(line []float32) {
		probs := probabilities(line)
		least := p * slices.Max(probs)
		for i := range line {
			if probs[i] < least {
				line[i] = never
			}
		}
	})
}

// typical keeps the tokens whose information is nearest to the entropy, as many as come to p, one at
// least (Meister et al. 2022).
func (s *scores) typical(p float64) {
	s.rows(func(line []float32) {
		probs, entropy := probabilities(line), 0.0
		for _, x := range probs {
			if x > 0 {
				entropy -= x * math.Log(x)
			}
		}
		distance := func(i int) float64 { return math.Abs(-math.Log(probs[i]) - entropy) }
		nearest := order(len(line), distance)
		sum, last := 0.0, 0
		for last < len(nearest) && sum < p {
			sum += probs[nearest[last]]
			last++
		}
		limit := distance(nearest[max(last-1, 0)])
		for i := range line {
			if distance(i) > limit {
				line[i] = never
			}
		}
	})
}
