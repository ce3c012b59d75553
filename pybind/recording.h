// The lines that most blocks are made of, `module.output` and `.save()`, as they are recorded.
//
// Each does what the Python beside it does (Envoy._read, Proxy.save), where nothing out of the ordinary is the case,
// and leaves everything else to that: it is asked first, and whatever it finds strange goes to Python from the start.
#pragma once

#include <ATen/core/grad_mode.h>
#include <Python.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <structmember.h>
#include <torch/csrc/autograd/python_variable.h>

#include "python.h"

namespace recording {

using python::guarded;
using python::Object;
using python::owned;

// What Python has that these functions need, told once: `prepare`.
struct Parts {
  PyObject* proxy;        // the class
  PyObject* placeholder;  // that proxies lie over
  PyObject* leaf;         // the class of an access point's single tensor
  PyObject* files;        // dict: whether a file is the user's, by name
  PyObject* is_users;     // says so of a new one
  PyObject* read;         // (envoy, port): the value of an access point, where it takes more
  PyObject* save;         // (proxy): keeps it, where it takes more
  PyObject* item;         // (envoy, index): a part of it, where it takes more
  PyObject* argument;     // (x, name): its wire form, where it takes more
  PyObject* recorder;     // the class, which has slots, as have
  PyObject* point;        // the classes of access points, and of leaves
};
inline Parts parts{};

// Where the objects of a class hold an attribute that has a slot: what a look-up by name would come to.
class Slot {
 public:
  // False, with an error, where the class has no slot of that name.
  bool find(PyObject* cls, const char* name) {
    Object descriptor(PyObject_GetAttrString(cls, name));
    if (!descriptor) return false;
    if (Py_TYPE(descriptor.get()) != &PyMemberDescr_Type) {
      PyErr_Format(PyExc_TypeError, "%R has no slot %s", cls, name);
      return false;
    }
    offset_ = reinterpret_cast<PyMemberDescrObject*>(descriptor.get())->d_member->offset;
    return true;
  }

  // What an object of that class, or one below it, holds there; null while it holds nothing.
  Object of(PyObject* object) const {
    return owned(*reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_));
  }

 private:
  Py_ssize_t offset_ = 0;
};

struct Slots {
  Slot nodes, made, bound, skipped, saved, fresh, named, looked, failed, writes;  // of a recorder
  Slot path, port, order, tree;                                                   // of an access point
  Slot name;                                                                      // of a leaf

  bool find(PyObject* recorder, PyObject* point, PyObject* leaf) {
    return nodes.find(recorder, "nodes") && made.find(recorder, "made") && bound.find(recorder, "bound") &&
           skipped.find(recorder, "skipped") && saved.find(recorder, "_saved") && fresh.find(recorder, "_fresh") &&
           named.find(recorder, "_named") && looked.find(recorder, "_looked") && failed.find(recorder, "_failed") &&
           writes.find(recorder, "_writes") && path.find(point, "path") && port.find(point, "port") &&
           order.find(point, "order") && tree.find(point, "tree") && name.find(leaf, "name");
  }
};
inline Slots slots{};

inline bool is_a(PyObject* object, PyObject* cls) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(cls));
}

// Names of attributes, made once: `ready`.
namespace names {
// clang-format off
#define NNG_NAMES(F) \
  F(recorder) F(near) F(invoke) F(native) F(skipped) F(bound) F(path) F(port) F(tree) F(order) F(name) F(nodes) \
  F(made) F(living) F(add) F(look_near) F(closed) F(plain) F(number) F(_rec) F(_id) F(_native) F(_first) \
  F(_listed) F(_owner) F(_writes) F(_leaf_meta) F(_named) F(_fresh) F(_looked) F(_failed) F(_saved) \
  F(_hosted) F(_edits) F(_latest) F(_attributes) F(_scripted) F(_recorder) F(_compiled_call_impl) \
  F(known) F(log) F(module) F(session) F(site) F(training)
// clang-format on
#define NNG_DECLARE(name) inline PyObject* name = nullptr;
NNG_NAMES(NNG_DECLARE)
#undef NNG_DECLARE
}  // namespace names

// Makes the names. False where there is no memory for them.
inline bool ready() {
#define NNG_MAKE(name) \
  if (names::name == nullptr && (names::name = PyUnicode_InternFromString(#name)) == nullptr) return false;
  NNG_NAMES(NNG_MAKE)
#undef NNG_MAKE
  return true;
}
#undef NNG_NAMES

inline Object get(PyObject* of, PyObject* name) { return Object(PyObject_GetAttr(of, name)); }

// The same of an envoy, most of whose attributes are there before its __getattr__ is asked.
inline Object own(PyObject* envoy, PyObject* name) {
  Object found(PyObject_GenericGetAttr(envoy, name));
  if (found || !PyErr_ExceptionMatches(PyExc_AttributeError)) return found;
  PyErr_Clear();
  return get(envoy, name);
}

// The recorder of this thread's block, or what stands for it (known.h); null outside of blocks.
inline PyObject*& now() {
  static thread_local PyObject* recorder = nullptr;
  return recorder;
}

inline void set_now(PyObject* recorder) {
  PyObject* before = now();
  now() = recorder == nullptr || recorder == Py_None ? nullptr : Py_NewRef(recorder);
  Py_XDECREF(before);
}

// A proxy of a class over a copy of a placeholder, of which nothing says yet who records it.
inline Object make_bare(PyObject* cls, PyObject* placeholder) {
  at::Tensor copy;
  {
    c10::impl::ExcludeDispatchKeyGuard no_modes(c10::python_ks);  // a TorchDispatchMode would make it an operation
    copy = at::Tensor(THPVariable_Unpack(placeholder)
                          .unsafeGetTensorImpl()
                          ->shallow_copy_and_detach(/*version_counter=*/0, /*allow_tensor_metadata_change=*/true));
  }
  copy.unsafeGetTensorImpl()->set_python_dispatch(true);  // C++ that is handed it comes to its __torch_dispatch__
  return Object(THPVariable_Wrap(copy, reinterpret_cast<PyTypeObject*>(cls)));
}

// The same of a recorder, with its number.
inline Object make(PyObject* cls, PyObject* placeholder, PyObject* rec, PyObject* id) {
  Object made = make_bare(cls, placeholder);
  if (!made || PyObject_GenericSetAttr(made.get(), names::_rec, rec) != 0 ||
      PyObject_GenericSetAttr(made.get(), names::_id, id) != 0)
    return nullptr;
  return made;
}

// The line of the user's that runs, as positions.here gives it.
inline Object here() {
  Object frame = owned(reinterpret_cast<PyObject*>(PyEval_GetFrame()));
  while (frame) {
    auto* f = reinterpret_cast<PyFrameObject*>(frame.get());
    Object code(reinterpret_cast<PyObject*>(PyFrame_GetCode(f)));
    PyObject* file = reinterpret_cast<PyCodeObject*>(code.get())->co_filename;
    Object users = owned(PyDict_GetItemWithError(parts.files, file));
    if (!users && !PyErr_Occurred()) users.reset(PyObject_CallOneArg(parts.is_users, file));
    if (!users) return nullptr;
    if (users.get() == Py_True) {
      Object at(PyLong_FromLong(PyFrame_GetLasti(f)));
      return Object(at ? PyTuple_Pack(2, code.get(), at.get()) : nullptr);
    }
    frame.reset(reinterpret_cast<PyObject*>(PyFrame_GetBack(f)));
  }
  return owned(Py_None);
}

// The autograd state of this line, as nodes carry it.
inline long mode_now() { return (at::GradMode::is_enabled() ? 1 : 0) | (c10::InferenceMode::is_enabled() ? 2 : 0); }

// Records reading one tensor of an access point, and gives its proxy.
inline Object read(PyObject* rec, PyObject* point, PyObject* leaf) {
  enum { kRead = 4 };  // wire.Kind.READ
  Object invoke = get(rec, names::invoke), nodes = slots.nodes.of(rec), made = slots.made.of(rec);
  Object path = slots.path.of(point), port = slots.port.of(point), order = slots.order.of(point);
  Object name = slots.name.of(leaf), infer = get(rec, names::_leaf_meta), written = slots.writes.of(rec);
  Object named = slots.named.of(rec), fresh = slots.fresh.of(rec), living = get(rec, names::living);
  if (!invoke || !nodes || !made || !path || !port || !order || !name || !infer || !written || !named || !fresh ||
      !living) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_AttributeError, "a recorder or an access point is not complete");
    return nullptr;
  }
  Py_ssize_t writes = 0;
  if (PyDict_GET_SIZE(written.get()) > 0) {
    PyObject* before = PyDict_GetItemWithError(written.get(), invoke.get());
    if (before == nullptr && PyErr_Occurred()) return nullptr;
    writes = before == nullptr ? 0 : PyList_GET_SIZE(before);
  }
  Object id(PyLong_FromSsize_t(PyList_GET_SIZE(nodes.get()))), place = here();
  if (!id || !place) return nullptr;
  Object kind(PyLong_FromLong(kRead)), mode(PyLong_FromLong(mode_now())), zero(PyLong_FromLong(0));
  Object before(PyLong_FromSsize_t(writes));
  if (!kind || !mode || !zero || !before) return nullptr;
  Object node(PyTuple_Pack(8, kind.get(), invoke.get(), place.get(), mode.get(), path.get(), port.get(), zero.get(),
                           name.get()));
  Object args(PyTuple_Pack(4, invoke.get(), order.get(), leaf, before.get()));
  Object call(args ? PyTuple_Pack(3, infer.get(), args.get(), Py_None) : nullptr);
  Object spoken(PyTuple_Pack(2, point, place.get()));
  Object mine = owned(PyDict_GetItemWithError(named.get(), invoke.get()));
  if (!mine && !PyErr_Occurred()) {
    mine.reset(PyDict_New());
    if (!mine || PyDict_SetItem(named.get(), invoke.get(), mine.get()) != 0) return nullptr;
  }
  Object proxy = make(parts.proxy, parts.placeholder, rec, id.get());
  if (!node || !call || !spoken || !mine || !proxy) return nullptr;
  // from here on nothing is left half-done
  if (PyDict_SetItem(mine.get(), id.get(), spoken.get()) != 0 || PySet_Add(fresh.get(), id.get()) != 0 ||
      PyList_Append(made.get(), call.get()) != 0 || PyList_Append(nodes.get(), node.get()) != 0)
    return nullptr;
  if (living.get() != Py_None) {
    Object added(PyObject_CallMethodOneArg(living.get(), names::add, proxy.get()));
    if (!added) return nullptr;
  }
  return proxy;
}

// read(rec, point, leaf): Recorder.read.
inline PyObject* read_leaf(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count != 3 || parts.proxy == nullptr || !is_a(args[0], parts.recorder) || !is_a(args[1], parts.point) ||
        !is_a(args[2], parts.leaf)) {
      PyErr_SetString(PyExc_TypeError, "a recorder, an access point and a leaf are needed, and prepare() before them");
      return nullptr;
    }
    return read(args[0], args[1], args[2]).release();
  });
}

// The value of a module's side, if the block that is open has named it before, or it is one tensor; else null,
// without an error: it takes more than that.
inline Object seen(PyObject* envoy, PyObject* port) {
  Object rec = owned(now());
  if (!rec || !is_a(rec.get(), parts.recorder)) return nullptr;
  Object invoke = get(rec.get(), names::invoke), native = get(rec.get(), names::native);
  Object skipped = slots.skipped.of(rec.get()), its = own(envoy, names::_native), known = own(envoy, names::_first);
  if (!its || !known) PyErr_Clear();  // what is no module of the model's
  if (!invoke || !native || !skipped || PyDict_GET_SIZE(skipped.get()) != 0 || !known || its.get() != native.get())
    return nullptr;
  Object near = get(rec.get(), names::near);
  if (near && PyTuple_GET_ITEM(near.get(), 0) != invoke.get()) {
    Object looked(PyObject_CallMethodNoArgs(rec.get(), names::look_near));
    near = looked ? get(rec.get(), names::near) : nullptr;
  }
  if (!near || PyObject_RichCompareBool(PyTuple_GET_ITEM(near.get(), 0), invoke.get(), Py_EQ) != 1) return nullptr;
  Object side(PyTuple_Pack(2, known.get(), port));
  Object point = owned(side ? PyDict_GetItemWithError(PyTuple_GET_ITEM(near.get(), 1), side.get()) : nullptr);
  if (!point || !is_a(point.get(), parts.point)) return nullptr;
  Object path = slots.path.of(point.get()), bound = slots.bound.of(rec.get()), tree = slots.tree.of(point.get());
  if (!path || !bound || !tree) return nullptr;
  Object key(PyTuple_Pack(3, invoke.get(), path.get(), port));
  Object before = owned(key ? PyDict_GetItemWithError(bound.get(), key.get()) : nullptr);
  if (before || PyErr_Occurred()) return before;
  if (reinterpret_cast<PyObject*>(Py_TYPE(tree.get())) != parts.leaf) return nullptr;
  Object proxy = read(rec.get(), point.get(), tree.get());
  if (proxy && PyDict_SetItem(bound.get(), key.get(), proxy.get()) != 0) return nullptr;
  return proxy;
}

// What Envoy._read(OUTPUT) gives.
inline PyObject* output(PyObject* envoy) {
  enum { kOutput = 1 };
  Object port(PyLong_FromLong(kOutput));
  if (!port) return nullptr;
  Object value = parts.proxy == nullptr ? nullptr : seen(envoy, port.get());
  if (value || PyErr_Occurred()) return value.release();
  return PyObject_CallFunctionObjArgs(parts.read, envoy, port.get(), nullptr);
}

// What Proxy.save does.
inline PyObject* save(PyObject* proxy) {
  auto more = [&]() -> PyObject* { return PyErr_Occurred() ? nullptr : PyObject_CallOneArg(parts.save, proxy); };
  Object rec = get(proxy, names::_rec), id = get(proxy, names::_id);
  if (!rec || !id || now() != rec.get() || !is_a(rec.get(), parts.recorder)) return more();
  Object closed = get(rec.get(), names::closed), plain = get(rec.get(), names::plain);
  Object failed = slots.failed.of(rec.get()), looked = slots.looked.of(rec.get());
  if (!closed || !plain || !failed || !looked || closed.get() != Py_None || plain.get() != Py_True ||
      PyDict_GET_SIZE(failed.get()) != 0 || PyDict_GET_SIZE(looked.get()) != 0)
    return more();
  Object saved = slots.saved.of(rec.get()), fresh = slots.fresh.of(rec.get());
  Object key(PyLong_FromVoidPtr(proxy));
  if (!saved || !fresh || !key || PyDict_SetItem(saved.get(), key.get(), proxy) != 0 ||
      PySet_Discard(fresh.get(), id.get()) < 0)
    return nullptr;
  return Py_NewRef(proxy);
}

// item(envoy, index): what Envoy.__getitem__ does.
inline PyObject* item(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count == 2 && PyLong_CheckExact(args[1])) {
      Object listed = own(args[0], names::_listed);
      if (listed && PyList_Check(listed.get())) {
        Py_ssize_t size = PyList_GET_SIZE(listed.get()), i = PyLong_AsSsize_t(args[1]);
        if (-size <= i && i < size && !PyErr_Occurred())
          return Py_NewRef(PyList_GET_ITEM(listed.get(), i < 0 ? i + size : i));
      }
      PyErr_Clear();
    }
    return PyObject_Vectorcall(parts.item, args, static_cast<size_t>(count), nullptr);
  });
}

// prepare(proxy, placeholder, leaf, files, is_users, read, save, item, argument, recorder, point): see Parts.
inline PyObject* prepare(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 11 || !PyType_Check(args[0]) || !python::is_tensor(args[1]) || !PyType_Check(args[2]) ||
      !PyDict_Check(args[3]) || !PyType_Check(args[9]) || !PyType_Check(args[10])) {
    PyErr_SetString(PyExc_TypeError, "it takes the eleven parts of recording.h");
    return nullptr;
  }
  Slots found;
  if (!found.find(args[9], args[10], args[2])) return nullptr;
  slots = found;
  for (Py_ssize_t i = 0; i < count; i++) Py_INCREF(args[i]);  // for as long as the process lives
  parts = {args[0], args[1], args[2], args[3], args[4], args[5], args[6], args[7], args[8], args[9], args[10]};
  Py_RETURN_NONE;
}

}  // namespace recording
