package weights

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// Checkpoint is the weights of a model directory. It is safe for concurrent use.
type Checkpoint struct {
	dir   string
	infos map[string]Info
	where map[string]*shard
	all   []*shard
}

// shard is one file and its mapping.
type shard struct {
	path string
	size int64

	mu     sync.Mutex
	data   []byte
	users  int // tensors alive over the mapping
	closed bool
}

// Open reads the headers of a directory's weights.
func Open(dir string) (*Checkpoint, error) {
	names, err := shardNames(dir)
	if err != nil {
		return nil, err
	}
	c := &Checkpoint{dir: dir, infos: map[string]Info{}, where: map[string]*shard{}}
	for _, name := range names {
		path := filepath.Join(dir, name)
		f, err := os.Open(path)
		if err != nil {
			return nil, fault.New(fault.ModelLoad, "%s cannot be opened", path).WithCause(err).
				WithHint("Every file that the index names must stand beside it.")
		}
		stat, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, fault.New(fault.ModelLoad, "%s cannot be read", path).WithCause(err)
		}
		infos, err := readHeader(f, stat.Size(), path)
		f.Close()
		if err != nil {
			return nil, err
		}
		s := &shard{path: path, size: stat.Size()}
		c.all = append(c.all, s)
		for _, i := range infos {
			if _, ok := c.infos[i.Name]; ok {
				return nil, fault.New(fault.ModelLoad, "tensor %q stands in %s and in %s", i.Name, c.where[i.Name].path, path)
			}
			c.infos[i.Name], c.where[i.Name] = i, s
		}
	}
	return c, nil
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

// Tensor gives a tensor over the mapped file [new]. The mapping is private and writable: changes in
// place stay in this process. Data that is not aligned to its elements is copied.
func (c *Checkpoint) Tensor(name string) (aten.Tensor, error) {
	info, ok := c.infos[name]
	if !ok {
		return aten.Tensor{}, fault.New(fault.ModelLoad, "%s has no tensor %q", c.dir, name)
	}
	s := c.where[name]
	if info.Bytes == 0 {
		return aten.FromBlob(nil, info.Shape, info.DType, nil)
	}
	data, err := s.acquire()
	if err != nil {
		return aten.Tensor{}, err
	}
	at := unsafe.Pointer(&data[info.Start])
	count := int64(1)
	for _, n := range info.Shape {
		count *= n
	}
	aligned := uintptr(at)%uintptr(info.Bytes/count) == 0
	if !aligned {
		moved := make([]byte, info.Bytes)
		copy(moved, data[info.Start:info.Start+info.Bytes])
		at = unsafe.Pointer(&moved[0])
	}
	t, err := aten.FromBlob(at, info.Shape, info.DType, s.release)
	if err != nil {
		s.release()
		return t, err
	}
	if aligned {
		return t, nil
	}
	defer t.Free()
	return aten.Clone(t)
}

// acquire maps the file, if it is not yet, for one more tensor.
func (s *shard) acquire() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fault.New(fault.Handle, "%s has been closed", s.path)
	}
	if s.data == nil {
		f, err := os.Open(s.path)
		if err != nil {
			return nil, fault.New(fault.ModelLoad, "%s cannot be opened any more", s.path).WithCause(err)
		}
		defer f.Close()
		if stat, err := f.Stat(); err != nil || stat.Size() != s.size {
			return nil, fault.New(fault.ModelLoad, "%s has changed since the model was opened", s.path).
				WithHint("Open the model again.")
		}
		s.data, err = syscall.Mmap(int(f.Fd()), 0, int(s.size), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE)
		if err != nil {
			return nil, fault.New(fault.ModelLoad, "%s cannot be mapped", s.path).WithCause(err)
		}
	}
	s.users++
	return s.data, nil
}

// release gives up one tensor's use of the mapping.
func (s *shard) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users--
	s.unmap()
}

func (s *shard) unmap() {
	if s.closed && s.users == 0 && s.data != nil {
		_ = syscall.Munmap(s.data) // fails only for addresses that are not a mapping
		s.data = nil
	}
}

// Close forgets the mappings; those that tensors still use go when the last of them dies.
func (c *Checkpoint) Close() {
	for _, s := range c.all {
		s.mu.Lock()
		s.closed = true
		s.unmap()
		s.mu.Unlock()
	}
}
