// Forward passes of a module in whose hooks the lines of a block are done.
//
// What is done where has been worked out in Python (hooked.py) as programs of simple steps; here they run. A pass
// holds its values in a list, by the number of the node that gives them.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <Python.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <vector>

#include "adopting.h"
#include "python.h"
#include "recording.h"

namespace hooked {

using python::fast;
using python::guarded;
using python::is_tensor;
using python::Object;
using python::owned;

// The steps of a program, as tuples: what is done, the node that it does, and what that takes. As in hooked.py.
enum Op : long {
  kRead,   // (id): what the module gives
  kWrite,  // (id, node): what stands in its place
  kConst,  // (id, number): a tensor from outside
  kItem,   // (id, node, key)
  kStore,  // (id, node, key, other or -1, value): node[key] = other node or value
  kCall,   // (id, function, args, refs, kwargs or None): refs are positions in args, each followed by a node
  kFree,   // (id): nothing uses it any more
};

inline PyObject* part(PyObject* step, Py_ssize_t i) { return PyTuple_GET_ITEM(step, i); }
inline Py_ssize_t number(PyObject* step, Py_ssize_t i) { return PyLong_AsSsize_t(part(step, i)); }

// While there is one, operations see the autograd and autocast state that the block was written under, whatever the
// module has changed.
class AsWritten {
 public:
  AsWritten(long mode, bool autocast) {
    if (recording::mode_now() != mode) {
      inference_.emplace(static_cast<bool>(mode & 2));
      grad_.emplace(static_cast<bool>(mode & 1));
    }
    if (!autocast && (at::autocast::is_autocast_enabled(at::kCPU) || at::autocast::is_autocast_enabled(at::kCUDA)))
      plain_.emplace(c10::autocast_dispatch_keyset);
  }

 private:
  std::optional<c10::InferenceMode> inference_;
  std::optional<at::AutoGradMode> grad_;
  std::optional<c10::impl::ExcludeDispatchKeyGuard> plain_;
};

// A pass on its way. It lives as long as its hooks stand.
class Pass {
 public:
  // consts: a list; failed(id, error, values) gives the exception for an error of a node.
  Pass(PyObject* consts, PyObject* failed, long mode, bool autocast, Py_ssize_t nodes, Py_ssize_t modules)
      : values(PyList_New(nodes)),
        found(PyList_New(modules)),
        thread_(PyThread_get_thread_ident()),
        consts_(consts),
        failed_(failed),
        mode_(mode),
        autocast_(autocast) {
    if (!values || !found) throw std::bad_alloc();
    for (Py_ssize_t i = 0; i < nodes; i++) PyList_SET_ITEM(values.get(), i, Py_NewRef(Py_None));
    for (Py_ssize_t i = 0; i < modules; i++) PyList_SET_ITEM(found.get(), i, Py_NewRef(Py_Ellipsis));
  }

  // Does a program where a module has given something. What is to stand there, or null: with an error, or, without
  // one, since it stays.
  Object run(PyObject* program, PyObject* given) {
    std::optional<AsWritten> state;  // from the first operation on
    Object now = owned(given);
    bool wrote = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(program); i++) {
      PyObject* step = PyTuple_GET_ITEM(program, i);
      switch (number(step, 0)) {
        case kRead:
          if (!keep(step, owned(now.get()))) return nullptr;
          break;
        case kWrite:
          now = owned(value(number(step, 2)));
          wrote = true;
          break;
        case kFree:
          if (!keep(step, owned(Py_None))) return nullptr;
          break;
        default:
          if (!state) state.emplace(mode_, autocast_);
          if (!done(step)) {
            if (PyErr_Occurred()) explain(part(step, 1));
            return nullptr;
          }
      }
    }
    return wrote ? std::move(now) : nullptr;
  }

  bool is_mine() const { return PyThread_get_thread_ident() == thread_; }

  const Object values;  // by node
  const Object found;   // by module: ... until it is called, then True, or what it gave that is no tensor

 private:
  PyObject* value(Py_ssize_t id) const { return PyList_GET_ITEM(values.get(), id); }

  bool keep(PyObject* step, Object what) {
    return what && PyList_SetItem(values.get(), number(step, 1), what.release()) == 0;
  }

  bool done(PyObject* step) {
    switch (number(step, 0)) {
      case kConst:
        return keep(step, owned(PyList_GetItem(consts_, number(step, 2))));
      case kItem:
        return keep(step, Object(PyObject_GetItem(value(number(step, 2)), part(step, 3))));
      case kStore: {
        Py_ssize_t other = number(step, 4);
        return PyObject_SetItem(value(number(step, 2)), part(step, 3), other < 0 ? part(step, 5) : value(other)) == 0;
      }
      case kCall:
        return keep(step, called(step));
    }
    PyErr_SetString(PyExc_ValueError, "a step of a program is of no known kind");
    return false;
  }

  Object called(PyObject* step) {
    enum { kFunction = 2, kArgs, kRefs, kNamed };
    PyObject *args = part(step, kArgs), *refs = part(step, kRefs), *named = part(step, kNamed);
    Object own(PyTuple_New(PyTuple_GET_SIZE(args)));
    if (!own) return nullptr;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); i++) PyTuple_SET_ITEM(own.get(), i, Py_NewRef(part(args, i)));
    for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(refs); i += 2)
      if (PyTuple_SetItem(own.get(), number(refs, i), Py_NewRef(value(number(refs, i + 1)))) != 0) return nullptr;
    return Object(PyObject_Call(part(step, kFunction), own.get(), named == Py_None ? nullptr : named));
  }

  // Puts the exception that names the user's line in the place of the one that an operation has raised.
  void explain(PyObject* id) {
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    Object t(type), e(error), b(traceback);
    if (!PyErr_GivenExceptionMatches(type, PyExc_Exception)) {  // an interrupt goes on as it is
      PyErr_Restore(t.release(), e.release(), b.release());
      return;
    }
    Object found(PyObject_CallFunctionObjArgs(failed_, id, error, values.get(), nullptr));
    if (found) PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(found.get())), found.get());
  }

  const unsigned long thread_;
  PyObject *const consts_, *const failed_;
  const long mode_;
  const bool autocast_;
};

constexpr char kPass[] = "nnsight_go.Pass";

// The hook of one module. Its self is a tuple: the pass, the number of the module in it, and its program.
inline PyObject* hook(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  enum { kOf, kPlace, kProgram };
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count != 3) {
      PyErr_SetString(PyExc_TypeError, "a hook is called with a module, its arguments and its output");
      return nullptr;
    }
    if (!PyCapsule_IsValid(part(self, kOf), kPass)) Py_RETURN_NONE;  // copied with its module, and the pass has ended
    auto* pass = static_cast<Pass*>(PyCapsule_GetPointer(part(self, kOf), kPass));
    Py_ssize_t place = number(self, kPlace);
    if (!pass->is_mine() || PyList_GET_ITEM(pass->found.get(), place) != Py_Ellipsis) Py_RETURN_NONE;
    bool fits = is_tensor(args[2]);
    if (PyList_SetItem(pass->found.get(), place, Py_NewRef(fits ? Py_True : args[2])) != 0) return nullptr;
    if (!fits) Py_RETURN_NONE;
    Object now = pass->run(part(self, kProgram), args[2]);
    if (now || PyErr_Occurred()) return now.release();
    Py_RETURN_NONE;
  });
}

// Hooks that stand in tables of modules. They go when it does, and whoever keeps one holds nothing of the pass.
class Mounted {
 public:
  explicit Mounted(Pass* pass) : pass_(PyCapsule_New(pass, kPass, nullptr)) {}
  Mounted(const Mounted&) = delete;
  ~Mounted() {
    PyObject *type, *value, *traceback;  // an error of the pass goes on as it is
    PyErr_Fetch(&type, &value, &traceback);
    for (auto& [table, hook] : all_)
      if (PyObject_DelItem(table.get(), hook.get()) != 0) PyErr_Clear();  // the pass has cleared it itself
    if (pass_ && PyCapsule_SetName(pass_.get(), "ended") != 0) PyErr_Clear();
    PyErr_Restore(type, value, traceback);
  }

  bool put(PyObject* module, Py_ssize_t place, PyObject* program) {
    static PyMethodDef method = {"hook", fast(hook), METH_FASTCALL, nullptr};
    static PyObject* const hooks = PyUnicode_InternFromString("_forward_hooks");
    Object at(PyLong_FromSsize_t(place)), table(PyObject_GetAttr(module, hooks));
    Object self(at && pass_ ? PyTuple_Pack(3, pass_.get(), at.get(), program) : nullptr);
    Object made(self && table ? PyCFunction_New(&method, self.get()) : nullptr);
    if (!made || PyObject_SetItem(table.get(), made.get(), made.get()) != 0) return false;
    all_.emplace_back(std::move(table), std::move(made));
    return true;
  }

 private:
  Object pass_;
  std::vector<std::pair<Object, Object>> all_;
};

// Whether a module gives something else than its hooks are given last: backward hooks, of it or of all, come between.
inline bool is_wrapped(PyObject* module) {
  static PyObject* const names[] = {
      PyUnicode_InternFromString("_backward_hooks"), PyUnicode_InternFromString("_backward_pre_hooks"),
      PyUnicode_InternFromString("_global_backward_hooks"), PyUnicode_InternFromString("_global_backward_pre_hooks")};
  static PyObject* const all = PyImport_ImportModule("torch.nn.modules.module");
  if (all == nullptr) return true;
  for (int i = 0; i < 4; i++) {
    Object hooks(PyObject_GetAttr(i < 2 ? module : all, names[i]));
    Py_ssize_t count = hooks ? PyObject_Size(hooks.get()) : -1;
    if (count < 0) PyErr_Clear();  // a scripted module has them elsewhere
    if (count != 0) return true;
  }
  return false;
}

// forward(modules, programs, before, nodes, module, args, kwargs, consts, mode, autocast, failed, kept, proxies, cls):
// does a program before the pass, module(*args, **kwargs), and in it the program of each of a tuple of modules when it
// is first called on this thread. Then each of a list of proxies is the value of its node among kept, and it gives
// None. Where not every module has given a tensor, no proxy has become anything, and it gives Pass::found.
inline PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  enum {
    kModules,
    kPrograms,
    kBefore,
    kNodes,
    kModule,
    kArgs,
    kNamed,
    kConsts,
    kMode,
    kAutocast,
    kFailed,
    kKept,
    kProxies,
    kClass,
    kAll
  };
  return guarded<PyObject*>(nullptr, [&]() -> PyObject* {
    if (count != kAll || !PyTuple_Check(args[kModules]) || !PyTuple_Check(args[kPrograms]) ||
        PyTuple_GET_SIZE(args[kModules]) != PyTuple_GET_SIZE(args[kPrograms]) || !PyTuple_Check(args[kArgs]) ||
        !PyDict_Check(args[kNamed]) || !PyList_Check(args[kConsts]) || !PyList_Check(args[kKept]) ||
        !PyList_Check(args[kProxies]) || PyList_GET_SIZE(args[kKept]) != PyList_GET_SIZE(args[kProxies])) {
      PyErr_SetString(PyExc_TypeError, "forward() is called with what hooked.h says");
      return nullptr;
    }
    Py_ssize_t modules = PyTuple_GET_SIZE(args[kModules]), nodes = PyLong_AsSsize_t(args[kNodes]);
    Pass pass(args[kConsts], args[kFailed], PyLong_AsLong(args[kMode]), args[kAutocast] == Py_True, nodes, modules);
    {
      Mounted mounted(&pass);
      Py_ssize_t whole = -1;
      for (Py_ssize_t i = 0; i < modules; i++) {
        PyObject* module = part(args[kModules], i);
        if (module == args[kModule] && !is_wrapped(module))
          whole = i;
        else if (!mounted.put(module, i, part(args[kPrograms], i)))
          return nullptr;
      }
      pass.run(args[kBefore], Py_None);
      if (PyErr_Occurred()) return nullptr;
      Object out(PyObject_Call(args[kModule], args[kArgs], args[kNamed]));
      if (!out) return nullptr;
      if (whole >= 0) {  // what a hook of the module itself would be given last is what it gives
        bool fits = is_tensor(out.get());
        if (PyList_SetItem(pass.found.get(), whole, Py_NewRef(fits ? Py_True : out.get())) != 0) return nullptr;
        if (fits) pass.run(part(args[kPrograms], whole), out.get());
        if (PyErr_Occurred()) return nullptr;
      }
    }
    for (Py_ssize_t i = 0; i < modules; i++)
      if (PyList_GET_ITEM(pass.found.get(), i) != Py_True) return Py_NewRef(pass.found.get());
    std::vector<PyObject*> values;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[kKept]); i++) {
      PyObject* value = PyList_GetItem(pass.values.get(), PyLong_AsSsize_t(PyList_GET_ITEM(args[kKept], i)));
      if (value == nullptr) return nullptr;
      if (!is_tensor(value)) {
        PyErr_Format(PyExc_TypeError, "a proxy cannot become a %s", Py_TYPE(value)->tp_name);
        return nullptr;
      }
      values.push_back(value);
    }
    auto source = [&](Py_ssize_t i) { return values[i]; };
    if (adopting::adopt_objects(args[kProxies], args[kClass], source) != 0) return nullptr;
    Py_RETURN_NONE;
  });
}

}  // namespace hooked
