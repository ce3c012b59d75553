// Package weights reads model directories in Hugging Face's layout: config.json, safetensors in one
// file or in shards, and the local hub cache.
//
// Phases: [ReadConfig] and [Open] read the config and the headers only, so that a directory of any
// size opens in milliseconds; [Checkpoint.Match] compares what an architecture expects with what is
// there; [Checkpoint.Tensor] lends tensors over a private mapping of the file, without a copy.
//
// Ownership: a file is mapped when its first tensor is asked for and unmapped when the last of them
// dies, closed checkpoint or not. No finalizer takes part. Everything is safe for concurrent use.
//
// Errors are *fault.Error of code ModelLoad that name the file and say what to do.
package weights

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/weights/safetensors"
)

// Info describes a tensor of a checkpoint.
type Info = safetensors.Info

// Checkpoint is the weights of a model directory.
type Checkpoint struct {
	dir   string
	infos map[string]Info
	where map[string]*shard
	all   []*shard
}

const (
	again  = "It may be corrupt or cut short: copy or download it again."
	layout = "A model directory holds config.json, tokenizer.json and model.safetensors " +
		"(or model.safetensors.index.json with its shards)."
)

// Open reads the headers of a directory's weights.
func Open(dir string) (*Checkpoint, error) {
	index, err := readIndex(dir)
	if err != nil {
		return nil, err
	}
	c := &Checkpoint{dir: dir, infos: map[string]Info{}, where: map[string]*shard{}}
	for _, name := range index.files {
		if err := c.add(name); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(index.place)) {
		file := filepath.Join(dir, index.place[name])
		if s, ok := c.where[name]; !ok || s.path != file {
			return nil, fault.New(fault.ModelLoad, "%s holds no tensor %q, though %s says so", file, name, indexFile).
				WithHint("The index and its shards do not belong together: copy or download all of them again.")
		}
	}
	return c, nil
}

// add reads the header of one file of the directory.
func (c *Checkpoint) add(name string) error {
	path := filepath.Join(c.dir, name)
	f, stat, err := openRegular(path)
	if os.IsNotExist(err) {
		if target, linkErr := os.Readlink(path); linkErr == nil {
			return fault.New(fault.ModelLoad, "%s is a link to %s, which does not exist", path, target).WithHint("Download the model again.")
		}
		return fault.New(fault.ModelLoad, "%s is missing", path).
			WithHint("%s names it: every shard must stand beside the index. Copy or download it again.", indexFile)
	}
	if err != nil {
		return fault.New(fault.ModelLoad, "%s cannot be read", path).WithCause(err)
	}
	defer f.Close()
	infos, err := safetensors.Read(f, stat.Size())
	if err != nil {
		return fault.New(fault.ModelLoad, "%s is not a sound safetensors file: %v", path, err).WithHint("%s", hintFor(f))
	}
	s := &shard{path: path, stat: stat}
	c.all = append(c.all, s)
	for _, i := range infos {
		if other, ok := c.where[i.Name]; ok {
			return fault.New(fault.ModelLoad, "tensor %q stands in %s and in %s", i.Name, other.path, path).
				WithHint("Each tensor may stand in one shard only: copy or download the model again.")
		}
		c.infos[i.Name], c.where[i.Name] = i, s
	}
	return nil
}

// hintFor looks at what a file that is no safetensors file begins with.
func hintFor(f *os.File) string {
	head := make([]byte, 64)
	n, _ := f.ReadAt(head, 0)
	if bytes.HasPrefix(head[:n], []byte("version https://git-lfs")) {
		return "It is a Git LFS pointer, which stands for the file: fetch it with git lfs pull, or with hf download."
	}
	return again
}

// Names lists the tensors, sorted.
func (c *Checkpoint) Names() []string { return slices.Sorted(maps.Keys(c.infos)) }

// Info describes a tensor.
func (c *Checkpoint) Info(name string) (Info, bool) {
	i, ok := c.infos[name]
	return i, ok
}

// Bytes is how much all tensors take.
func (c *Checkpoint) Bytes() int64 {
	total := int64(0)
	for _, i := range c.infos {
		total += i.Bytes
	}
	return total
}

// Match finds each expected tensor among those of the checkpoint, see [Match].
func (c *Checkpoint) Match(specs []Spec, o MatchOptions) (map[string]string, error) {
	return Match(specs, c.infos, o)
}

// SameData reports whether two tensors hold equal bytes. It reads both, up to the first difference.
// Old checkpoints hold a tied tensor twice; one that differs is not tied, whatever the config says.
func (c *Checkpoint) SameData(a, b string) (bool, error) {
	x, y := c.infos[a], c.infos[b]
	if x.DType != y.DType || !slices.Equal(x.Shape, y.Shape) {
		return false, nil
	}
	left, releaseLeft, err := c.bytes(a)
	if err != nil {
		return false, err
	}
	defer releaseLeft()
	right, releaseRight, err := c.bytes(b)
	if err != nil {
		return false, err
	}
	defer releaseRight()
	return bytes.Equal(left, right), nil
}

// bytes lends a tensor's data until release is called.
func (c *Checkpoint) bytes(name string) (data []byte, release func(), err error) {
	info, ok := c.infos[name]
	if !ok {
		return nil, nil, fault.New(fault.ModelLoad, "%s has no tensor %q", c.dir, name)
	}
	s := c.where[name]
	mapped, err := s.acquire()
	if err != nil {
		return nil, nil, err
	}
	return mapped[info.Start : info.Start+info.Bytes], s.release, nil
}

// Close ends the lending of tensors. Those handed out stay valid, and the mapping below them.
func (c *Checkpoint) Close() {
	for _, s := range c.all {
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
	}
}
