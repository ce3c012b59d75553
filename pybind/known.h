// A block that says what it said before, at the same place: its lines are compared, and not recorded once more.
//
// A memo (known.py) has the lines of a block that went straight ahead (hooked.h): which output each of them names,
// saves or stores to, and where it stands. While the lines are those, proxies are all that there is of the trace, and
// at its end the program that is known runs. Whatever else happens, from any line that is not the next one to any look
// at the trace, makes the recorder that there would have been (settle), which goes on from there. So nothing is lost by
// a wrong guess.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <Python.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/SafePyObject.h>
#include <structmember.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/PyInterpreter.h>

#include <cstring>
#include <utility>

#include "frozen.h"
#include "hooked.h"
#include "python.h"
#include "recording.h"

namespace known {

using python::guarded;
using python::Object;
using python::owned;
using recording::get;
using recording::now;
using recording::set_now;

// What Python has that this needs, told once: `remember`.
struct Told {
  PyObject* trace;      // (model, *args, **kwargs): a trace, whatever it says
  PyObject* begin;      // (model, args, memo, lines, proxies, state): the tracer of a block that says something else;
                        // lines: -1 where the input is of another kind
  PyObject* finished;   // (model, args, memo, failed): the tracer of a block that has ended
  PyObject* end;        // (tracer, memo, error): ends one that somebody has looked at during the pass
  PyObject* failed;     // (model, args, memo, proxies, error, found): what to raise
  PyObject* set_item;   // (proxy, index, value): Proxy.__setitem__
  PyObject* opened;     // the session is an attribute of it
  PyObject* mode;       // catches torch's calls inside of a block
  PyObject* hold_back;  // readies torch's compiler for them
  PyObject* tensor;     // the class
  PyObject* transform;  // gives the transform that runs on this thread, or None
  PyObject* tracer;     // the class that a Known says it is of
};
inline Told told{};
constexpr Py_ssize_t kTold = 12;

// The parts of a memo, a tuple.
enum Part {
  kCode,  // of the frame that begins the trace, and the place in it
  kPlace,
  kModel,  // its address
  kLines,
  kKind,  // of the input, and of which modules train
  kLayout,
  kMode,     // the autograd state
  kDType,    // torch's default
  kModules,  // what hooked::forward takes
  kSteps,
  kBefore,
  kNodes,    // how many
  kAround,   // modules that may have been compiled since
  kKept,     // nodes whose values are saved
  kSaved,    // the proxies that become them
  kRec,      // the recorder of the block that was remembered, which has ended
  kIds,      // by proxy: its node
  kFailure,  // rec.failure
  kParts
};

// One line of a block, a tuple.
enum Line { kWhat, kPath, kProxy, kLineCode, kLinePlace, kIndex, kValue, kLineParts };
enum What { kRead, kSave, kStore };

namespace names = recording::names;

// A trace of which nothing is recorded as long as its lines are known.
struct Known {
  PyObject_HEAD PyObject* model;
  PyObject* hosted;  // whose modules they are
  PyObject* args;    // of the module
  PyObject* memo;
  PyObject* proxies;                                                // a list
  PyObject* real;                                                   // the tracer that goes on, or null
  PyObject* weak;                                                   // references
  Py_ssize_t at;                                                    // the next line
  enum : uint8_t { kNew, kOpen, kRunning, kEnded, kFailed } state;  // known.py has them
};

inline PyTypeObject* type();
inline Known* of(PyObject* o) { return reinterpret_cast<Known*>(o); }
inline PyObject* part(const Known* k, Part which) { return PyTuple_GET_ITEM(k->memo, which); }

// The block that is open, if its lines are known so far.
inline Known* open() {
  PyObject* o = now();
  return o != nullptr && Py_IS_TYPE(o, type()) ? of(o) : nullptr;
}

// Where the Python code stands that is running.
struct Place {
  PyCodeObject* code = nullptr;
  int lasti = -1;

  static Place here() {
    PyFrameObject* frame = PyEval_GetFrame();
    if (frame == nullptr) return {};
    PyCodeObject* code = PyFrame_GetCode(frame);
    Py_DECREF(code);  // which the frame holds
    return {code, PyFrame_GetLasti(frame)};
  }
  bool is(PyObject* other, PyObject* at) const {
    return reinterpret_cast<PyObject*>(code) == other && PyLong_AsLong(at) == lasti;
  }
};

// Makes the recorder that there would have been, and goes on with it. False with an error.
inline bool settle(Known* k, bool other_kind = false) {
  if (k->real != nullptr) return true;
  if (k->memo == nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "this trace has been given up");
    return false;
  }
  Object self = owned(reinterpret_cast<PyObject*>(k));
  auto was = k->state;
  if (now() == self.get()) set_now(nullptr);
  Object tracer;
  if (was == Known::kEnded || was == Known::kFailed) {
    PyObject* failed = was == Known::kFailed ? Py_True : Py_False;
    tracer.reset(PyObject_CallFunctionObjArgs(told.finished, k->model, k->args, k->memo, failed, nullptr));
  } else {
    Object lines(PyLong_FromSsize_t(other_kind ? -1 : k->at)), state(PyLong_FromLong(was));
    if (!lines || !state) return false;
    tracer.reset(PyObject_CallFunctionObjArgs(told.begin, k->model, k->args, k->memo, lines.get(), k->proxies,
                                              state.get(), nullptr));
  }
  if (!tracer) return false;
  k->real = tracer.release();
  if (was != Known::kRunning) PyList_SetSlice(k->proxies, 0, PyList_GET_SIZE(k->proxies), nullptr);
  return true;
}

// The next line of an open block, if it is this one; else null, and the block has settled, or there is an error.
inline PyObject* next(Known* k, What what) {
  PyObject* lines = part(k, kLines);
  if (k->at < PyTuple_GET_SIZE(lines)) {
    PyObject* line = PyTuple_GET_ITEM(lines, k->at);
    if (PyLong_AsLong(PyTuple_GET_ITEM(line, kWhat)) == what &&
        Place::here().is(PyTuple_GET_ITEM(line, kLineCode), PyTuple_GET_ITEM(line, kLinePlace)) &&
        PyLong_AsLong(part(k, kMode)) == recording::mode_now())
      return line;
  }
  return nullptr;
}

// Whether the input is of the kind that is remembered. False, perhaps with an error.
inline bool is_kind(const Known* k) {
  Object attributes = get(k->hosted, names::_attributes), scripted = get(k->hosted, names::_scripted);
  if (!attributes || !scripted || !PyList_Check(attributes.get()) || !PyList_Check(scripted.get())) return false;
  PyObject *like = PyTuple_GET_ITEM(part(k, kKind), 0), *trains = PyTuple_GET_ITEM(part(k, kKind), 1);
  Py_ssize_t n = PyList_GET_SIZE(attributes.get()), m = PyList_GET_SIZE(scripted.get());
  if (PyTuple_GET_SIZE(trains) != n + m) return false;
  for (Py_ssize_t i = 0; i < n + m; i++) {
    Object flag = i < n ? owned(PyDict_GetItemWithError(PyList_GET_ITEM(attributes.get(), i), names::training))
                        : get(PyList_GET_ITEM(scripted.get(), i - n), names::training);
    if (!flag || PyObject_RichCompareBool(flag.get(), PyTuple_GET_ITEM(trains, i), Py_EQ) != 1) return false;
  }
  Object found(frozen::frozen(nullptr, k->args));  // the second of (args, {}), behind the class
  return found && PyObject_RichCompareBool(found.get(), PyTuple_GET_ITEM(like, 1), Py_EQ) == 1;
}

// A proxy of which nobody has asked who records it.
inline Object bare() { return recording::make_bare(recording::parts.proxy, recording::parts.placeholder); }

// Plain values that are the same, and of the same types.
inline bool same(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (PyLong_CheckExact(a)) return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
  if (PyFloat_CheckExact(a)) {
    double x = PyFloat_AS_DOUBLE(a), y = PyFloat_AS_DOUBLE(b);
    return std::memcmp(&x, &y, sizeof x) == 0;
  }
  if (PySlice_Check(a)) {
    auto *x = reinterpret_cast<PySliceObject*>(a), *y = reinterpret_cast<PySliceObject*>(b);
    return same(x->start, y->start) && same(x->stop, y->stop) && same(x->step, y->step);
  }
  if (PyTuple_CheckExact(a)) {
    if (PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(a); i++)
      if (!same(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i))) return false;
    return true;
  }
  return false;
}

// Whether torch's default dtype is this one.
inline bool is_default(PyObject* dtype) {
  return c10::get_default_dtype_as_scalartype() == reinterpret_cast<THPDtype*>(dtype)->scalar_type;
}

// The default dtype and what else decides how a store is recorded.
inline bool is_usual(const Known* k) {
  Object transform(PyObject_CallNoArgs(told.transform));
  return transform.get() == Py_None && is_default(part(k, kDType));
}

// Whether `same` can tell that another value is the same.
inline bool is_plain(PyObject* x) {
  if (x == Py_None || x == Py_Ellipsis || PyBool_Check(x) || PyLong_CheckExact(x) || PyFloat_CheckExact(x)) return true;
  if (PySlice_Check(x)) {
    auto* s = reinterpret_cast<PySliceObject*>(x);
    return is_plain(s->start) && is_plain(s->stop) && is_plain(s->step);
  }
  if (!PyTuple_CheckExact(x)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); i++)
    if (!is_plain(PyTuple_GET_ITEM(x, i))) return false;
  return true;
}

// Notes a line of a block that may be remembered. False with an error.
inline bool note(PyObject* rec, What what, PyObject* envoy, PyObject* proxy, PyObject* index, PyObject* value) {
  constexpr Py_ssize_t kMost = 4096;
  Object log = get(rec, names::log);
  if (!log) return false;
  if (log.get() == Py_None || !PyList_Check(log.get())) return true;
  Place place = Place::here();
  if (place.code == nullptr || !is_plain(index) || !is_plain(value) || PyList_GET_SIZE(log.get()) >= kMost)
    return PyObject_SetAttr(rec, names::log, Py_None) == 0;
  Object kind(PyLong_FromLong(what)), lasti(PyLong_FromLong(place.lasti)), id = get(proxy, names::_id);
  Object path = envoy == Py_None ? owned(envoy) : get(envoy, names::_first);
  if (!kind || !lasti || !id || !path) return false;
  auto* code = reinterpret_cast<PyObject*>(place.code);
  Object line(PyTuple_Pack(kLineParts, kind.get(), path.get(), id.get(), code, lasti.get(), index, value));
  return line && PyList_Append(log.get(), line.get()) == 0;
}

// ---- lines ----

// Whether an envoy is of this model's module of a path.
inline bool is_module(const Known* k, PyObject* envoy, PyObject* path) {
  Object hosted = recording::own(envoy, names::_native), first = recording::own(envoy, names::_first);
  if (!hosted || !first) PyErr_Clear();  // what is no module of a model's
  return hosted.get() == k->hosted && first && PyObject_RichCompareBool(first.get(), path, Py_EQ) == 1;
}

// What the next line gives, if it reads this module's output; else null: the block has settled, or there is an error.
inline Object read(Known* k, PyObject* envoy) {
  PyObject* line = next(k, kRead);
  bool is_next = line != nullptr && is_module(k, envoy, PyTuple_GET_ITEM(line, kPath));
  bool other_kind = is_next && PyList_GET_SIZE(k->proxies) == 0 && !is_kind(k);
  if (is_next && !other_kind) {
    Py_ssize_t which = PyLong_AsSsize_t(PyTuple_GET_ITEM(line, kProxy));
    if (which == PyList_GET_SIZE(k->proxies)) {
      Object proxy = bare();
      if (!proxy || PyList_Append(k->proxies, proxy.get()) != 0) return nullptr;
    }
    k->at++;
    return owned(PyList_GET_ITEM(k->proxies, which));
  }
  if (!PyErr_Occurred()) settle(k, other_kind);
  return nullptr;
}

// Whether the next line does this to this proxy; else the block has settled, or there is an error.
inline bool does(Known* k, What what, PyObject* proxy, PyObject* index, PyObject* value) {
  PyObject* line = next(k, what);
  if (line != nullptr) {
    Py_ssize_t which = PyLong_AsSsize_t(PyTuple_GET_ITEM(line, kProxy));
    if (which < PyList_GET_SIZE(k->proxies) && PyList_GET_ITEM(k->proxies, which) == proxy &&
        (what != kStore ||
         (same(index, PyTuple_GET_ITEM(line, kIndex)) && same(value, PyTuple_GET_ITEM(line, kValue)) && is_usual(k)))) {
      k->at++;
      return true;
    }
  }
  if (!PyErr_Occurred()) settle(k);
  return false;
}

// Notes a line of the recorder's that has been recorded; gives what it has given.
inline PyObject* noted(Object given, What what, PyObject* envoy, PyObject* proxy, PyObject* index, PyObject* value) {
  PyObject* rec = now();
  bool notes = given && rec != nullptr && recording::is_a(rec, recording::parts.recorder) &&
               reinterpret_cast<PyObject*>(Py_TYPE(proxy)) == recording::parts.proxy;
  return notes && !note(rec, what, envoy, proxy, index, value) ? nullptr : given.release();
}

// output(envoy): what Envoy._read(OUTPUT) gives.
inline PyObject* output(PyObject*, PyObject* envoy) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (Known* k = open()) {
      Object proxy = read(k, envoy);
      if (proxy || PyErr_Occurred()) return proxy.release();
    }
    Object value(recording::output(envoy));
    PyObject* proxy = value.get();
    return noted(std::move(value), kRead, envoy, proxy, Py_None, Py_None);
  });
}

// save(proxy): what Proxy.save does.
inline PyObject* save(PyObject*, PyObject* proxy) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (Known* k = open()) {
      if (does(k, kSave, proxy, Py_None, Py_None)) return Py_NewRef(proxy);
      if (PyErr_Occurred()) return nullptr;
    }
    return noted(Object(recording::save(proxy)), kSave, Py_None, proxy, Py_None, Py_None);
  });
}

// put(proxy, index, value): what Proxy.__setitem__ does.
inline PyObject* put(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count == 3) {
      if (Known* k = open()) {
        if (does(k, kStore, args[0], args[1], args[2])) Py_RETURN_NONE;
        if (PyErr_Occurred()) return nullptr;
      }
    }
    Object done(PyObject_Vectorcall(told.set_item, args, static_cast<size_t>(count), nullptr));
    return count == 3 ? noted(std::move(done), kStore, Py_None, args[0], args[1], args[2]) : done.release();
  });
}

// ---- the block ----

inline bool is_cast() {
  auto excluded = c10::impl::tls_local_dispatch_key_set().excluded_;
  return !(c10::autocast_dispatch_keyset - excluded).empty();
}

// The blocks that this thread is inside of.
inline long& blocks() {
  static thread_local long count = 0;
  return count;
}

// inside(by): counts so many more; gives how many there are.
inline PyObject* inside(PyObject*, PyObject* by) {
  long more = PyLong_AsLong(by);
  if (more == -1 && PyErr_Occurred()) return nullptr;
  return PyLong_FromLong(blocks() += more);
}

// The compiler of torch, once it is there, leaves alone what runs inside of blocks.
inline bool compiler_ready() {
  static bool held = false;
  if (held) return true;
  static PyObject* const name = PyUnicode_InternFromString("torch._dynamo.eval_frame");
  PyObject* modules = PyImport_GetModuleDict();
  int there = PyDict_Contains(modules, name);
  if (there <= 0) return there == 0;
  Object done(PyObject_CallNoArgs(told.hold_back));
  held = static_cast<bool>(done);
  return held;
}

inline PyObject* enter(PyObject* self, PyObject*) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    Known* k = of(self);
    Object session = get(told.opened, names::session);
    if (!session) return nullptr;
    if (k->real != nullptr || k->state != Known::kNew || now() != nullptr || session.get() != Py_None) {
      if (!settle(k)) return nullptr;
      Object entered(PyObject_CallMethod(k->real, "__enter__", nullptr));
      return entered ? Py_NewRef(self) : nullptr;
    }
    if (!compiler_ready()) return nullptr;
    blocks()++;
    at::impl::PythonTorchFunctionTLS::push_onto_stack(
        std::make_shared<c10::SafePyObject>(Py_NewRef(told.mode), getPyInterpreter()));
    k->state = Known::kOpen;
    set_now(self);
    return Py_NewRef(self);
  });
}

// Whether the program of the memo does this block, which has come to its end.
inline bool is_done(const Known* k) {
  if (k->at != PyTuple_GET_SIZE(part(k, kLines)) || PyLong_AsLong(part(k, kMode)) != recording::mode_now() || is_cast())
    return false;
  PyObject* around = part(k, kAround);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(around); i++) {
    Object compiled = get(PyTuple_GET_ITEM(around, i), names::_compiled_call_impl);
    if (!compiled || compiled.get() != Py_None) return false;
  }
  return true;
}

// Has an exception go on as it is.
inline void raise(PyObject* error) {
  PyErr_Restore(Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(error))), Py_NewRef(error),
                PyException_GetTraceback(error));
}

// Takes the exception that is raised; null where there is none.
inline Object taken() {
  PyObject *kind, *error, *traceback;
  PyErr_Fetch(&kind, &error, &traceback);
  if (kind == nullptr) return nullptr;
  PyErr_NormalizeException(&kind, &error, &traceback);
  if (traceback != nullptr) PyException_SetTraceback(error, traceback);
  Object a(kind), b(traceback);
  return Object(error);
}

// Ends what entering has begun, but for the thread's recorder.
inline void leave() {
  at::impl::PythonTorchFunctionTLS::pop_stack();
  blocks()--;
}

// Runs the pass of a block whose lines were all known. False with an error.
inline bool run(Known* k) {
  Object module = get(k->hosted, names::module);
  PyObject* saved = part(k, kSaved);
  static PyObject *const named = PyDict_New(), *const consts = PyList_New(0);  // empty, and nobody fills them
  Object adopt(PyList_New(PyTuple_GET_SIZE(saved)));
  if (!module || !named || !consts || !adopt) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(saved); i++) {
    Py_ssize_t which = PyLong_AsSsize_t(PyTuple_GET_ITEM(saved, i));
    PyList_SET_ITEM(adopt.get(), i, Py_NewRef(PyList_GET_ITEM(k->proxies, which)));
  }
  PyObject* const args[] = {part(k, kModules), part(k, kSteps), part(k, kBefore), part(k, kNodes), module.get(),
                            k->args,           named,           consts,           part(k, kMode),  Py_False,
                            part(k, kFailure), part(k, kKept),  adopt.get(),      told.tensor};
  Object found(hooked::forward(nullptr, args, sizeof args / sizeof *args));
  if (found.get() == Py_None) return true;
  Object error = taken();
  Object raised(PyObject_CallFunctionObjArgs(told.failed, k->model, k->args, k->memo, k->proxies,
                                             error ? error.get() : Py_None, found ? found.get() : Py_None, nullptr));
  if (raised) raise(raised.get());
  return false;
}

// What was not saved belongs to a trace that has ended, if the user has it still.
inline bool lose(Known* k) {
  PyObject* ids = part(k, kIds);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(k->proxies); i++) {
    PyObject* proxy = PyList_GET_ITEM(k->proxies, i);
    if (Py_REFCNT(proxy) == 1 || reinterpret_cast<PyObject*>(Py_TYPE(proxy)) != recording::parts.proxy) continue;
    if (PyObject_GenericSetAttr(proxy, names::_rec, part(k, kRec)) != 0 ||
        PyObject_GenericSetAttr(proxy, names::_id, PyTuple_GET_ITEM(ids, i)) != 0)
      return false;
  }
  return true;
}

// The end of a block whose lines were all known. False with an error.
inline bool end(Known* k) {
  Object self = owned(reinterpret_cast<PyObject*>(k));
  k->state = Known::kRunning;
  leave();
  bool done = run(k);
  Object error = done ? nullptr : taken();
  k->state = done ? Known::kEnded : Known::kFailed;
  if (k->real != nullptr) {  // somebody has looked during the pass
    Object ended(PyObject_CallFunctionObjArgs(told.end, k->real, k->memo, error ? error.get() : Py_None, nullptr));
    if (!ended && !error) error = taken();
  } else if (done && !lose(k)) {
    error = taken();
  }
  PyErr_Clear();
  set_now(nullptr);
  PyList_SetSlice(k->proxies, 0, PyList_GET_SIZE(k->proxies), nullptr);
  if (error) raise(error.get());
  return !error;
}

inline PyObject* exit(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    Known* k = of(self);
    if (k->real == nullptr && k->state == Known::kOpen && now() == self && count == 3 && args[0] == Py_None) {
      bool done = is_done(k);
      PyErr_Clear();  // of what is no module any more: the block is recorded
      if (done) return end(k) ? Py_NewRef(Py_False) : nullptr;
    }
    if (!settle(k)) {
      if (k->state == Known::kOpen) {  // what makes the recorder has failed
        Object error = taken();
        k->state = Known::kFailed;
        leave();
        set_now(nullptr);
        if (error) raise(error.get());
      }
      return nullptr;
    }
    Object method(PyObject_GetAttrString(k->real, "__exit__"));
    return method ? PyObject_Vectorcall(method.get(), args, static_cast<size_t>(count), nullptr) : nullptr;
  });
}

inline PyObject* attribute(PyObject* self, PyObject* name) {
  PyObject* own = PyObject_GenericGetAttr(self, name);
  if (own != nullptr || !PyErr_ExceptionMatches(PyExc_AttributeError)) return own;
  PyErr_Clear();
  return guarded<PyObject*>(nullptr,
                            [&] { return settle(of(self)) ? PyObject_GetAttr(of(self)->real, name) : nullptr; });
}

inline int set_attribute(PyObject* self, PyObject* name, PyObject* value) {
  return guarded<int>(-1, [&] { return settle(of(self)) ? PyObject_SetAttr(of(self)->real, name, value) : -1; });
}

inline PyObject* shown(PyObject* self) {
  return guarded<PyObject*>(nullptr, [&] { return settle(of(self)) ? PyObject_Repr(of(self)->real) : nullptr; });
}

inline PyObject* Known::* const kHeld[] = {&Known::model, &Known::hosted,  &Known::args,
                                           &Known::memo,  &Known::proxies, &Known::real};

inline int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  for (auto member : kHeld) Py_VISIT(of(self)->*member);
  return 0;
}

inline int clear(PyObject* self) {
  for (auto member : kHeld) Py_CLEAR(of(self)->*member);
  return 0;
}

inline void dealloc(PyObject* self) {
  PyTypeObject* kind = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  if (of(self)->weak != nullptr) PyObject_ClearWeakRefs(self);
  clear(self);
  kind->tp_free(self);
  Py_DECREF(kind);
}

// A method of the tracer that there would have been.
template <const char* const* name>
PyObject* method_of(PyObject* self, PyObject* args) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (!settle(of(self))) return nullptr;
    Object method(PyObject_GetAttrString(of(self)->real, *name));
    return method ? PyObject_CallObject(method.get(), args) : nullptr;
  });
}

inline constexpr const char* kDir = "__dir__";
inline constexpr const char* kReduce = "__reduce_ex__";

inline PyObject* kind(PyObject*, void*) { return Py_NewRef(told.tracer); }

inline PyTypeObject* type() {
  static PyMethodDef methods[] = {{"__enter__", enter, METH_NOARGS, nullptr},
                                  {"__exit__", python::fast(exit), METH_FASTCALL, nullptr},
                                  {"__dir__", method_of<&kDir>, METH_VARARGS, nullptr},
                                  {"__reduce_ex__", method_of<&kReduce>, METH_VARARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef getset[] = {{"__class__", kind, nullptr, nullptr, nullptr},
                                 {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyMemberDef members[] = {{"__weaklistoffset__", T_PYSSIZET, offsetof(Known, weak), READONLY, nullptr},
                                  {nullptr, 0, 0, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
                                {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
                                {Py_tp_clear, reinterpret_cast<void*>(clear)},
                                {Py_tp_getattro, reinterpret_cast<void*>(attribute)},
                                {Py_tp_setattro, reinterpret_cast<void*>(set_attribute)},
                                {Py_tp_repr, reinterpret_cast<void*>(shown)},
                                {Py_tp_methods, methods},
                                {Py_tp_getset, getset},
                                {Py_tp_members, members},
                                {0, nullptr}};
  static PyType_Spec spec = {"nnsight_go.KnownTrace", sizeof(Known), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  static PyTypeObject* made = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  return made;
}

// Whether a memo is of this trace, as far as that can be told before its block.
inline bool fits(PyObject* memo, PyObject* model, PyObject* hosted, const Place& place) {
  auto at = [&](Part which) { return PyTuple_GET_ITEM(memo, which); };
  if (!place.is(at(kCode), at(kPlace)) || PyLong_AsVoidPtr(at(kModel)) != model ||
      PyLong_AsLong(at(kMode)) != recording::mode_now() || is_cast() || !is_default(at(kDType)))
    return false;
  Object latest = get(hosted, names::_latest), edits = recording::own(model, names::_edits),
         session = get(told.opened, names::session);
  return latest && edits && session && PyTuple_Check(latest.get()) &&
         PyTuple_GET_ITEM(latest.get(), 1) == at(kLayout) && PyTuple_Check(edits.get()) &&
         PyTuple_GET_SIZE(edits.get()) == 0 && session.get() == Py_None;
}

// trace(model, *args, **kwargs): what NNsight.trace does.
inline PyObject* trace(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* named) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    constexpr long kTries = 3;
    Object key, hosted;
    Place place;
    if (named == nullptr && count >= 2 && told.trace != nullptr) {
      place = Place::here();
      hosted = recording::own(args[0], names::_hosted);
      Object memos = hosted ? get(hosted.get(), names::known) : nullptr;
      if (!memos) return nullptr;
      bool may = PyDict_Check(memos.get()) && place.code != nullptr;  // a thread may begin here
      auto mix = reinterpret_cast<uintptr_t>(place.code) * 31 + reinterpret_cast<uintptr_t>(args[0]) + place.lasti;
      if (may) key.reset(PyLong_FromSize_t(mix));
      Object memo = owned(key ? PyDict_GetItemWithError(memos.get(), key.get()) : nullptr);
      if (PyErr_Occurred()) return nullptr;
      if (memo && PyTuple_Check(memo.get())) {
        if (fits(memo.get(), args[0], hosted.get(), place)) {
          Object given(PyTuple_New(count - 1)), proxies(PyList_New(0));
          if (!given || !proxies) return nullptr;
          for (Py_ssize_t i = 1; i < count; i++) PyTuple_SET_ITEM(given.get(), i - 1, Py_NewRef(args[i]));
          Known* k = PyObject_GC_New(Known, type());
          if (k == nullptr) return nullptr;
          k->model = Py_NewRef(args[0]);
          k->hosted = hosted.release();
          k->args = given.release();
          k->memo = memo.release();
          k->proxies = proxies.release();
          k->real = k->weak = nullptr;
          k->at = 0;
          k->state = Known::kNew;
          PyObject_GC_Track(k);
          return reinterpret_cast<PyObject*>(k);
        }
        if (PyErr_Occurred()) return nullptr;
      } else if (memo && PyLong_AsLong(memo.get()) >= kTries) {
        key.reset();
      }
    }
    Object tracer(PyObject_Vectorcall(told.trace, args, static_cast<size_t>(count), named));
    if (!tracer || !key) return tracer.release();
    Object rec = get(tracer.get(), names::_recorder), log(PyList_New(0)), lasti(PyLong_FromLong(place.lasti));
    Object site(lasti ? PyTuple_Pack(4, key.get(), reinterpret_cast<PyObject*>(place.code), lasti.get(), args[0])
                      : nullptr);
    if (!rec || !log || !site || PyObject_SetAttr(rec.get(), names::site, site.get()) != 0 ||
        PyObject_SetAttr(rec.get(), names::log, log.get()) != 0)
      return nullptr;
    return tracer.release();
  });
}

// recorder(current): the recorder of this thread's block, or None.
inline PyObject* recorder(PyObject*, PyObject*) {
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (Known* k = open())
      if (!settle(k)) return nullptr;
    return Py_NewRef(now() == nullptr ? Py_None : now());
  });
}

// record(current, recorder): has it from here on.
inline PyObject* record(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "a recorder, or None");
    return nullptr;
  }
  set_now(args[1]);
  Py_RETURN_NONE;
}

// remember(...): see Told.
inline PyObject* remember(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kTold) {
    PyErr_SetString(PyExc_TypeError, "it takes the parts of known.h");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; i++) Py_INCREF(args[i]);  // for as long as the process lives
  told = {args[0], args[1], args[2], args[3], args[4], args[5], args[6], args[7], args[8], args[9], args[10], args[11]};
  Py_RETURN_NONE;
}

}  // namespace known
