package engine

import (
	"os"
	"path/filepath"

	"github.com/nnsight-go/nnsight-go/engine/weights"
)

// BuiltIn is the name of the small model that comes with the library.
const BuiltIn = "nnsight-go/landmarks"

// builtInDir is set by package models, which carries the built-in model.
var builtInDir func() (string, error)

// RegisterBuiltIn tells where the built-in model is found; package models calls it.
func RegisterBuiltIn(dir func() (string, error)) { builtInDir = dir }

// resolve turns a model's name into its directory.
func resolve(name string) (string, error) {
	if stat, err := os.Stat(name); err == nil && stat.IsDir() {
		return filepath.Clean(name), nil
	}
	if name == BuiltIn && builtInDir != nil {
		return builtInDir()
	}
	return weights.Cached(name, "")
}
