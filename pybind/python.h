// What everything that is called from Python shares: owned objects, and exceptions at the boundary.
#pragma once

#include <Python.h>
#include <c10/util/Exception.h>

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

// What body gives; where it throws, a Python exception and what stands for failure.
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

// A function of METH_FASTCALL, as tables of methods take it.
template <typename F>
PyCFunction fast(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace python
