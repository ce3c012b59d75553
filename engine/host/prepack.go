package host

import (
	"sync"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/nn"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Packed weights: oneDNN multiplies more than a few rows with a weight faster where it lies in a layout of
// oneDNN's choice. Making that copy costs some six products, so only a model that goes on being used gets it, a
// piece at a time, and a weight that somebody outside the engine has had in hand never does: what is done
// to it through .data leaves no trace.

// DefaultPrepack is how many bytes of packed weights a model keeps unless told otherwise.
const DefaultPrepack = 2 << 30

const (
	packAfter = 3       // passes through a weight before its copy is begun
	packShare = 32      // one element is packed for so many that are multiplied
	packPiece = 1 << 22 // elements packed at once, some 10 ms
	packLeast = 1 << 16 // elements below which calling oneDNN costs what its product saves
)

// fewRows is how many rows are multiplied as fast with a weight as it lies, which is [in, out] where
// transposed. pybind/kernels.h has the same numbers.
func fewRows(transposed bool) int64 {
	if transposed {
		return 32
	}
	return 8
}

// shelf is the packed weights of a model. Any thread may use it.
type shelf struct {
	mu      sync.Mutex
	room    int64 // bytes that may still be packed
	credit  int64 // elements that may be packed now
	weights map[string]*packed
}

// packed is a weight and what there is of its copy.
type packed struct {
	weight   aten.Tensor // the model's
	elements int64
	bytes    int64

	passes int
	done   int64 // outputs that are packed
	busy   bool  // a piece is being made
	whole  bool
	closed bool // never to be packed (again)
	pieces []aten.Tensor
}

// newShelf has a place for each weight that is worth it.
func newShelf(room int64, params []nn.ParamSpec, tensors map[string]aten.Tensor) *shelf {
	s := &shelf{room: room, weights: map[string]*packed{}}
	for _, p := range params {
		t := tensors[p.Name]
		if w, ok := s.weights[p.Tied]; ok {
			s.weights[p.Name] = w
			continue
		}
		fit := len(p.Shape) == 2 && (t.DType() == "float32" || t.DType() == "bfloat16") && t.Device() == "cpu"
		if n := t.Numel(); room > 0 && fit && n >= packLeast {
			s.weights[p.Name] = &packed{weight: t, elements: n, bytes: t.Bytes()}
		}
	}
	return s
}

// pass notes a product of many rows and says which outputs are to be packed now: [from, to), or none.
// What is to be packed is busy until packed says how it went.
func (s *shelf) pass(w *packed, outputs int64) (from, to int64) {
	w.passes++
	s.credit = min(s.credit+w.elements/packShare, packPiece)
	if w.passes < packAfter || w.busy || w.whole || w.closed {
		return 0, 0
	}
	if w.done == 0 && w.bytes > s.room {
		w.closed = true
		return 0, 0
	}
	in := w.elements / outputs
	to = min(w.done+packPiece/in/64*64, outputs) // oneDNN's blocks have up to 64 outputs
	if cost := (to - w.done) * in; to > w.done && cost <= s.credit {
		if w.done == 0 {
			s.room -= w.bytes
		}
		s.credit -= cost
		w.busy = true
		return w.done, to
	}
	return 0, 0
}

// put takes a piece of a weight, none where oneDNN gives none.
func (s *shelf) put(w *packed, piece aten.Tensor, outputs, to int64) {
	w.busy = false
	if w.closed || piece.IsZero() {
		piece.Free()
		s.close(w)
		return
	}
	w.pieces = append(w.pieces, piece)
	w.done, w.whole = to, to == outputs
}

// close drops what there is of a weight's copy, for good.
func (s *shelf) close(w *packed) {
	if w.done > 0 || w.busy {
		s.room += w.bytes
	}
	aten.FreeAll(w.pieces)
	w.pieces, w.done, w.whole, w.closed = nil, 0, false, true
}

// hand notes that a weight is handed out of the engine.
func (s *shelf) hand(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w, ok := s.weights[name]; ok {
		s.close(w)
	}
}

// free drops all copies.
func (s *shelf) free() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.weights {
		s.close(w)
	}
}

// packed gives the pieces of the weight that an instruction multiplies many rows with [new], if there
// are all of them. A pass through a weight may pack a piece of it.
func (r *Run) packed(in *plan.Instr) ([]aten.Tensor, error) {
	w := r.weights[in.Args[1].Ref]
	if w == nil || r.gradients.followed { // oneDNN's product has no derivative
		return nil, nil
	}
	x, err := r.tensor(&in.Args[0])
	if err != nil {
		return nil, err
	}
	transposed := in.Args[3].I != 0
	sizes := w.weight.Shape()
	outputs, inputs := sizes[0], sizes[1]
	if transposed {
		outputs, inputs = inputs, outputs
	}
	if x.Numel() <= fewRows(transposed)*inputs {
		return nil, nil
	}
	s := r.model.shelf
	s.mu.Lock()
	defer s.mu.Unlock()
	if from, to := s.pass(w, outputs); from < to {
		s.mu.Unlock()
		piece, err := aten.Prepack(w.weight, transposed, from, to)
		s.mu.Lock()
		s.put(w, piece, outputs, to)
		if err != nil {
			return nil, err
		}
		if w.whole {
			r.model.checkpoint.GiveBack(w.weight)
		}
	}
	if !w.whole {
		return nil, nil
	}
	pieces := make([]aten.Tensor, len(w.pieces))
	for i := range pieces {
		if pieces[i], err = w.pieces[i].Share(); err != nil {
			aten.FreeAll(pieces)
			return nil, err
		}
	}
	return pieces, nil
}
