// Arguments of recorded operations in their wire form.
#pragma once

#include <Python.h>

#include "python.h"
#include "recording.h"

namespace arguments {

using python::guarded;
using python::Object;
using python::owned;
using recording::get;
namespace names = recording::names;

enum Tag : long { kRef = 0, kList = 1, kTuple = 2, kSlice = 4, kEllipsis = 5 };  // wire.Tag

// The number of the node that defines a proxy: what Recorder.number gives.
inline Object number(PyObject* proxy, PyObject* rec) {
  Object own = get(proxy, names::_rec), failed = get(rec, names::_failed), looked = get(rec, names::_looked);
  if (!own || !failed || !looked) return nullptr;
  if (own.get() != rec || PyDict_GET_SIZE(failed.get()) != 0 || PyDict_GET_SIZE(looked.get()) != 0)
    return Object(PyObject_CallMethodOneArg(rec, names::number, proxy));
  Object id = get(proxy, names::_id), fresh = get(rec, names::_fresh);
  if (!id || !fresh || PySet_Discard(fresh.get(), id.get()) < 0) return nullptr;
  return id;
}

// A tag, and room for items behind it.
inline Object tagged(Tag tag, Py_ssize_t items) {
  Object out(PyList_New(items + 1)), first(PyLong_FromLong(tag));
  if (!out || !first) return nullptr;
  PyList_SET_ITEM(out.get(), 0, first.release());
  return out;
}

inline bool put(const Object& out, Py_ssize_t i, Object item) {
  if (!item) return false;
  PyList_SET_ITEM(out.get(), i + 1, item.release());
  return true;
}

inline Object of(PyObject* x, PyObject* rec) {
  PyTypeObject* type = Py_TYPE(x);
  if (x == Py_None || type == &PyLong_Type || type == &PyFloat_Type || type == &PyBool_Type || type == &PyUnicode_Type)
    return owned(x);
  if (reinterpret_cast<PyObject*>(type) == recording::parts.proxy) {
    Object out = tagged(kRef, 1);
    return out && put(out, 0, number(x, rec)) ? std::move(out) : nullptr;
  }
  if (x == Py_Ellipsis) return tagged(kEllipsis, 0);
  if (type == &PySlice_Type) {
    auto* slice = reinterpret_cast<PySliceObject*>(x);
    Object out = tagged(kSlice, 3);
    bool whole = out && put(out, 0, of(slice->start, rec)) && put(out, 1, of(slice->stop, rec)) &&
                 put(out, 2, of(slice->step, rec));
    return whole ? std::move(out) : nullptr;
  }
  if (type == &PyTuple_Type || type == &PyList_Type) {
    if (Py_EnterRecursiveCall(" in an argument")) return nullptr;
    Object items(PySequence_Tuple(x));  // naming one may run code that changes a list
    Object out = items ? tagged(type == &PyTuple_Type ? kTuple : kList, PyTuple_GET_SIZE(items.get())) : nullptr;
    for (Py_ssize_t i = 0; out && i < PyTuple_GET_SIZE(items.get()); i++)
      if (!put(out, i, of(PyTuple_GET_ITEM(items.get(), i), rec))) out.reset();
    Py_LeaveRecursiveCall();
    return out;
  }
  Object name = get(rec, names::number);
  return Object(name ? PyObject_CallFunctionObjArgs(recording::parts.argument, x, name.get(), nullptr) : nullptr);
}

// store(rec, target, index, value): records target[index] = value in the open invoke.
inline PyObject* store(PyObject*, PyObject* const* args, Py_ssize_t count) {
  enum { kSetIndex = 2 };  // wire.Kind.SET_INDEX
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count != 4 || recording::parts.argument == nullptr) {
      PyErr_SetString(PyExc_TypeError, "a recorder, a target, an index and a value are needed, and prepare() before");
      return nullptr;
    }
    PyObject* rec = args[0];
    Object target = of(args[1], rec);
    Object index = target ? of(args[2], rec) : nullptr;
    Object value = index ? of(args[3], rec) : nullptr;
    if (!value) return nullptr;
    Object invoke = get(rec, names::invoke), place = recording::here();
    if (invoke && PyLong_AsLong(invoke.get()) < 0) invoke.reset(PyObject_CallMethodNoArgs(rec, names::_owner));
    Object nodes = get(rec, names::nodes), made = get(rec, names::made);
    Object kind(PyLong_FromLong(kSetIndex)), mode(PyLong_FromLong(recording::mode_now()));
    if (!invoke || !place || !nodes || !made || !kind || !mode) return nullptr;
    Object node(
        PyTuple_Pack(7, kind.get(), invoke.get(), place.get(), mode.get(), target.get(), index.get(), value.get()));
    if (!node || PyList_Append(made.get(), Py_None) != 0 || PyList_Append(nodes.get(), node.get()) != 0) return nullptr;
    Py_RETURN_NONE;
  });
}

// argument(x, rec): what wire.argument(x, rec.number) gives.
inline PyObject* argument(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count != 2 || recording::parts.argument == nullptr) {
      PyErr_SetString(PyExc_TypeError, "a value and a recorder are needed, and prepare() before them");
      return nullptr;
    }
    return of(args[0], args[1]).release();
  });
}

}  // namespace arguments
