package aten

/*
#cgo CFLAGS: -D_GNU_SOURCE
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>

// Asks the loader, not the address of a function: in a program that is not position independent
// that address lies in the program itself.
static char* bridge_path(void) {
	void* library = dlopen("libnng_aten.so", RTLD_LAZY | RTLD_NOLOAD);
	if (library == NULL) return NULL;
	struct link_map* map = NULL;
	char* path = dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 ? strdup(map->l_name) : NULL;
	dlclose(library);
	return path;
}
*/
import "C"

import (
	"path/filepath"
	"unsafe"

	"github.com/nnsight-go/nnsight-go/engine/fault"
)

// LibraryDir is the folder that this process loaded the engine's C++ library from: what ships with
// the libraries, the built-in model, lies beside it.
func LibraryDir() (string, error) {
	path := C.bridge_path()
	if path == nil {
		return "", fault.New(fault.Internal, "the loader does not tell where libnng_aten.so lies")
	}
	defer C.free(unsafe.Pointer(path))
	dir, err := filepath.Abs(filepath.Dir(C.GoString(path)))
	if err != nil {
		return "", fault.New(fault.Internal, "libnng_aten.so lies in no folder that can be named: %v", err)
	}
	return dir, nil
}
