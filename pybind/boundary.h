// boundary.h: a callable in C around a Python function, so that an error shows the user's line last.
//
// Python adds every frame that an exception leaves to its traceback. Functions of ours that a user
// calls are therefore entered through a Boundary, which is no frame: it takes the traceback off (or
// puts one there that the error brings along), and the next frame that is added is the user's own.
#ifndef NNG_BOUNDARY_H
#define NNG_BOUNDARY_H
#include <Python.h>
#include <structmember.h>

#include <cstddef>

namespace boundary {

struct Boundary {
  PyObject_HEAD vectorcallfunc vectorcall;
  PyObject* function;
  PyObject* cut;  // called with an exception that passes: gives the traceback it is to have, or None
};

inline Boundary* of(PyObject* o) { return reinterpret_cast<Boundary*>(o); }

inline void dealloc(PyObject* o) {
  PyTypeObject* type = Py_TYPE(o);
  PyObject_GC_UnTrack(o);
  Py_CLEAR(of(o)->function);
  Py_CLEAR(of(o)->cut);
  type->tp_free(o);
  Py_DECREF(type);
}

inline int traverse(PyObject* o, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(o));
  Py_VISIT(of(o)->function);
  Py_VISIT(of(o)->cut);
  return 0;
}

inline int clear(PyObject* o) {
  Py_CLEAR(of(o)->function);
  Py_CLEAR(of(o)->cut);
  return 0;
}

// Gives the raised exception the traceback that `cut` wants. Where that fails the exception stays as it was.
inline void trim(PyObject* cut) {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (traceback != nullptr) PyException_SetTraceback(value, traceback);
  PyObject* wanted = PyObject_CallOneArg(cut, value);
  if (wanted == nullptr) {
    PyErr_Clear();
  } else {
    PyException_SetTraceback(value, wanted);
    Py_XDECREF(traceback);
    traceback = wanted == Py_None ? nullptr : Py_NewRef(wanted);
    Py_DECREF(wanted);
  }
  PyErr_Restore(type, value, traceback);
}

inline PyObject* call(PyObject* o, PyObject* const* args, size_t count, PyObject* names) {
  PyObject* out = PyObject_Vectorcall(of(o)->function, args, count, names);
  if (out == nullptr) trim(of(o)->cut);
  return out;
}

inline PyObject* bind(PyObject* o, PyObject* instance, PyObject*) {
  return instance == nullptr || instance == Py_None ? Py_NewRef(o) : PyMethod_New(o, instance);
}

// Names, docstring and signature are those of the function.
inline PyObject* attribute(PyObject* o, PyObject* name) {
  PyObject* own = PyObject_GenericGetAttr(o, name);
  if (own != nullptr || !PyErr_ExceptionMatches(PyExc_AttributeError)) return own;
  PyErr_Clear();
  return PyObject_GetAttr(of(o)->function, name);
}

inline PyObject* doc(PyObject* o, void*) { return PyObject_GetAttrString(of(o)->function, "__doc__"); }
inline PyObject* wrapped(PyObject* o, void*) { return Py_NewRef(of(o)->function); }

inline PyTypeObject* type() {
  static PyGetSetDef getset[] = {
      {"__doc__", doc, nullptr, nullptr, nullptr},
      {"__wrapped__", wrapped, nullptr, nullptr, nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr},
  };
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, offsetof(Boundary, vectorcall), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr},
  };
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
      {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
      {Py_tp_clear, reinterpret_cast<void*>(clear)},
      {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
      {Py_tp_descr_get, reinterpret_cast<void*>(bind)},
      {Py_tp_getattro, reinterpret_cast<void*>(attribute)},
      {Py_tp_getset, getset},
      {Py_tp_members, members},
      {0, nullptr},
  };
  // A method descriptor, as a function is: calling a method makes no bound one.
  static PyType_Spec spec = {
      "nnsight_go.Boundary", sizeof(Boundary), 0,
      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR, slots};
  static PyTypeObject* made = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  return made;
}

inline PyObject* make(PyObject* function, PyObject* cut) {
  PyTypeObject* cls = type();
  if (cls == nullptr) return nullptr;
  Boundary* out = PyObject_GC_New(Boundary, cls);
  if (out == nullptr) return nullptr;
  out->vectorcall = call;
  out->function = Py_NewRef(function);
  out->cut = Py_NewRef(cut);
  PyObject_GC_Track(reinterpret_cast<PyObject*>(out));
  return reinterpret_cast<PyObject*>(out);
}

}  // namespace boundary
#endif
