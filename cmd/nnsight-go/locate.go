package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// module is the Go module that holds the engine.
const module = "github.com/nnsight-go/nnsight-go"

// places are the folders a Go build needs, as absolute paths.
type places struct {
	lib     string // libcgotorch.so, libnng_aten.so, libtokenizers.a
	archive string // libtokenizers.a as built last, in a checkout; else empty
	torch   string // torch's lib folder
}

// needed must lie in the lib folder for a Go program to link.
var needed = []string{"libcgotorch.so", "libnng_aten.so", "libtokenizers.a"}

// locate finds the folders. lib and python may be empty: then they are looked for.
func locate(lib, python string) (places, error) {
	var p places
	checkout := ""
	if lib == "" {
		checkout = findCheckout()
	}
	switch {
	case lib != "":
		p.lib = lib
	case checkout != "":
		p.lib = filepath.Join(checkout, "python", "nnsight_go", "_lib")
		// build/archive points into the build's cache, where the folder's name changes with the
		// archive: only so does Go notice that it must link again.
		if archive, err := filepath.EvalSymlinks(filepath.Join(checkout, "build", "archive")); err == nil {
			p.archive = archive
		}
		if venv := filepath.Join(checkout, ".venv", "bin", "python"); python == "" && isFile(venv) {
			python = venv
		}
	default:
		dir, err := askPython(python, "nnsight_go")
		if err != nil {
			return p, fmt.Errorf("found no engine: %w\nInstall it (pip install nnsight-go), run this inside a source checkout, or set NNSIGHT_GO_LIB", err)
		}
		p.lib = filepath.Join(dir, "_lib")
	}
	lib, err := filepath.Abs(p.lib)
	if err != nil {
		return p, err
	}
	p.lib = lib
	for _, name := range needed {
		if !isFile(filepath.Join(p.lib, name)) {
			hint := "reinstall nnsight-go"
			if checkout != "" {
				hint = "run `make build`"
			}
			return p, fmt.Errorf("%s is not in %s: %s", name, p.lib, hint)
		}
	}
	// In a wheel torch is the neighbour; RUNPATHs rely on that too.
	p.torch = filepath.Join(p.lib, "..", "..", "torch", "lib")
	if !isFile(filepath.Join(p.torch, "libtorch_cpu.so")) {
		dir, err := askPython(python, "torch")
		if err != nil {
			return p, fmt.Errorf("found no torch: %w\nInstall it: pip install 'torch==2.15.*'", err)
		}
		p.torch = filepath.Join(dir, "lib")
	}
	return p, nil
}

// findCheckout gives the root of a source checkout: around the current folder, or where the current
// module's replace directive points. Empty if there is none.
func findCheckout() string {
	dir, err := os.Getwd()
	if err != nil {
		return ""
	}
	for ; ; dir = filepath.Dir(dir) {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil {
			if strings.Contains("\n"+string(text), "\nmodule "+module+"\n") {
				return dir
			}
			break
		}
		if dir == filepath.Dir(dir) {
			return ""
		}
	}
	command := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module)
	command.Dir = dir
	out, err := command.Output()
	root := strings.TrimSpace(string(out))
	// The module cache has the sources, not the libraries.
	if _, statErr := os.Stat(filepath.Join(root, "python", "nnsight_go", "_lib")); err != nil || root == "" || statErr != nil {
		return ""
	}
	return root
}

// askPython asks a Python (python3 if empty) where a package lies, without importing it.
func askPython(python, name string) (string, error) {
	if python == "" {
		python = "python3"
	}
	const script = `import importlib.util, sys
spec = importlib.util.find_spec(sys.argv[1])
print(list(spec.submodule_search_locations)[0] if spec and spec.submodule_search_locations else "")`
	// -P: a folder of that name where we happen to stand is not the installed package.
	out, err := exec.Command(python, "-P", "-c", script, name).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return "", fmt.Errorf("%s failed: %s", python, strings.TrimSpace(string(exit.Stderr)))
		}
		return "", err
	}
	dir := strings.TrimSpace(string(out))
	if dir == "" {
		return "", fmt.Errorf("%s has no package %s", python, name)
	}
	return filepath.Abs(dir)
}

func isFile(path string) bool {
	stat, err := os.Stat(path)
	return err == nil && stat.Mode().IsRegular()
}
