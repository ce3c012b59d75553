#include "pyobj.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pyobject_preservation.h>

#include <algorithm>
#include <vector>

#include "adopting.h"
#include "arguments.h"
#include "boundary.h"
#include "frozen.h"
#include "hooked.h"
#include "known.h"
#include "python.h"
#include "recording.h"

namespace {

using adopting::adopt;
using at::Tensor;
using python::fast;
using python::guarded;
using python::is_tensor;
using python::Object;

Tensor& as_tensor(void* t) { return *static_cast<Tensor*>(t); }

PyObject* become(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count != 3 || !PyList_Check(args[0]) || !PyList_Check(args[1]) ||
        PyList_GET_SIZE(args[0]) != PyList_GET_SIZE(args[1])) {
      PyErr_SetString(PyExc_TypeError, "a list of proxies, one of as many tensors and a class are needed");
      return nullptr;
    }
    PyObject* tensors = args[1];
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); i++) {
      PyObject* tensor = PyList_GET_ITEM(tensors, i);
      if (!is_tensor(tensor)) {
        PyErr_Format(PyExc_TypeError, "a proxy cannot become a %s", Py_TYPE(tensor)->tp_name);
        return nullptr;
      }
    }
    auto source = [&](Py_ssize_t i) { return THPVariable_Unpack(PyList_GET_ITEM(tensors, i)); };
    if (adopt(args[0], args[2], source) != 0) return nullptr;
    Py_RETURN_NONE;
  });
}

PyObject* proxy(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count != 4 || !PyType_Check(args[0]) || !is_tensor(args[1])) {
      PyErr_SetString(PyExc_TypeError, "a class, a placeholder, a recorder and a number are needed");
      return nullptr;
    }
    return recording::make(args[0], args[1], args[2], args[3]).release();
  });
}

}  // namespace

extern "C" {

void* nngpy_unwrap(PyObject* o) {
  return guarded<void*>(nullptr, [&]() -> void* {
    if (!is_tensor(o)) {
      PyErr_Format(PyExc_TypeError, "a torch.Tensor is needed, not a %s", Py_TYPE(o)->tp_name);
      return nullptr;
    }
    return new Tensor(THPVariable_Unpack(o));
  });
}

PyObject* nngpy_wrap(void* tensor) {
  return guarded<PyObject*>(nullptr, [&] { return THPVariable_Wrap(as_tensor(tensor)); });
}

int nngpy_adopt(PyObject* proxies, void* const* tensors, PyObject* cls) {
  return guarded<int>(-1, [&] { return adopt(proxies, cls, [&](Py_ssize_t i) { return as_tensor(tensors[i]); }); });
}

PyObject* nngpy_calls() {
  static PyMethodDef calls[] = {{"become", fast(become), METH_FASTCALL, nullptr},
                                {"proxy", fast(proxy), METH_FASTCALL, nullptr},
                                {"frozen", frozen::frozen, METH_O, nullptr},
                                {"forward", fast(hooked::forward), METH_FASTCALL, nullptr},
                                {"prepare", fast(recording::prepare), METH_FASTCALL, nullptr},
                                {"argument", fast(arguments::argument), METH_FASTCALL, nullptr},
                                {"store", fast(arguments::store), METH_FASTCALL, nullptr},
                                {"item", fast(recording::item), METH_FASTCALL, nullptr},
                                {"read", fast(recording::read_leaf), METH_FASTCALL, nullptr},
                                {"output", known::output, METH_O, nullptr},
                                {"save", known::save, METH_O, nullptr},
                                {"put", fast(known::put), METH_FASTCALL, nullptr},
                                {"trace", fast(known::trace), METH_FASTCALL | METH_KEYWORDS, nullptr},
                                {"recorder", known::recorder, METH_O, nullptr},
                                {"record", fast(known::record), METH_FASTCALL, nullptr},
                                {"remember", fast(known::remember), METH_FASTCALL, nullptr},
                                {"inside", known::inside, METH_O, nullptr}};
  if (!recording::ready()) return nullptr;
  Object out(PyDict_New());
  for (PyMethodDef& call : calls) {
    Object function(PyCFunction_New(&call, nullptr));
    if (!out || !function || PyDict_SetItemString(out.get(), call.ml_name, function.get()) != 0) return nullptr;
  }
  return out.release();
}

PyObject* nngpy_boundary(PyObject* function, PyObject* cut) {
  return guarded<PyObject*>(nullptr, [&] { return boundary::make(function, cut); });
}

void nngpy_tensor_free(void* tensor) { delete static_cast<Tensor*>(tensor); }

}  // extern "C"
