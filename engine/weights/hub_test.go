package weights

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/stretchr/testify/require"
)

var cacheVariables = []string{"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"}

// cache makes a hub cache with one repository in two revisions and points the variables at it.
func cache(t *testing.T) (root, first, second string) {
	root = t.TempDir()
	for _, name := range cacheVariables {
		t.Setenv(name, "")
	}
	t.Setenv("HF_HUB_CACHE", root)
	repo := filepath.Join(root, "models--org--name")
	commits := []string{strings.Repeat("a1", 20), strings.Repeat("b2", 20)}
	for _, commit := range commits {
		write(t, filepath.Join(repo, "snapshots", commit, "config.json"), []byte("{}"))
	}
	write(t, filepath.Join(repo, "refs", "main"), []byte(commits[0]+"\n"))
	write(t, filepath.Join(repo, "refs", "pr", "1"), []byte(commits[1]))
	return root, filepath.Join(repo, "snapshots", commits[0]), filepath.Join(repo, "snapshots", commits[1])
}

func TestCachedRevisions(t *testing.T) {
	_, first, second := cache(t)
	for rev, want := range map[string]string{"": first, "main": first, "pr/1": second, filepath.Base(second): second} {
		dir, err := Cached("org/name", rev)
		require.NoError(t, err, rev)
		require.Equal(t, want, dir)
	}
}

func TestCacheVariables(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("SOMEWHERE", "/some/where")
	for _, name := range cacheVariables {
		t.Setenv(name, "")
	}
	require.Equal(t, filepath.Join(home, ".cache/huggingface/hub"), hubCache())
	// each comes before those that were set before it
	for _, c := range []struct{ name, value, want string }{
		{"XDG_CACHE_HOME", "/x", "/x/huggingface/hub"},
		{"HF_HOME", "/h", "/h/hub"},
		{"HUGGINGFACE_HUB_CACHE", "/old", "/old"},
		{"HF_HUB_CACHE", "~/c", filepath.Join(home, "c")},
		{"HF_HUB_CACHE", "$SOMEWHERE/c", "/some/where/c"},
	} {
		t.Setenv(c.name, c.value)
		require.Equal(t, c.want, hubCache())
	}
}

func TestWhatIsNotCached(t *testing.T) {
	root, _, _ := cache(t)
	repo := filepath.Join(root, "models--org--name")
	write(t, filepath.Join(repo, "refs", "hostile"), []byte("../../../.."))
	write(t, filepath.Join(repo, "refs", "dots"), []byte(".."))
	write(t, filepath.Join(repo, "refs", "gone"), []byte(strings.Repeat("c3", 20)))
	require.NoError(t, os.MkdirAll(filepath.Join(root, "models--org--empty"), 0o755))
	for name, c := range map[string]struct{ repo, rev, says string }{
		"unknown":          {"org/other", "", "hf download org/other"},
		"unknown revision": {"org/name", "v2", "It holds"},
		"lists revisions":  {"org/name", "v2", "main, pr/1"},
		"says how":         {"org/name", "v2", "hf download org/name --revision v2"},
		"empty":            {"org/empty", "", "holds no revision main of org/empty"},
		"hostile ref":      {"org/name", "hostile", "holds no revision"},
		"dots in a ref":    {"org/name", "dots", "holds no revision"},
		"gone snapshot":    {"org/name", "gone", "holds no revision"},
		"climbing name":    {"../name", "", "there is no directory ../name"},
		"climbing, inside": {"org/..name", "", "neither a directory nor the name"},
		"climbing rev":     {"org/name", "../refs/main", "neither a directory nor the name"},
		"absolute rev":     {"org/name", "/etc", "neither a directory nor the name"},
		"path":             {"./org/name", "", "there is no directory ./org/name"},
		"absolute":         {"/no/such/model", "", "there is no directory /no/such/model"},
		"deep":             {"a/b/c", "", "there is no directory a/b/c"},
		"space":            {"org/na me", "", "neither a directory nor the name"},
		"nothing":          {"", "", "neither a directory nor the name"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Cached(c.repo, c.rev)
			require.Error(t, err)
			require.Equal(t, fault.ModelLoad, fault.As(err).Code)
			require.ErrorContains(t, err, c.says)
		})
	}
}
