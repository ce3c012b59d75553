// Forward passes of which a block only keeps what modules give.
#pragma once

#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "adopting.h"
#include "python.h"

namespace looking {

using python::fast;
using python::guarded;
using python::Object;

// The hook of one module. Its self is a tuple: the thread of the pass, where what the module gives is put, and at
// which place. It keeps what the first call gives.
inline PyObject* hook(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  enum { kThread, kFound, kPlace };
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "a hook is called with a module, its arguments and its output");
    return nullptr;
  }
  if (PyLong_AsUnsignedLong(PyTuple_GET_ITEM(self, kThread)) != PyThread_get_thread_ident()) Py_RETURN_NONE;
  PyObject* found = PyTuple_GET_ITEM(self, kFound);
  Py_ssize_t place = PyLong_AsSsize_t(PyTuple_GET_ITEM(self, kPlace));
  if (PyList_GET_ITEM(found, place) == Py_Ellipsis) {
    Py_INCREF(args[2]);
    if (PyList_SetItem(found, place, args[2]) != 0) return nullptr;
  }
  Py_RETURN_NONE;
}

// The hook that `keep` gives. Its self is a tuple: the thread, and what `keep` was given.
inline PyObject* kept(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  enum { kThread, kMissing, kKey, kValues, kIds, kVisit, kSpot };
  auto own = [&](int i) { return PyTuple_GET_ITEM(self, i); };
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "a hook is called with a module, its arguments and its output");
    return nullptr;
  }
  if (PyLong_AsUnsignedLong(own(kThread)) != PyThread_get_thread_ident()) Py_RETURN_NONE;
  int missing = PyDict_Contains(own(kMissing), own(kKey));
  if (missing < 0) return nullptr;
  if (missing == 0) Py_RETURN_NONE;  // a later call
  if (!THPVariable_Check(args[2])) return PyObject_CallFunctionObjArgs(own(kVisit), own(kSpot), args[2], nullptr);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(own(kIds)); i++)
    if (PyDict_SetItem(own(kValues), PyList_GET_ITEM(own(kIds), i), args[2]) != 0) return nullptr;
  if (PyDict_DelItem(own(kMissing), own(kKey)) != 0) return nullptr;
  Py_RETURN_NONE;
}

// keep(missing, key, values, ids, visit, spot): a hook for a pass in which more happens than that.
inline PyObject* keep(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyMethodDef hook = {"keep", fast(kept), METH_FASTCALL, nullptr};
  if (count != 6 || !PyDict_Check(args[0]) || !PyDict_Check(args[2]) || !PyList_Check(args[3])) {
    PyErr_SetString(PyExc_TypeError, "dict missing, key, dict values, list ids, visit and spot are needed");
    return nullptr;
  }
  Object thread(PyLong_FromUnsignedLong(PyThread_get_thread_ident()));
  if (!thread) return nullptr;
  Object own(PyTuple_Pack(7, thread.get(), args[0], args[1], args[2], args[3], args[4], args[5]));
  return own ? PyCFunction_New(&hook, own.get()) : nullptr;
}

// Hooks that stand in tables of modules. They go when it does.
class Mounted {
 public:
  Mounted() = default;
  Mounted(const Mounted&) = delete;
  ~Mounted() {
    PyObject *type, *value, *traceback;  // an error of the pass goes on as it is
    PyErr_Fetch(&type, &value, &traceback);
    for (auto& [table, hook] : all_)
      if (PyObject_DelItem(table.get(), hook.get()) != 0) PyErr_Clear();  // the pass has cleared it itself
    PyErr_Restore(type, value, traceback);
  }

  bool put(PyObject* module, PyObject* own) {
    static PyMethodDef method = {"look", fast(hook), METH_FASTCALL, nullptr};
    static PyObject* const hooks = PyUnicode_InternFromString("_forward_hooks");
    Object table(PyObject_GetAttr(module, hooks));
    Object made(table ? PyCFunction_New(&method, own) : nullptr);
    if (!made || PyObject_SetItem(table.get(), made.get(), made.get()) != 0) return false;
    all_.emplace_back(std::move(table), std::move(made));
    return true;
  }

 private:
  std::vector<std::pair<Object, Object>> all_;
};

// look(modules, call, args, kwargs, kept, proxies, cls): call(*args, **kwargs), after which each proxy is the tensor
// that the module of the number kept[i] has given when it was first called, on this thread; then None. Where one has
// given something else, a list of what all have given, ... for one that was not called: no proxy has become anything.
inline PyObject* look(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count != 7 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[2]) || !PyDict_Check(args[3]) ||
        !PyList_Check(args[4]) || !PyList_Check(args[5]) || PyList_GET_SIZE(args[4]) != PyList_GET_SIZE(args[5])) {
      PyErr_SetString(PyExc_TypeError,
                      "tuple modules, a callable, tuple args, dict kwargs, lists kept and proxies and a class are needed");
      return nullptr;
    }
    Py_ssize_t n = PyTuple_GET_SIZE(args[0]);
    Object found(PyList_New(n)), thread(PyLong_FromUnsignedLong(PyThread_get_thread_ident()));
    if (!found || !thread) return nullptr;
    for (Py_ssize_t i = 0; i < n; i++) {
      Py_INCREF(Py_Ellipsis);
      PyList_SET_ITEM(found.get(), i, Py_Ellipsis);
    }
    {
      Mounted mounted;
      for (Py_ssize_t i = 0; i < n; i++) {
        Object place(PyLong_FromSsize_t(i));
        Object own(place ? PyTuple_Pack(3, thread.get(), found.get(), place.get()) : nullptr);
        if (!own || !mounted.put(PyTuple_GET_ITEM(args[0], i), own.get())) return nullptr;
      }
      Object out(PyObject_Call(args[1], args[2], args[3]));
      if (!out) return nullptr;
    }
    for (Py_ssize_t i = 0; i < n; i++)
      if (!THPVariable_Check(PyList_GET_ITEM(found.get(), i))) return found.release();
    std::vector<PyObject*> values;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[4]); i++) {
      Py_ssize_t number = PyLong_AsSsize_t(PyList_GET_ITEM(args[4], i));
      if (number < 0 || number >= n) {
        PyErr_SetString(PyExc_IndexError, "there is no module of that number");
        return nullptr;
      }
      values.push_back(PyList_GET_ITEM(found.get(), number));
    }
    auto source = [&](Py_ssize_t i) { return THPVariable_Unpack(values[i]); };
    if (adopting::adopt(args[5], args[6], source) != 0) return nullptr;
    Py_RETURN_NONE;
  });
}

}  // namespace looking
