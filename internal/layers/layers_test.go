package layers_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/internal/layers"
	"github.com/stretchr/testify/require"
)

const module = "github.com/nnsight-go/nnsight-go/"

// imports gives what each package of the engine imports, tests left out: package -> import -> the
// file that has it. Packages are named by their paths under engine.
func imports(t *testing.T) map[string]map[string]string {
	root := filepath.Join("..", "..", "engine")
	out := map[string]map[string]string{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && entry.Name() == "testdata" {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		pkg := strings.TrimPrefix(filepath.ToSlash(dir), ".")
		if out[pkg] == nil {
			out[pkg] = map[string]string{}
		}
		for _, spec := range file.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			out[pkg][name] = path
		}
		return nil
	})
	require.NoError(t, err)
	require.Contains(t, out, "graph", "the walk found the engine")
	return out
}

func TestOrder(t *testing.T) {
	for pkg, names := range imports(t) {
		if layers.Helper(pkg) {
			continue
		}
		_, ok := layers.Rank(pkg)
		require.True(t, ok, "engine/%s has no place in layers.Order", pkg)
		for name, file := range names {
			if name == "testing" || strings.HasPrefix(name, "github.com/stretchr/testify") {
				t.Errorf("%s: only tests import %s", file, name)
			}
			ours, ok := strings.CutPrefix(name, module)
			if !ok {
				continue
			}
			to, ok := strings.CutPrefix(ours+"/", "engine/")
			to = strings.TrimSuffix(to, "/")
			switch {
			case !ok:
				t.Errorf("%s: the engine does not import %s, which stands on it", file, ours)
			case layers.Helper(to):
				t.Errorf("%s: only tests import %s", file, ours)
			case !layers.Allowed(pkg, to):
				t.Errorf("%s: engine/%s may not import engine/%s", file, pkg, to)
			}
		}
	}
}

// TestPure follows the imports of the packages without tensors: none may reach C. Nor do they import
// what does I/O.
func TestPure(t *testing.T) {
	all := imports(t)
	for pkg := range all {
		first, _, _ := strings.Cut(pkg, "/")
		if layers.Helper(pkg) || !slices.Contains(layers.Pure, first) {
			continue
		}
		seen := map[string]bool{}
		var walk func(at string)
		walk = func(at string) {
			if seen[at] {
				return
			}
			seen[at] = true
			for name, file := range all[at] {
				if name == "C" || strings.Contains(name, "gotorch") || strings.Contains(name, "daulet/tokenizers") {
					t.Errorf("engine/%s reaches %s through %s", pkg, name, file)
				}
				if to, ok := strings.CutPrefix(name, module+"engine/"); ok {
					walk(to)
				}
			}
		}
		walk(pkg)
		for _, name := range []string{"os", "net", "net/http", "syscall", "unsafe"} {
			if file, ok := all[pkg][name]; ok {
				t.Errorf("%s: a package without I/O imports %s", file, name)
			}
		}
	}
}

func TestRules(t *testing.T) {
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{"graph", "fault", true},
		{"fault", "graph", false},
		{"plan", "exec", false},
		{"nn", "plan", true},
		{"arch/gpt2", "arch", true},
		{"arch", "arch/gpt2", true}, // Go itself refuses cycles
		{"arch/gpt2", "host", false},
		{"", "host", true},
		{"host", "", false},
		{"graph", "graph", false},
		{"graph", "elsewhere", false},
	} {
		require.Equal(t, c.want, layers.Allowed(c.from, c.to), "%q -> %q", c.from, c.to)
	}
	_, err := os.Stat(filepath.Join("..", "..", "go.mod"))
	require.NoError(t, err, "the walk begins at the module's root")
}
