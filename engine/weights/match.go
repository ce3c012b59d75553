package weights

import (
	"fmt"
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

// MatchOptions are what an architecture knows about its checkpoints.
type MatchOptions struct {
	BasePrefix string   // module that checkpoints of the base model leave out of names: "transformer"
	Ignore     []string // patterns of surplus tensors that nobody needs; * stands for any characters
}

// Match finds each expected tensor among those of a checkpoint: the result maps an architecture's
// names to the checkpoint's. An optional or tied tensor that is not there is not in the result. Where
// the checkpoint holds only one of two tied tensors, it stands for both, whichever it is.
//
// What is missing, of another shape or surplus is one error, which lists the first ten of them.
func Match(specs []Spec, infos map[string]Info, o MatchOptions) (map[string]string, error) {
	names := make(map[string]string, len(specs))
	used := make(map[string]bool, len(infos))
	var missing []int
	var wrong []string
	take := func(s Spec, name string) {
		used[name] = true
		names[s.Name] = name
		if got := infos[name].Shape; !slices.Equal(got, s.Shape) {
			wrong = append(wrong, fmt.Sprintf("wrong shape: %s has %v, the config asks for %v", name, got, s.Shape))
		}
	}
	for i, s := range specs {
		if name, ok := find(s.Name, infos, o.BasePrefix); ok {
			take(s, name)
		} else {
			missing = append(missing, i)
		}
	}
	tied := map[string]string{} // tensor -> a tensor tied to it that is there
	for _, s := range specs {
		if name, ok := names[s.Name]; ok && s.Tied != "" {
			tied[s.Tied] = name
		}
	}
	for _, i := range missing {
		s := specs[i]
		if name, ok := tied[s.Name]; ok {
			take(s, name)
		} else if s.Tied == "" && !s.Optional {
			wrong = append(wrong, fmt.Sprintf("missing: %s %v", s.Name, s.Shape))
		}
	}
	var surplus []string
	for name, info := range infos {
		if !used[name] && !ignored(name, o.Ignore) {
			surplus = append(surplus, fmt.Sprintf("surplus: %s %v", name, info.Shape))
		}
	}
	slices.Sort(surplus)
	if wrong = append(wrong, surplus...); len(wrong) == 0 {
		return names, nil
	}
	const shown = 10
	more := ""
	if len(wrong) > shown {
		more = fmt.Sprintf("\n  and %d more", len(wrong)-shown)
		wrong = wrong[:shown]
	}
	return nil, fault.New(fault.ModelLoad, "the weights are not those of the architecture that config.json names:\n  %s%s",
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

// ignored holds a name against patterns. The dot makes "*.inv_freq" fit "inv_freq" too, which is what
// is left of "model.inv_freq" where the base prefix is not written.
func ignored(name string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return like(name, p) || like("."+name, p) })
}

// like compares a name with a pattern in which * stands for any characters.
func like(name, pattern string) bool {
	parts := strings.Split(pattern, "*")
	first, last := parts[0], parts[len(parts)-1]
	if len(parts) == 1 {
		return name == pattern
	}
	if len(name) < len(first)+len(last) || !strings.HasPrefix(name, first) || !strings.HasSuffix(name, last) {
		return false
	}
	name = name[len(first) : len(name)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		at := strings.Index(name, part)
		if at < 0 {
			return false
		}
		name = name[at+len(part):]
	}
	return true
}
