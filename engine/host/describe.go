package host

import (
	"encoding/json"

	"github.com/nnsight-go/nnsight-go/engine/graph"
)

// Description is what there is to know about a model without its weights; docs/architecture.md
// shows its JSON form.
type Description struct {
	Architecture string          `json:"architecture"`
	Directory    string          `json:"directory"`
	Config       json.RawMessage `json:"config"`
	Context      int             `json:"context"`
	Vocab        int             `json:"vocab"`
	DType        string          `json:"dtype"`
	Device       string          `json:"device"`
	Loaded       bool            `json:"loaded"`
	Modules      []ModuleInfo    `json:"modules"`
	Points       []PointInfo     `json:"points"`
	Ops          []OpInfo        `json:"ops"`
	Params       []ParamInfo     `json:"params"`
}

// OpInfo is the result of an operator in a module's forward pass: an internal value that can be read
// and written.
type OpInfo struct {
	Path  string `json:"path"`  // transformer.h.0.mlp.source.add_0
	After int    `json:"after"` // how many of the points stand before it
	Shape []any  `json:"shape"`
	DType string `json:"dtype"`
}

// ModuleInfo is one module, in registration order.
type ModuleInfo struct {
	Path   string   `json:"path"`
	Class  string   `json:"class"`
	Extra  string   `json:"extra"`
	Params []string `json:"params"`
}

// PointInfo is one access point, in the order the forward pass meets them.
type PointInfo struct {
	Path     string `json:"path"`
	Port     string `json:"port"`
	Internal bool   `json:"internal,omitempty"` // a value in the middle of a module's forward pass
	Tree     any    `json:"tree"`
}

// ParamInfo is a parameter or buffer.
type ParamInfo struct {
	Name   string  `json:"name"`
	Shape  []int64 `json:"shape"`
	DType  string  `json:"dtype"`
	Buffer bool    `json:"buffer,omitempty"`
	Tied   string  `json:"tied,omitempty"` // the parameter whose tensor it is
}

// tree turns the structure of an access point into what the JSON form shows.
func tree(m *graph.Model, a *graph.Arg, dtype string) any {
	items := func() []any {
		out := make([]any, len(a.L))
		for i := range a.L {
			out[i] = tree(m, &a.L[i], dtype)
		}
		return out
	}
	fields := func() map[string]any {
		out := map[string]any{}
		for i := range a.L {
			out[a.Keys[i]] = tree(m, &a.L[i], dtype)
		}
		return out
	}
	switch a.Kind {
	case graph.ArgRef:
		n := &m.Nodes[a.Ref]
		return leafInfo(n.Leaf, n.Shape, n.DType, dtype)
	case graph.ArgTuple:
		return map[string]any{"tuple": items()}
	case graph.ArgList:
		return map[string]any{"list": items()}
	case graph.ArgDict:
		if a.S != "" {
			return map[string]any{"object": a.S, "fields": fields(), "order": a.Keys}
		}
		return map[string]any{"dict": fields(), "order": a.Keys}
	case graph.ArgBool:
		return map[string]any{"value": a.I != 0}
	case graph.ArgInt:
		return map[string]any{"value": a.I}
	case graph.ArgString:
		return map[string]any{"value": a.S}
	}
	return nil
}

// inputTree shows args and kwargs side by side.
func inputTree(m *graph.Model, a *graph.Arg, dtype string) any {
	out := map[string]any{"args": []any{}, "kwargs": map[string]any{}, "order": []string{}}
	for i, key := range a.Keys {
		part := &a.L[i]
		switch key {
		case "args":
			args := make([]any, len(part.L))
			for k := range part.L {
				args[k] = tree(m, &part.L[k], dtype)
			}
			out["args"] = args
		case "kwargs":
			kwargs := map[string]any{}
			for k := range part.L {
				kwargs[part.Keys[k]] = tree(m, &part.L[k], dtype)
			}
			out["kwargs"], out["order"] = kwargs, append([]string{}, part.Keys...)
		}
	}
	return out
}

// points lists the access points in the order the forward pass meets them, those among them that only
// the explicit variant computes, and the operators between them.
func points(m *graph.Model, dtype string) ([]PointInfo, []OpInfo) {
	out, ops := make([]PointInfo, 0, len(m.Points)), make([]OpInfo, 0, len(m.Points))
	hidden := m.Hidden
	for i := range m.Points {
		p := &m.Points[i]
		for len(hidden) > 0 && hidden[0].At <= p.At {
			out = append(out, PointInfo{Path: hidden[0].Path, Port: "output", Internal: true,
				Tree: leafInfo("", hidden[0].Shape, hidden[0].DType, dtype)})
			hidden = hidden[1:]
		}
		if p.Internal && p.Tree.Kind == graph.ArgRef && m.Nodes[p.Tree.Ref].Kind == graph.KindCall {
			n := &m.Nodes[p.Tree.Ref]
			ops = append(ops, OpInfo{Path: p.Path, After: len(out), Shape: sizes(n.Shape), DType: dtypeOf(n.DType, dtype)})
			continue
		}
		info := PointInfo{Path: p.Path, Port: [...]string{"input", "output", "grad"}[p.Port], Internal: p.Internal}
		if p.Port == graph.PortInput && p.Tree.Kind == graph.ArgDict {
			info.Tree = inputTree(m, &p.Tree, dtype)
		} else {
			info.Tree = tree(m, &p.Tree, dtype)
		}
		out = append(out, info)
	}
	return out, ops
}

func leafInfo(leaf string, shape graph.Shape, dtype, model string) map[string]any {
	return map[string]any{"leaf": leaf, "shape": sizes(shape), "dtype": dtypeOf(dtype, model)}
}

func sizes(shape graph.Shape) []any {
	out := make([]any, len(shape))
	for i, d := range shape {
		switch d {
		case graph.DimBatch:
			out[i] = "B"
		case graph.DimSeq:
			out[i] = "S"
		default:
			out[i] = int64(d)
		}
	}
	return out
}

// dtypeOf is a dtype, or the model's own where there is none.
func dtypeOf(dtype, model string) string {
	if dtype == "" {
		return model
	}
	return dtype
}
