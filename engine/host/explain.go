package host

import (
	"fmt"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/pack"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Explain says what running a whole trace with that many constants would compute: its forward passes, the modules
// that never run, and those that are done for some of the tokens alone. Nothing runs.
func (m *Native) Explain(g *graph.Graph, consts int) (string, error) {
	if m.hosted {
		return "", fault.New(fault.Input, "the forward pass of a wrapped module is Python's: the engine does not plan it")
	}
	r := &Run{model: m, graph: g}
	var err error
	if r.models, err = m.variants(false); err != nil {
		return "", err
	}
	if _, err := r.choose(); err != nil {
		return "", err
	}
	if err := graph.VerifyMore(g, r.models.Causal, consts, 0, 0); err != nil {
		return "", err
	}
	if err := m.checkInputs(g, 0); err != nil {
		return "", err
	}
	schedule, err := plan.Splice(g, r.models)
	if err != nil {
		return "", err
	}
	schedule, reports := r.shared(schedule)
	var b strings.Builder
	for i := range schedule.Forwards {
		explainPass(&b, schedule, i, reports)
	}
	if idle := idle(r.models.Causal, schedule); len(idle) > 0 {
		fmt.Fprintf(&b, "never run, since nothing needs them: %s\n", strings.Join(idle, ", "))
	}
	return b.String(), nil
}

func explainPass(b *strings.Builder, s *plan.Schedule, forward int, reports []pack.Report) {
	f := &s.Forwards[forward]
	rows, tokens := "1 row", "tokens"
	if n := f.Batch(); n > 1 {
		rows = fmt.Sprintf("%d rows", n)
	}
	if f.Seq == 1 {
		tokens = "token"
	}
	fmt.Fprintf(b, "forward pass %d: %s of %d %s\n", forward, rows, f.Seq, tokens)
	type line struct {
		unit     string
		low, top int
	}
	var lines []line
	total := 0
	for _, r := range reports {
		if r.Of != forward {
			continue
		}
		total = r.Total
		at := slices.IndexFunc(lines, func(l line) bool { return l.unit == unit(r.Path) })
		if at < 0 {
			lines = append(lines, line{unit(r.Path), r.Done, r.Done})
			continue
		}
		lines[at].low, lines[at].top = min(lines[at].low, r.Done), max(lines[at].top, r.Done)
	}
	if len(lines) == 0 {
		return
	}
	fmt.Fprintf(b, "  computed for some of the %d tokens alone, the others being equal to them or looked at by nobody:\n", total)
	for _, l := range lines {
		count := fmt.Sprint(l.low)
		if l.top != l.low {
			count = fmt.Sprintf("%d to %d", l.low, l.top)
		}
		fmt.Fprintf(b, "    %s: %s\n", l.unit, count)
	}
}

// unit is the block that a module belongs to, or the module itself: transformer.h.3 of transformer.h.3.mlp.c_fc.
func unit(path string) string {
	parts := strings.Split(path, ".")
	for i, p := range parts {
		if p != "" && strings.Trim(p, "0123456789") == "" {
			return strings.Join(parts[:i+1], ".")
		}
	}
	return path
}

// idle are the blocks and other modules of which a schedule has no instruction, but for those that never have one.
func idle(m *graph.Model, s *plan.Schedule) []string {
	busy := map[string]bool{}
	for i := range s.Instrs {
		busy[unit(s.Instrs[i].Path)] = true
	}
	var out []string
	for i := range m.Nodes {
		if n := &m.Nodes[i]; n.Kind == graph.KindCall && n.Path != "" && !busy[unit(n.Path)] && !slices.Contains(out, unit(n.Path)) {
			out = append(out, unit(n.Path))
		}
	}
	return out
}

// Apart has every token of every row computed, though others may be equal to it and nobody may look at it. It is
// for comparison; off in a model that was opened.
func (m *Native) Apart(on bool) { m.apart.Store(on) }
