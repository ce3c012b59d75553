package weights

import (
	"os"
	"sync"
	"syscall"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// shard is one file and its mapping, which lives while somebody uses it.
type shard struct {
	path string
	stat os.FileInfo // of the file whose header was read

	mu     sync.Mutex
	data   []byte
	users  int
	closed bool
}

// acquire maps the whole file, if it is not mapped, for one more user, who calls release once. The
// mapping is private and writable: what is written to it stays in this process, until it is unmapped.
func (s *shard) acquire() ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fault.New(fault.Handle, "the checkpoint of %s has been closed", s.path)
	}
	if s.data == nil {
		if err := s.mmap(); err != nil {
			return nil, err
		}
	}
	s.users++
	return s.data, nil
}

func (s *shard) mmap() error {
	f, stat, err := openRegular(s.path)
	if err != nil {
		return fault.New(fault.ModelLoad, "%s cannot be read any more", s.path).WithCause(err)
	}
	defer f.Close()
	// the header that was checked must be this file's
	if !os.SameFile(stat, s.stat) || stat.Size() != s.stat.Size() || !stat.ModTime().Equal(s.stat.ModTime()) {
		return fault.New(fault.ModelLoad, "%s has changed since the model was opened", s.path).WithHint("Open the model again.")
	}
	// without NORESERVE the kernel may refuse a file larger than memory, though most of it is never written
	s.data, err = syscall.Mmap(int(f.Fd()), 0, int(stat.Size()), syscall.PROT_READ|syscall.PROT_WRITE,
		syscall.MAP_PRIVATE|syscall.MAP_NORESERVE)
	if err != nil {
		return fault.New(fault.ModelLoad, "%s cannot be mapped", s.path).WithCause(err)
	}
	return nil
}

// giveBack lets the kernel have the pages that lie whole in memory of the mapping; they come back from the
// file when they are next read. Nothing may have been written to them. Other memory is left alone.
func (s *shard) giveBack(memory unsafe.Pointer, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.data == nil {
		return
	}
	start := int64(uintptr(memory)) - int64(uintptr(unsafe.Pointer(&s.data[0])))
	end := start + n
	if start < 0 || end > int64(len(s.data)) {
		return
	}
	page := int64(os.Getpagesize())
	start, end = (start+page-1)/page*page, end/page*page
	if start < end {
		_ = syscall.Madvise(s.data[start:end], syscall.MADV_DONTNEED) // they stay where it fails
	}
}

// release gives up one use; the last one unmaps the file. Any thread may call it.
func (s *shard) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users--
	if s.users == 0 {
		_ = syscall.Munmap(s.data) // fails only for addresses that are not a mapping
		s.data = nil
	}
}

// openRegular opens a file for reading. What is not a regular file is refused: opening a pipe would
// wait for ever.
func openRegular(path string) (*os.File, os.FileInfo, error) {
	stat, err := os.Stat(path)
	if err != nil {
		return nil, nil, err
	}
	if !stat.Mode().IsRegular() {
		return nil, nil, &os.PathError{Op: "open", Path: path, Err: errNotRegular}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	if stat, err = f.Stat(); err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, stat, nil
}
