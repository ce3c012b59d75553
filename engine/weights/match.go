package weights

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Spec is a tensor that an architecture expects.
type Spec struct {
	Name     string
	Shape    []int64
	Tied     string // the tensor it shares when the checkpoint has none of its own
	Optional bool
}

// MatchOptions are what an architecture knows about old checkpoints.
type MatchOptions struct {
	BasePrefix string   // module that checkpoints of the base model leave out of names
	Ignore     []string // patterns of surplus tensors that nobody needs
}

// Match finds each expected tensor among those of the checkpoint: the result maps an architecture's
// names to the checkpoint's. What is missing, of another shape or surplus is one error that lists
// it.
func (c *Checkpoint) Match(specs []Spec, o MatchOptions) (map[string]string, error) {
	return match(specs, c.infos, o)
}

func match(specs []Spec, infos map[string]Info, o MatchOptions) (map[string]string, error) {
	names := make(map[string]string, len(specs))
	used := make(map[string]bool, len(infos))
	var wrong []string
	for _, s := range specs {
		name, ok := find(s.Name, infos, o.BasePrefix)
		if ok {
			used[name] = true
		}
		if s.Tied != "" { // a copy of the tied tensor is not needed
			continue
		}
		switch {
		case !ok && s.Optional:
		case !ok:
			wrong = append(wrong, fmt.Sprintf("missing: %s of sizes %v", s.Name, s.Shape))
		case !slices.Equal(infos[name].Shape, s.Shape):
			wrong = append(wrong, fmt.Sprintf("wrong sizes: %s has %v, the config asks for %v", name, infos[name].Shape, s.Shape))
		default:
			names[s.Name] = name
		}
	}
	var surplus []string
	for name, info := range infos {
		if !used[name] && !ignored(name, o.Ignore) {
			surplus = append(surplus, fmt.Sprintf("surplus: %s of sizes %v", name, info.Shape))
		}
	}
	slices.Sort(surplus)
	wrong = append(wrong, surplus...)
	if len(wrong) == 0 {
		return names, nil
	}
	const shown = 10
	more := ""
	if len(wrong) > shown {
		more = fmt.Sprintf("\n  and %d more", len(wrong)-shown)
		wrong = wrong[:shown]
	}
	return nil, fault.New(fault.ModelLoad, "the weights are not those of the architecture that the config names:\n  %s%s",
		strings.Join(wrong, "\n  "), more).WithHint("Check that config.json and the weights belong together.")
}

// find looks a tensor up by its name, or by the name without the base model's prefix.
func find(name string, infos map[string]Info, prefix string) (string, bool) {
	if _, ok := infos[name]; ok {
		return name, true
	}
	if rest, ok := strings.CutPrefix(name, prefix+"."); ok && prefix != "" {
		if _, ok := infos[rest]; ok {
			return rest, true
		}
	}
	return "", false
}

func ignored(name string, patterns []string) bool {
	for _, p := range patterns {
		if ok, _ := path.Match(p, name); ok { // names hold no slash, so * spans dots
			return true
		}
		if ok, _ := path.Match(strings.TrimPrefix(p, "*."), name); ok {
			return true
		}
	}
	return false
}
