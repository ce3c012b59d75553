package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// installed makes a folder of libraries with torch's beside it, as a wheel has them. The folder's
// name is one that shells and Go's flags must quote.
func installed(t *testing.T) (lib, torch string) {
	root := filepath.Join(t.TempDir(), "it's here")
	lib, torch = filepath.Join(root, "nnsight_go", "_lib"), filepath.Join(root, "torch", "lib")
	for _, file := range append([]string{filepath.Join(torch, "libtorch_cpu.so")}, in(lib, needed)...) {
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, nil, 0o644))
	}
	return lib, torch
}

func in(dir string, names []string) (paths []string) {
	for _, name := range names {
		paths = append(paths, filepath.Join(dir, name))
	}
	return paths
}

// nnsightGo runs the command in an empty folder.
func nnsightGo(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Chdir(t.TempDir())
	var out, err bytes.Buffer
	status = run(args, &out, &err)
	return status, out.String(), err.String()
}

func TestEnv(t *testing.T) {
	lib, torch := installed(t)
	t.Setenv("CGO_LDFLAGS", "-O1 -L/elsewhere")
	status, stdout, stderr := nnsightGo(t, "env", "--lib", lib)
	require.Zero(t, status, stderr)

	// what it prints is for a shell to evaluate, and for Go to split as it does
	shell := exec.Command("sh", "-c", stdout+`printf '%s\n%s' "$CGO_ENABLED" "$CGO_LDFLAGS"`)
	told, err := shell.Output()
	require.NoError(t, err)
	enabled, flags, _ := strings.Cut(string(told), "\n")
	require.Equal(t, "1", enabled)
	require.Equal(t, []string{"-L" + lib, "-L" + torch, "-Wl,-rpath," + lib, "-Wl,-rpath," + torch, "-O1", "-L/elsewhere"}, split(flags))

	status, stdout, _ = nnsightGo(t, "env", "--json", "--lib", lib)
	require.Zero(t, status)
	var vars map[string]string
	require.NoError(t, json.Unmarshal([]byte(stdout), &vars))
	require.Equal(t, map[string]string{"CGO_ENABLED": "1", "CGO_LDFLAGS": flags}, vars)

	t.Setenv("NNSIGHT_GO_LIB", lib) // instead of --lib
	_, again, _ := nnsightGo(t, "env", "--json")
	require.Equal(t, stdout, again)
}

// split cuts flags at spaces outside quotes, as Go does with CGO_LDFLAGS.
func split(s string) (words []string) {
	quote, word := rune(0), ""
	for _, c := range s + " " {
		switch {
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
		case c == quote:
			quote = 0
		case quote == 0 && c == ' ':
			words, word = append(words, word), ""
		default:
			word += string(c)
		}
	}
	return words
}

func TestEnvTwice(t *testing.T) {
	t.Setenv("CGO_LDFLAGS", "")
	dir := t.TempDir()
	p := places{lib: filepath.Join(dir, "lib"), archive: filepath.Join(dir, "archive"), torch: filepath.Join(dir, "torch")}
	first := p.environment("")["CGO_LDFLAGS"]
	require.True(t, strings.HasPrefix(first, "-L"+p.archive+" "), "the archive as built last comes first: %s", first)
	require.Contains(t, split(first), "-g", "what Go takes where nothing is set")
	require.Equal(t, first, p.environment(first)["CGO_LDFLAGS"], "a second eval adds nothing")
}

func TestEnvFails(t *testing.T) {
	lib, torch := installed(t)
	require.NoError(t, os.Remove(filepath.Join(lib, "libnng_aten.so")))
	status, stdout, stderr := nnsightGo(t, "env", "--lib", lib)
	require.Equal(t, 1, status)
	require.Empty(t, stdout, "nothing that a shell would evaluate")
	require.Contains(t, stderr, "libnng_aten.so is not in "+lib)

	require.NoError(t, os.WriteFile(filepath.Join(lib, "libnng_aten.so"), nil, 0o644))
	require.NoError(t, os.RemoveAll(torch))
	status, _, stderr = nnsightGo(t, "env", "--lib", lib, "--python", "/no/such/python")
	require.Equal(t, 1, status)
	require.Contains(t, stderr, "found no torch")

	t.Setenv("NNSIGHT_GO_LIB", "")
	status, _, stderr = nnsightGo(t, "env", "--python", "/no/such/python")
	require.Equal(t, 1, status)
	require.Contains(t, stderr, "found no engine")
	require.Contains(t, stderr, "NNSIGHT_GO_LIB")
}

func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args   []string
		status int
		says   string
	}{
		{nil, 2, "usage: nnsight-go"},
		{[]string{"nope"}, 2, `no subcommand "nope"`},
		{[]string{"help"}, 0, "env"},
		{[]string{"env", "--help"}, 0, `eval "$(nnsight-go env)"`},
		{[]string{"env", "stray"}, 2, `unexpected argument "stray"`},
		{[]string{"env", "--stray"}, 2, "stray"},
	} {
		status, stdout, stderr := nnsightGo(t, c.args...)
		require.Equal(t, c.status, status, c.args)
		require.Contains(t, stdout+stderr, c.says)
	}
}

// In a checkout, and in a module that replaces the engine by one, the checkout's libraries are meant.
func TestEnvFindsTheCheckout(t *testing.T) {
	root := t.TempDir()
	lib := filepath.Join(root, "python", "nnsight_go", "_lib")
	torch := filepath.Join(root, "python", "torch", "lib") // stands in for the one in .venv
	for _, file := range append([]string{filepath.Join(torch, "libtorch_cpu.so"), filepath.Join(root, "engine", "x.go")}, in(lib, needed)...) {
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, nil, 0o644))
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "go.mod"), []byte("module "+module+"\n\ngo 1.26\n"), 0o644))
	archive := filepath.Join(t.TempDir(), "hash")
	require.NoError(t, os.Mkdir(archive, 0o755))
	require.NoError(t, os.Mkdir(filepath.Join(root, "build"), 0o755))
	require.NoError(t, os.Symlink(archive, filepath.Join(root, "build", "archive")))
	want, err := filepath.EvalSymlinks(root)
	require.NoError(t, err)

	found := func(dir string) places {
		t.Chdir(dir)
		p, err := locate("", "")
		require.NoError(t, err)
		return p
	}
	p := found(filepath.Join(root, "engine"))
	require.Equal(t, filepath.Join(want, "python", "nnsight_go", "_lib"), p.lib)
	require.Equal(t, archive, p.archive)

	user := t.TempDir()
	text := "module example.com/user\n\ngo 1.26\n\nrequire " + module + " v0.0.0\n\nreplace " + module + " => " + root + "\n"
	require.NoError(t, os.WriteFile(filepath.Join(user, "go.mod"), []byte(text), 0o644))
	t.Setenv("GOFLAGS", "-mod=mod")
	require.Equal(t, lib, found(user).lib)
}
