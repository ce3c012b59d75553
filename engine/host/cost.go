package host

import (
	"fmt"
	"math"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Cost is what a run is estimated to take before it begins (estimate.go).
type Cost struct {
	Work   float64     // multiplications of forward passes and lines
	Lines  []float64   // by invoke: those of its lines, which are part of Work
	Peak   int64       // bytes of tensors that are there at the same time, beside weights and constants
	Output int64       // bytes of the values that are saved
	Saved  []SavedCost // by Save node, in their order; a tensor that is saved twice counts once
	Exact  bool        // no size depends on what values are; else it takes this at least

	hardest, largest line // of the user's, by work and by memory
	graph            *graph.Graph
}

// SavedCost is what a Save node adds to the output.
type SavedCost struct {
	Node  graph.ID
	Bytes int64
}

// line is a node of the user's, and how much it takes.
type line struct {
	node graph.ID
	size float64
}

// more notes a line that takes more than the one that took most.
func (l *line) more(node graph.ID, size float64) {
	if node >= 0 && size > l.size {
		*l = line{node, size}
	}
}

// Part is what of a run's cost is somebody's who shares it: a part of the forward passes, the lines of invokes from one
// to before another, and the values of their Save nodes.
func (c *Cost) Part(share float64, invokes [2]int, saves [2]graph.ID) *Cost {
	out := *c
	for _, lines := range c.Lines {
		out.Work -= lines
	}
	out.Work *= share
	for _, lines := range c.Lines[invokes[0]:invokes[1]] {
		out.Work += lines
	}
	return out.saving(saves)
}

// Saving is the cost where only what Save nodes from one on keep is handed over.
func (c *Cost) Saving(from graph.ID) *Cost { return c.saving([2]graph.ID{from, math.MaxInt32}) }

func (c *Cost) saving(nodes [2]graph.ID) *Cost {
	out := *c
	out.Output, out.Saved = 0, nil
	for _, s := range c.Saved {
		if s.Node >= nodes[0] && s.Node < nodes[1] {
			out.Output += s.Bytes
			out.Saved = append(out.Saved, s)
		}
	}
	return &out
}

// Then is the cost of this and of a step that comes after it, while something else is kept.
func (c Cost) Then(step *Cost, kept int64) Cost {
	c.Work, c.Output, c.Exact = c.Work+step.Work, c.Output+step.Output, c.Exact && step.Exact
	c.Peak = max(c.Peak, step.Peak+kept)
	c.Saved, c.hardest, c.largest, c.graph = step.Saved, step.hardest, step.largest, step.graph
	return c
}

// Judge decides whether a run of that cost may begin. Its error becomes the run's.
type Judge func(*Cost) error

// Bounds are what a run may take; a zero is no bound.
type Bounds struct {
	Work   float64 // multiplications
	Memory int64   // bytes of tensors at the same time
	Output int64   // bytes of saved values
}

// Check is the error of a cost that is over the bounds. It names the user's line that takes most.
func (b Bounds) Check(c *Cost) error {
	switch {
	case b.Output > 0 && c.Output > b.Output:
		return c.blame(c.kept(), fault.New(fault.Remote, "what is saved would take %s, and a job may send %s here",
			bytesText(c.Output), bytesText(b.Output)).
			WithHint("Save less: the positions you look at, or what you compute from them; or send fewer rows or steps at once."))
	case b.Memory > 0 && c.Peak > b.Memory:
		return c.blame(c.largest, fault.New(fault.Remote, "this would take some %s of memory at once, and a job may take %s here",
			bytesText(c.Peak), bytesText(b.Memory)).
			WithHint("Send fewer rows, shorter ones or fewer steps at once, or keep fewer values at the same time."))
	case b.Work > 0 && c.Work > b.Work:
		return c.blame(c.hardest, fault.New(fault.Remote, "this would take some %.1e multiplications, and a job may take %.1e here",
			c.Work, b.Work).WithHint("Send fewer rows, shorter ones or fewer steps at once, or compute less of them."))
	}
	return nil
}

// blame names the line that is most to blame for a refusal, if one of the user's is.
func (c *Cost) blame(most line, e *fault.Error) error {
	if most.size > 0 && c.graph != nil && int(most.node) < len(c.graph.Nodes) {
		n := &c.graph.Nodes[most.node]
		e.Node, e.Invoke, e.Op, e.Pos = int(most.node), int(n.Invoke), n.Op, c.graph.PosOf(n)
	}
	return e
}

// kept is the Save node whose values take most.
func (c *Cost) kept() (most line) {
	for _, s := range c.Saved {
		most.more(s.Node, float64(s.Bytes))
	}
	return most
}

// bytesText writes a number of bytes for people.
func bytesText(n int64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB"}
	x, u := float64(n), 0
	for ; x >= 1024 && u < len(units)-1; u++ {
		x /= 1024
	}
	if u == 0 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%.1f %s", x, units[u])
}

func judgeOf(judges []Judge) Judge {
	if len(judges) == 0 {
		return nil
	}
	return judges[0]
}

// judged is the error of a run that may not begin. What a schedule takes is kept with it, if it is.
func (r *Run) judged(s *plan.Schedule) error {
	if r.judge == nil {
		return nil
	}
	constants := sizesOf(r.consts)
	if r.known != nil {
		if p := r.known.priced.Load(); p != nil && p.constants == constants {
			return r.judge(p.cost)
		}
	}
	cost, err := r.estimate(s)
	if err != nil {
		return err
	}
	r.priced = &priced{constants, cost}
	if r.known != nil {
		r.known.priced.Store(r.priced)
	}
	return r.judge(cost)
}

// sizesOf says of what sizes and dtypes tensors are.
func sizesOf(tensors []aten.Tensor) string {
	var b strings.Builder
	for _, t := range tensors {
		fmt.Fprint(&b, t.DType(), t.Shape())
	}
	return b.String()
}
