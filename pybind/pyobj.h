/* pyobj.h: PyObject <-> at::Tensor (library nng_py; links libtorch_python, never libpython).
 *
 * Loaded with ctypes.PyDLL: the caller holds the global lock. Failures return null or -1 with a
 * Python exception set, which PyDLL raises.
 */
#ifndef NNG_PYOBJ_H
#define NNG_PYOBJ_H
#include <Python.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The at::Tensor behind a Python tensor [new: a handle of its own]. TypeError if o is no tensor. */
void* nngpy_unwrap(PyObject* o);

/* The Python object of a tensor [borrowed tensor, new reference]. */
PyObject* nngpy_wrap(void* tensor);

/* Turns a proxy (an instance of a torch.Tensor subclass over a placeholder) into the tensor, in
 * place, keeping its identity; then sets its __class__ to cls (torch.Tensor or Parameter) and clears
 * its __dict__. If the tensor already has a Python object, the proxy takes a shallow copy that shares
 * storage, version counter, grad_fn and output number. The caller keeps its handle. 0 or -1. */
int nngpy_adopt(PyObject* proxy, void* tensor, PyObject* cls);

void nngpy_tensor_free(void* tensor);

#ifdef __cplusplus
}
#endif
#endif
