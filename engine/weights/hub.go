package weights

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// hubCache is the root of the local Hugging Face cache, as huggingface_hub finds it.
func hubCache() string {
	for _, name := range []string{"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} {
		if dir := os.Getenv(name); dir != "" {
			return dir
		}
	}
	if home := os.Getenv("HF_HOME"); home != "" {
		return filepath.Join(home, "hub")
	}
	if cache := os.Getenv("XDG_CACHE_HOME"); cache != "" {
		return filepath.Join(cache, "huggingface", "hub")
	}
	home, _ := os.UserHomeDir()
	return filepath.Join(home, ".cache", "huggingface", "hub")
}

var (
	repoID   = regexp.MustCompile(`^[\w.-]+(/[\w.-]+)?$`)
	revision = regexp.MustCompile(`^[\w./-]+$`)
)

// Cached finds a repository ("openai-community/gpt2") in the local Hugging Face cache: the
// directory of its snapshot. rev is a branch, a tag or a commit; "" is "main".
func Cached(repo, rev string) (string, error) {
	if rev == "" {
		rev = "main"
	}
	missing := fault.New(fault.ModelLoad, "there is no directory %s, and no model of that name in the local Hugging Face cache", repo).
		WithHint("Fetch it once with: hf download %s", repo)
	if !repoID.MatchString(repo) || !revision.MatchString(rev) || strings.Contains(repo+rev, "..") {
		return "", missing
	}
	root := filepath.Join(hubCache(), "models--"+strings.ReplaceAll(repo, "/", "--"))
	commit := rev
	if text, err := os.ReadFile(filepath.Join(root, "refs", filepath.FromSlash(rev))); err == nil {
		commit = strings.TrimSpace(string(text))
	}
	dir := filepath.Join(root, "snapshots", commit)
	if stat, err := os.Stat(dir); err != nil || !stat.IsDir() || strings.ContainsAny(commit, `/\`) {
		return "", missing
	}
	return dir, nil
}
