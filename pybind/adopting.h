// Proxies become tensors.
#pragma once

#include <ATen/ATen.h>
#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pyobject_preservation.h>

#include <algorithm>
#include <vector>

#include "python.h"

namespace adopting {

using at::Tensor;
using python::Object;

// Another TensorImpl for the same tensor: it shares storage and version counter, and takes part in
// autograd as the same output of the same node. A leaf that requires grad has no node to share, so
// its alias is a view recorded by autograd: gradients reach the leaf through it.
inline Tensor alias_of(const Tensor& t) {
  if (t.requires_grad() && t.grad_fn() == nullptr) return t.view_as(t);
  auto impl = t.unsafeGetTensorImpl()->shallow_copy_and_detach(
      /*version_counter=*/t.is_inference() ? c10::VariableVersion() : t.unsafeGetTensorImpl()->version_counter(),
      /*allow_tensor_metadata_change=*/true);
  Tensor copy(std::move(impl));
  if (t.grad_fn() != nullptr) {
    torch::autograd::impl::set_gradient_edge(copy, torch::autograd::impl::gradient_edge(t));
    if (t.retains_grad()) {
      copy.retain_grad();
      copy.mutable_grad() = t.grad();
    }
  }
  return copy;
}

// A Python tensor and its TensorImpl own each other in turn: the object's cdata always holds the
// impl, and the impl's slot points back at the object; while C++ holds the impl too (use count over
// one) the impl owns a reference on the object, so that the object's attributes outlive Python's
// last name for it. Exchanging the impls of two objects therefore exchanges the cdata pointers and
// the slots, and then moves those owned references to the objects the impls now belong to.
inline void exchange(PyObject* proxy, PyObject* wrapper) {
  auto* p = reinterpret_cast<THPVariable*>(proxy);
  auto* w = reinterpret_cast<THPVariable*>(wrapper);
  at::TensorImpl* placeholder = p->cdata.unsafeGetTensorImpl();
  at::TensorImpl* impl = w->cdata.unsafeGetTensorImpl();
  bool placeholder_owns = p->cdata.use_count() > 1;
  bool impl_owns = w->cdata.use_count() > 1;
  std::swap_ranges(reinterpret_cast<char*>(&p->cdata), reinterpret_cast<char*>(&p->cdata) + sizeof(p->cdata),
                   reinterpret_cast<char*>(&w->cdata));
  impl->pyobj_slot()->store_pyobj(proxy);
  placeholder->pyobj_slot()->store_pyobj(wrapper);
  if (impl_owns) {
    Py_INCREF(proxy);
    Py_DECREF(wrapper);
  }
  if (placeholder_owns) {
    Py_INCREF(wrapper);
    Py_DECREF(proxy);
  }
}

// Gives objects a class: all of them or, with an error, none.
inline bool set_class(PyObject* objects, PyObject* cls) {
  static PyObject* const kind = PyUnicode_InternFromString("__class__");
  std::vector<Object> before;
  Py_ssize_t n = PyList_GET_SIZE(objects);
  before.reserve(n);
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject* object = PyList_GET_ITEM(objects, i);
    before.push_back(python::owned(reinterpret_cast<PyObject*>(Py_TYPE(object))));
    if (PyObject_SetAttr(object, kind, cls) == 0) continue;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    while (i-- > 0)
      if (PyObject_SetAttr(PyList_GET_ITEM(objects, i), kind, before[i].get()) != 0) PyErr_Clear();
    PyErr_Restore(type, value, traceback);
    return false;
  }
  return true;
}

// Exchanges the impls of proxies with those of other objects, wrapped(i). Everything that can fail comes first, so that
// either all proxies become tensors or none does.
template <typename Wrapped>
int exchange_all(PyObject* proxies, PyObject* cls, Wrapped wrapped) {
  if (!PyList_Check(proxies) || !PyType_Check(cls)) {
    PyErr_SetString(PyExc_TypeError, "a list of proxies and a class are needed");
    return -1;
  }
  Py_ssize_t n = PyList_GET_SIZE(proxies);
  std::vector<Object> wrappers;
  wrappers.reserve(n);
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject* proxy = PyList_GET_ITEM(proxies, i);
    if (!python::is_tensor(proxy)) {
      PyErr_Format(PyExc_TypeError, "only a torch.Tensor can become one, not a %s", Py_TYPE(proxy)->tp_name);
      return -1;
    }
    wrappers.push_back(wrapped(i));
    if (!wrappers.back()) return -1;
  }
  if (!set_class(proxies, cls)) return -1;
  for (Py_ssize_t i = 0; i < n; i++) exchange(PyList_GET_ITEM(proxies, i), wrappers[i].get());
  for (Py_ssize_t i = 0; i < n; i++) {
    Object dict(PyObject_GenericGetDict(PyList_GET_ITEM(proxies, i), nullptr));
    if (dict)
      PyDict_Clear(dict.get());
    else
      PyErr_Clear();
  }
  return 0;
}

// A tensor of this class that only one reference in Python, which is about to go, holds: its object may be given up.
// Not so what a weak reference could still bring back, and what its alias would differ from: a view, which torch lets
// be changed in place only in part, a leaf that requires grad, and what has hooks, which its object holds.
inline bool is_spare(PyObject* tensor, PyObject* cls) {
  auto* variable = reinterpret_cast<THPVariable*>(tensor);
  const Tensor& t = variable->cdata;
  return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == cls && Py_REFCNT(tensor) == 1 && t.use_count() == 1 &&
         variable->backward_hooks == nullptr && *PyObject_GET_WEAKREFS_LISTPTR(tensor) == nullptr && !t.is_view() &&
         (t.grad_fn() != nullptr || !t.requires_grad());
}

// Makes proxies the tensors of other objects, source(i), which stay as they are unless they are spare.
template <typename Source>
int adopt_objects(PyObject* proxies, PyObject* cls, Source source) {
  auto wrapped = [&](Py_ssize_t i) {
    PyObject* tensor = source(i);
    return is_spare(tensor, cls) ? python::owned(tensor)
                                 : Object(THPVariable_Wrap(alias_of(THPVariable_Unpack(tensor))));
  };
  return exchange_all(proxies, cls, wrapped);
}

// Makes proxies tensors, source(i).
template <typename Source>
int adopt(PyObject* proxies, PyObject* cls, Source source) {
  auto wrapped = [&](Py_ssize_t i) {
    Tensor real = source(i);
    // A tensor that has a Python object already (an earlier wrapper here among them) keeps it.
    if (real.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() != nullptr) real = alias_of(real);
    return Object(THPVariable_Wrap(real));
  };
  return exchange_all(proxies, cls, wrapped);
}

}  // namespace adopting
