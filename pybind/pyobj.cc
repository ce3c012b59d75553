#include "pyobj.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pyobject_preservation.h>

#include <algorithm>
#include <vector>

#include "boundary.h"
#include "looking.h"
#include "python.h"
#include "recording.h"

namespace {

using at::Tensor;
using python::fast;
using python::guarded;
using python::Object;

Tensor& as_tensor(void* t) { return *static_cast<Tensor*>(t); }

// Another TensorImpl for the same tensor: it shares storage and version counter, and takes part in
// autograd as the same output of the same node. A leaf that requires grad has no node to share, so
// its alias is a view recorded by autograd: gradients reach the leaf through it.
Tensor alias_of(const Tensor& t) {
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
void exchange(PyObject* proxy, PyObject* wrapper) {
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

// Everything that can fail comes first, so that either all proxies become tensors or none does.
template <typename Source>
int adopt(PyObject* proxies, PyObject* cls, Source source) {
  if (!PyList_Check(proxies) || !PyType_Check(cls)) {
    PyErr_SetString(PyExc_TypeError, "a list of proxies and a class are needed");
    return -1;
  }
  Py_ssize_t n = PyList_GET_SIZE(proxies);
  std::vector<Object> wrappers;
  wrappers.reserve(n);
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject* proxy = PyList_GET_ITEM(proxies, i);
    if (!THPVariable_Check(proxy)) {
      PyErr_Format(PyExc_TypeError, "only a torch.Tensor can become one, not a %s", Py_TYPE(proxy)->tp_name);
      return -1;
    }
    Tensor real = source(i);
    // A tensor that has a Python object already (an earlier wrapper here among them) keeps it.
    if (real.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() != nullptr) real = alias_of(real);
    wrappers.emplace_back(THPVariable_Wrap(real));
    if (!wrappers.back()) return -1;
  }
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject* proxy = PyList_GET_ITEM(proxies, i);
    exchange(proxy, wrappers[i].get());
    Object dict(PyObject_GenericGetDict(proxy, nullptr));
    if (dict)
      PyDict_Clear(dict.get());
    else
      PyErr_Clear();
    if (PyObject_SetAttrString(proxy, "__class__", cls) != 0) return -1;
  }
  return 0;
}

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
      if (!THPVariable_Check(tensor)) {
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
    if (count != 4 || !PyType_Check(args[0]) || !THPVariable_Check(args[1])) {
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
    if (!THPVariable_Check(o)) {
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
                                {"keep", fast(looking::keep), METH_FASTCALL, nullptr},
                                {"look", fast(looking::look), METH_FASTCALL, nullptr},
                                {"prepare", fast(recording::prepare), METH_FASTCALL, nullptr},
                                {"output", recording::output, METH_O, nullptr},
                                {"save", recording::save, METH_O, nullptr}};
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
