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
	Params       []ParamInfo     `json:"params"`
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
	Path string `json:"path"`
	Port string `json:"port"`
	Tree any    `json:"tree"`
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
		shape := make([]any, len(n.Shape))
		for i, d := range n.Shape {
			switch d {
			case graph.DimBatch:
				shape[i] = "B"
			case graph.DimSeq:
				shape[i] = "S"
			default:
				shape[i] = int64(d)
			}
		}
		t := n.DType
		if t == "" {
			t = dtype
		}
		return map[string]any{"leaf": n.Leaf, "shape": shape, "dtype": t}
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

func points(m *graph.Model, dtype string) []PointInfo {
	out := make([]PointInfo, len(m.Points))
	for i := range m.Points {
		p := &m.Points[i]
		info := PointInfo{Path: p.Path, Port: [...]string{"input", "output", "grad"}[p.Port]}
		if p.Port == graph.PortInput && p.Tree.Kind == graph.ArgDict {
			info.Tree = inputTree(m, &p.Tree, dtype)
		} else {
			info.Tree = tree(m, &p.Tree, dtype)
		}
		out[i] = info
	}
	return out
}
