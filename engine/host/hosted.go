package host

import (
	"encoding/json"

	"github.com/nnsight-go/nnsight-go/engine/arch"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// Hosted models: their forward pass is somebody else's, a Python module's. The engine is told which access
// points there are, in the order in which a pass comes to them. A run stops where it needs what stands at
// one ([Run.Wanted]); its caller goes on with the pass until it is there, hands it over ([Run.Feed]), steps
// the run, and puts back what the run gives ([Run.Given]).

// HostedPoint is an access point of a hosted model.
type HostedPoint struct {
	Path   string   `json:"path"`
	Port   string   `json:"port"`   // "input" or "output"
	Leaves []string `json:"leaves"` // names of its tensors
}

// OpenHosted makes a model of access points.
func OpenHosted(points []HostedPoint) (*Native, error) {
	m := &graph.Model{}
	seen := map[string]bool{}
	for i, p := range points {
		port := graph.PortInput
		switch p.Port {
		case "input":
		case "output":
			port = graph.PortOutput
		default:
			return nil, fault.New(fault.Input, "access point %d is on the side %q of a module", i, p.Port)
		}
		key := p.Port + " " + p.Path
		if seen[key] {
			return nil, fault.New(fault.Input, "there are two access points for the %s of %q", p.Port, p.Path)
		}
		seen[key] = true
		at := graph.ID(len(m.Nodes))
		m.Nodes = append(m.Nodes, graph.Node{Kind: graph.KindFetch, Index: int32(i), Path: p.Path, Pos: -1})
		tree := graph.Arg{Kind: graph.ArgTuple}
		items := graph.ID(len(m.Nodes))
		for k := range p.Leaves {
			m.Nodes = append(m.Nodes, graph.Node{Kind: graph.KindItem, Args: []graph.Arg{graph.Ref(at), graph.Int(int64(k))}, Path: p.Path, Pos: -1})
		}
		for k, leaf := range p.Leaves {
			tree.L = append(tree.L, graph.Ref(graph.ID(len(m.Nodes))))
			m.Nodes = append(m.Nodes, graph.Node{Kind: graph.KindMark, Path: p.Path, Port: port, Leaf: leaf, Index: int32(i), Step: int32(k),
				Args: []graph.Arg{graph.Ref(items + graph.ID(k))}, Pos: -1})
		}
		m.Points = append(m.Points, graph.Point{Path: p.Path, Port: port, Tree: tree, At: graph.ID(len(m.Nodes))})
		if !m.HasModule(p.Path) {
			m.Modules = append(m.Modules, graph.Module{Path: p.Path})
		}
	}
	m.Index()
	return &Native{graphs: &arch.Graphs{Causal: m, Masked: m}, device: "cpu", params: map[string]aten.Tensor{}, loaded: true, hosted: true}, nil
}

// ReadHosted makes a model of a JSON list of its access points.
func ReadHosted(description []byte) (*Native, error) {
	var points []HostedPoint
	if err := json.Unmarshal(description, &points); err != nil {
		return nil, fault.New(fault.Input, "the access points are not what they should be: %v", err)
	}
	return OpenHosted(points)
}

// visit is what happens between a run and the forward pass of a hosted model.
type visit struct {
	wanted *plan.Instr   // the fetch that the run stands at
	fed    bool          // it has been given
	values []aten.Tensor // what stands there
	given  map[int]aten.Tensor
}

func (v *visit) free() {
	aten.FreeAll(v.values)
	for _, t := range v.given {
		t.Free()
	}
	*v = visit{}
}

// Wanted is the access point that the run needs before it can go on; ok is false where it needs none.
func (r *Run) Wanted() (at plan.Place, ok bool) {
	if r.freed || r.visit.wanted == nil || r.visit.fed {
		return plan.Place{}, false
	}
	return r.visit.wanted.Place, true
}

// Feed hands over the tensors of the access point that the run wants, which it takes over.
func (r *Run) Feed(values []aten.Tensor) error {
	if _, ok := r.Wanted(); !ok {
		aten.FreeAll(values)
		return fault.New(fault.Handle, "this run wants nothing").WithHint("Step it.")
	}
	r.visit.values, r.visit.fed = values, true
	return nil
}

// fetch gives what was handed over.
func (r *Run) fetch() (value, error) {
	out := aten.Value{Kind: graph.ArgTuple}
	for _, t := range r.visit.values {
		if t.IsZero() { // there is none this time
			out.L = append(out.L, aten.Value{Kind: graph.ArgNone})
			continue
		}
		out.L = append(out.L, aten.TensorValue(t))
	}
	r.visit.wanted, r.visit.fed, r.visit.values = nil, false, nil
	return value{other: &out}, nil
}

// give notes what is to stand at the access point that the run has got to.
func (r *Run) give(in *plan.Instr) error {
	t, err := r.tensor(&in.Args[0])
	if err != nil {
		return err
	}
	own, err := t.Share()
	if err != nil {
		return err
	}
	if r.visit.given == nil {
		r.visit.given = map[int]aten.Tensor{}
	}
	r.visit.given[in.Place.Leaf].Free()
	r.visit.given[in.Place.Leaf] = own
	return nil
}

// Given takes what is to stand at the access point that was fed last, by the numbers of its tensors. They are
// the caller's from then on.
func (r *Run) Given() map[int]aten.Tensor {
	given := r.visit.given
	r.visit.given = nil
	return given
}
