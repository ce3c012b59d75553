#include "pyobj.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pyobject_preservation.h>

#include <algorithm>
#include <exception>

namespace {

using at::Tensor;

Tensor& as_tensor(void* t) { return *static_cast<Tensor*>(t); }

template <typename T, typename F>
T guarded(T failed, F body) noexcept {
  try {
    return body();
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "an unknown C++ exception");
  }
  return failed;
}

// Another TensorImpl for the same tensor: it shares storage and version counter, and takes part in
// autograd as the same output of the same node. A leaf that requires grad has no node to share, so
// its alias is a view recorded by autograd: gradients reach the leaf through it.
Tensor alias_of(const Tensor& t) {
  if (t.requires_grad() && t.grad_fn() == nullptr) return t.view_as(t);
  auto impl = t.unsafeGetTensorImpl()->shallow_copy_and_detach(
      /*version_counter=*/t.is_inference() ? c10::VariableVersion() : t.unsafeGetTensorImpl()->version_counter(),
      /*allow_tensor_metadata_change=*/true);
  Tensor copy(std::move(impl));
  if (t.grad_fn() != nullptr) torch::autograd::impl::set_gradient_edge(copy, torch::autograd::impl::gradient_edge(t));
  return copy;
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

// A Python tensor and its TensorImpl own each other in turn: the object's cdata always holds the
// impl, and the impl's slot points back at the object; while C++ holds the impl too (use count over
// one) the impl owns a reference on the object, so that the object's attributes outlive Python's
// last name for it. Exchanging the impls of two objects therefore exchanges the cdata pointers and
// the slots, and then moves those owned references to the objects the impls now belong to.
int nngpy_adopt(PyObject* proxy, void* tensor, PyObject* cls) {
  return guarded<int>(-1, [&] {
    if (!THPVariable_Check(proxy)) {
      PyErr_Format(PyExc_TypeError, "only a torch.Tensor can become one, not a %s", Py_TYPE(proxy)->tp_name);
      return -1;
    }
    Tensor real = as_tensor(tensor);
    if (real.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() != nullptr) real = alias_of(real);
    PyObject* wrapper = THPVariable_Wrap(real);
    if (wrapper == nullptr) return -1;
    auto* p = reinterpret_cast<THPVariable*>(proxy);
    auto* w = reinterpret_cast<THPVariable*>(wrapper);
    at::TensorImpl* placeholder = p->cdata.unsafeGetTensorImpl();
    at::TensorImpl* impl = real.unsafeGetTensorImpl();
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
    Py_DECREF(wrapper);
    PyObject* dict = PyObject_GenericGetDict(proxy, nullptr);
    if (dict != nullptr) {
      PyDict_Clear(dict);
      Py_DECREF(dict);
    } else {
      PyErr_Clear();
    }
    return PyObject_SetAttrString(proxy, "__class__", cls);
  });
}

void nngpy_tensor_free(void* tensor) { delete static_cast<Tensor*>(tensor); }

}  // extern "C"
