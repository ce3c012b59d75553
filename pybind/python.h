// What everything that is called from Python shares: owned objects, and exceptions at the boundary.
#pragma once

#include <Python.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <exception>
#include <memory>

namespace python {

struct Release {
  void operator()(PyObject* o) const { Py_DECREF(o); }
};
using Object = std::unique_ptr<PyObject, Release>;

inline Object owned(PyObject* borrowed) {
  Py_XINCREF(borrowed);
  return Object(borrowed);
}

// Whether an object is a tensor in memory: what only says that it is one, as a weakref.proxy does, is none.
inline bool is_tensor(PyObject* o) { return PyObject_TypeCheck(o, reinterpret_cast<PyTypeObject*>(THPVariableClass)); }

// What body gives; where it throws, a Python exception and what stands for failure.
template <typename T, typename F>
T guarded(T failed, F body) noexcept {
  try {
    return body();
  } catch (python_error& e) {  // raised by Python that C++ has called
    e.restore();
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "an unknown C++ exception");
  }
  return failed;
}

// A function of METH_FASTCALL, as tables of methods take it.
template <typename F>
PyCFunction fast(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace python
