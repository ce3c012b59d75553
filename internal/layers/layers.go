// Package layers holds the engine's packages to their import order: each may import only those
// that stand above it in [Order], so that the pure core never comes to depend on libtorch and a
// reader can go from top to bottom. The work is done by its test.
package layers

import "strings"

// Order is the engine's packages in import order. A package's subpackages (arch/gpt2) stand where
// it does and may import one another. "" is the facade, package engine itself.
var Order = []string{
	"fault", "graph", "guard", "plan", "pack", "exec", "aten", "weights", "nn", "arch", "token", "host", "gen", "remote", "", "server",
}

// Pure lists the packages that hold no tensors: neither they nor what they import may use cgo.
var Pure = []string{"fault", "graph", "guard", "plan", "pack", "exec", "nn", "arch"}

// Helper reports whether a package, by its path under engine, has only what tests share: such a
// package may import anything and is imported by tests alone.
func Helper(pkg string) bool { return strings.HasSuffix(pkg, "test") }

// Rank is a package's place in Order, or false where it has none. pkg is its path under engine.
func Rank(pkg string) (int, bool) {
	first, _, _ := strings.Cut(pkg, "/")
	for i, name := range Order {
		if first == name {
			return i, true
		}
	}
	return 0, false
}

// Allowed reports whether one package may import another, both by their paths under engine.
func Allowed(from, to string) bool {
	a, ok := Rank(from)
	b, known := Rank(to)
	return ok && known && (b < a || a == b && from != to)
}
