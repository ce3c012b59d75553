package weights

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// hubCache is the root of the local Hugging Face cache, found as huggingface_hub finds it.
func hubCache() string {
	home, _ := os.UserHomeDir()
	from := func(name string) (string, bool) {
		dir := os.ExpandEnv(os.Getenv(name))
		if dir == "~" || strings.HasPrefix(dir, "~/") {
			dir = filepath.Join(home, dir[1:])
		}
		return dir, dir != ""
	}
	for _, name := range []string{"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} {
		if dir, ok := from(name); ok {
			return dir
		}
	}
	if dir, ok := from("HF_HOME"); ok {
		return filepath.Join(dir, "hub")
	}
	if dir, ok := from("XDG_CACHE_HOME"); ok {
		return filepath.Join(dir, "huggingface", "hub")
	}
	return filepath.Join(home, ".cache", "huggingface", "hub")
}

var (
	repoID     = regexp.MustCompile(`^[\w.-]{1,96}(/[\w.-]{1,96})?$`)
	revision   = regexp.MustCompile(`^[\w./+-]+$`)
	commitHash = regexp.MustCompile(`^[0-9a-f]{40}$`)
)

// Cached finds a repository ("openai-community/gpt2") in the local Hugging Face cache and gives the
// directory of its snapshot. rev is a branch, a tag or a whole commit hash; "" is "main". Nothing is
// downloaded: the error says how to fetch the model.
func Cached(repo, rev string) (string, error) {
	if rev == "" {
		rev = "main"
	}
	if looksLikePath(repo) {
		return "", fault.New(fault.ModelLoad, "there is no directory %s", repo).WithHint("Check its name. %s", layout)
	}
	// the dots matter: both become part of a path
	if !repoID.MatchString(repo) || !revision.MatchString(rev) || strings.Contains(repo+rev, "..") || strings.HasPrefix(rev, "/") {
		return "", fault.New(fault.ModelLoad, "%q (revision %q) is neither a directory nor the name of a model", repo, rev).
			WithHint(`Names look like "openai-community/gpt2".`)
	}
	fetch := "Fetch it once with: hf download " + repo
	if rev != "main" {
		fetch += " --revision " + rev
	}
	root := filepath.Join(hubCache(), "models--"+strings.ReplaceAll(repo, "/", "--"))
	if _, err := os.Stat(root); err != nil {
		return "", fault.New(fault.ModelLoad, "there is no directory %s, and no model of that name in the local Hugging Face cache (%s)",
			repo, hubCache()).WithHint("%s", fetch)
	}
	commit := rev
	if text, err := readSmall(filepath.Join(root, "refs", filepath.FromSlash(rev))); err == nil {
		commit = strings.TrimSpace(string(text))
	}
	dir := filepath.Join(root, "snapshots", commit)
	if stat, err := os.Stat(dir); !commitHash.MatchString(commit) || err != nil || !stat.IsDir() {
		e := fault.New(fault.ModelLoad, "the local Hugging Face cache holds no revision %s of %s", rev, repo)
		if have := revisions(root); len(have) > 0 {
			return "", e.WithHint("It holds %s. %s", strings.Join(have, ", "), fetch)
		}
		return "", e.WithHint("%s", fetch)
	}
	return dir, nil
}

// looksLikePath tells what can only be meant as a directory.
func looksLikePath(name string) bool {
	return filepath.IsAbs(name) || name == "." || name == ".." || strings.HasPrefix(name, "~") ||
		strings.HasPrefix(name, "./") || strings.HasPrefix(name, "../") ||
		strings.HasSuffix(name, "/") || strings.Count(name, "/") > 1
}

// revisions names the branches, tags and commits of a repository that the cache knows.
func revisions(root string) []string {
	var names []string
	refs := filepath.Join(root, "refs")
	_ = filepath.WalkDir(refs, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if name, err := filepath.Rel(refs, path); err == nil {
				names = append(names, filepath.ToSlash(name))
			}
		}
		return nil // what cannot be read is not listed
	})
	commits, _ := os.ReadDir(filepath.Join(root, "snapshots"))
	for _, c := range commits {
		names = append(names, c.Name())
	}
	slices.Sort(names)
	return names[:min(len(names), 10)]
}
