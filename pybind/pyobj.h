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

/* Turns proxies (a list of instances of a torch.Tensor subclass over a placeholder) into tensors, in
 * place, keeping their identity; then sets their __class__ to cls (torch.Tensor) and clears their
 * __dict__. Either all become tensors or, where it fails, none. Where a tensor already has a Python
 * object, the proxy takes a shallow copy that shares storage, version counter, grad_fn and output
 * number. The caller keeps its handles tensors[0..len(proxies)). 0 or -1. */
int nngpy_adopt(PyObject* proxies, void* const* tensors, PyObject* cls);

// clang-format off
/* What every trace calls, as builtins by name [new reference]: a dictionary. Calling one costs a fraction
 * of what ctypes does for a call.
 *
 *   become(proxies, tensors, cls)        nngpy_adopt with Python tensors, a list
 *   proxy(cls, placeholder, rec, id)     an instance of cls, which has __torch_dispatch__, over a copy of a
 *                                        placeholder, with the attributes _rec and _id
 *   frozen(x)                            what an input is like, to be compared and hashed (frozen.h)
 *   forward(...)                         a forward pass in whose hooks the lines of a block are done (hooked.h)
 *   argument(x, rec)                     the wire form of an argument (arguments.h)
 *   store(rec, target, index, value)     records target[index] = value (arguments.h)
 *   read(rec, point, leaf)               records reading one tensor of an access point (recording.h)
 *   output(envoy), item(envoy, index), save(proxy), put(proxy, index, value), trace(model, ...)
 *                                        what the Python of these names does (recording.h, known.h), once
 *   prepare(...), remember(...)          have told what that needs
 *   recorder(_), record(_, recorder)     the recorder of the thread's block, and its change (known.h)
 *   inside(by)                           counts the blocks of the thread */
// clang-format on
PyObject* nngpy_calls(void);

/* A callable around a Python function that is no frame in tracebacks [new reference]. It binds like
 * a function. Where the function raises, cut(exception) gives the traceback to go on with, or None. */
PyObject* nngpy_boundary(PyObject* function, PyObject* cut);

void nngpy_tensor_free(void* tensor);

#ifdef __cplusplus
}
#endif
#endif
