package engine

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/weights"
)

// BuiltIn is the name of the small model that comes with the library.
const BuiltIn = builtInPrefix + "landmarks"

// builtInPrefix begins the names of the models that come with the library, as in Python.
const builtInPrefix = "nnsight-go/"

// resolve turns a model's name into its directory.
func resolve(name string) (string, error) {
	if stat, err := os.Stat(name); err == nil && stat.IsDir() {
		return filepath.Clean(name), nil
	}
	if rest, ok := strings.CutPrefix(name, builtInPrefix); ok {
		libraries, err := aten.LibraryDir()
		if err != nil {
			return "", err
		}
		return builtIn(filepath.Join(filepath.Dir(libraries), "models"), rest)
	}
	return weights.Cached(name, "")
}

// builtIn finds a model among those that come with the library. They are not embedded in the
// program: root lies beside the engine's libraries, in a source checkout (python/nnsight_go) as in
// an installed package, and without these no program runs.
func builtIn(root, model string) (string, error) {
	var names []string
	entries, _ := os.ReadDir(root) // a folder that is not there holds no models
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, builtInPrefix+e.Name())
		}
	}
	if slices.Contains(names, builtInPrefix+model) {
		return filepath.Join(root, model), nil
	}
	e := fault.New(fault.ModelLoad, "no model %q comes with the engine's libraries, which look for their models in %s",
		builtInPrefix+model, root)
	if len(names) == 0 {
		return "", e.WithHint("There are none: use the libraries where `pip install nnsight-go` or `make build` puts them, " +
			"or give the directory of a model.")
	}
	return "", e.WithHint("There is %s.", strings.Join(names, ", "))
}
