package aten

// #include "aten.h"
import "C"

// CapMemory bounds the memory of the process's CPU tensors: bytes more than there are now, or as much as there is
// where bytes is negative. An operator that needs more fails as one does that is given wrong sizes. Counting begins
// with the first call, and goes on; what was made before it is not counted, nor is what libraries use for the length
// of an operator, nor memory that was only lent (FromBlob).
func CapMemory(bytes int64) error {
	var msg *C.char
	if C.nnga_cap_memory(C.int64_t(bytes), &msg) != 0 {
		return opError("", msg)
	}
	return nil
}

// Allocated is the bytes of CPU tensors made since CapMemory was first called.
func Allocated() int64 { return int64(C.nnga_allocated()) }

// PeakAllocated is the most that Allocated has been since the last CapMemory.
func PeakAllocated() int64 { return int64(C.nnga_peak_allocated()) }
