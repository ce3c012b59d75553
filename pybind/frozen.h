// What an input is like, to be compared and hashed.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "python.h"

namespace frozen {

using python::guarded;
using python::Object;

inline Object of(PyObject* x);

inline bool is_plain(PyObject* x) { return x == Py_None || PyLong_Check(x) || PyFloat_Check(x) || PyUnicode_Check(x); }

// Nested tensors and those of symbolic sizes have none that could be compared.
inline bool has_sizes(const at::Tensor& t) {
  return !t.is_nested() && !t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

inline Object of_tensor(const at::Tensor& t) {
  std::vector<int64_t> facts{static_cast<int64_t>(t.scalar_type()), static_cast<int64_t>(t.device().type()),
                             t.device().index()};
  facts.insert(facts.end(), t.sizes().begin(), t.sizes().end());
  return Object(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(facts.data()),
                                          static_cast<Py_ssize_t>(facts.size() * sizeof(int64_t))));
}

inline Object of_items(PyObject* x) {
  Object items(PySequence_Fast(x, "a sequence is needed"));
  if (!items) return nullptr;
  Py_ssize_t n = PySequence_Fast_GET_SIZE(items.get());
  Object out(PyTuple_New(n + 1));
  if (!out) return nullptr;
  PyTuple_SET_ITEM(out.get(), 0, Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(x))));
  for (Py_ssize_t i = 0; i < n; i++) {
    Object part = of(PySequence_Fast_GET_ITEM(items.get(), i));
    if (!part) return nullptr;
    PyTuple_SET_ITEM(out.get(), i + 1, part.release());
  }
  return out;
}

inline Object of_fields(PyObject* x) {
  Object out(PyList_New(0));
  PyObject *key, *value;
  for (Py_ssize_t at = 0; out && PyDict_Next(x, &at, &key, &value);) {
    Object part = of(value);
    Object pair(part ? PyTuple_Pack(2, key, part.get()) : nullptr);
    if (!pair || PyList_Append(out.get(), pair.get()) != 0) return nullptr;
  }
  return Object(out ? PyList_AsTuple(out.get()) : nullptr);
}

inline Object of(PyObject* x) {
  if (is_plain(x)) return python::owned(x);
  if (PyTuple_Check(x) || PyList_Check(x)) {
    if (Py_EnterRecursiveCall(" in an input")) return nullptr;
    Object out = of_items(x);
    Py_LeaveRecursiveCall();
    return out;
  }
  if (PyDict_Check(x)) {
    if (Py_EnterRecursiveCall(" in an input")) return nullptr;
    Object out = of_fields(x);
    Py_LeaveRecursiveCall();
    return out;
  }
  if (python::is_tensor(x) && has_sizes(THPVariable_Unpack(x))) return of_tensor(THPVariable_Unpack(x));
  return Object(PyLong_FromVoidPtr(x));
}

// frozen(x): sizes, dtypes and devices of tensors, plain values, containers; of all else, which it is.
inline PyObject* frozen(PyObject*, PyObject* x) {
  return guarded<PyObject*>(nullptr, [&] { return of(x).release(); });
}

}  // namespace frozen
