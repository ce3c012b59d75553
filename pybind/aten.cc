#include "aten.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "capture.h"
#include "gradient.h"
#include "indexing.h"
#include "linear.h"
#include "memory.h"
#include "overload.h"
#include "values.h"

namespace {

using at::Tensor;
using c10::IValue;
using nng::as_tensor;

std::atomic<int64_t> live{0};

const int threads_at_load = at::get_num_threads();

char* copy_text(const char* text) {
  size_t n = std::strlen(text) + 1;
  char* out = static_cast<char*>(std::malloc(n));
  if (out != nullptr) std::memcpy(out, text, n);
  return out;
}

// Runs body; what it throws becomes *err and -1. PyTorch's own messages come without the C++ backtrace.
template <typename F>
int guarded(char** err, F body) noexcept {
  try {
    body();
    return 0;
  } catch (const c10::Error& e) {
    *err = copy_text(e.what_without_backtrace());
  } catch (const std::exception& e) {
    *err = copy_text(e.what());
  } catch (...) {
    *err = copy_text("an unknown C++ exception");
  }
  return -1;
}

Tensor* hand_out(Tensor t) {
  auto* out = new Tensor(std::move(t));
  live.fetch_add(1, std::memory_order_relaxed);
  return out;
}

// Puts a value that is neither container nor text into *out; false for those.
bool put_plain(IValue&& v, nnga_val* out) {
  *out = {};
  if (v.isTensor()) {
    Tensor t = std::move(v).toTensor();
    if (!t.defined()) return true;  // None
    out->tag = NNGA_TENSOR;
    out->p = reinterpret_cast<intptr_t>(hand_out(std::move(t)));
  } else if (v.isNone()) {
    out->tag = NNGA_NONE;
  } else if (v.isBool()) {
    out->tag = NNGA_BOOL;
    out->i = v.toBool();
  } else if (v.isInt() || v.isSymInt()) {
    out->tag = NNGA_INT;
    out->i = v.isInt() ? v.toInt() : v.toSymInt().expect_int();
  } else if (v.isDouble()) {
    out->tag = NNGA_FLOAT;
    out->d = v.toDouble();
  } else if (v.isComplexDouble()) {
    out->tag = NNGA_COMPLEX;
    out->d = v.toComplexDouble().real();
    out->e = v.toComplexDouble().imag();
  } else {
    return false;
  }
  return true;
}

// Appends a value; the p of text is an offset into *strings until the caller knows its address.
void flatten(IValue v, std::vector<nnga_val>* out, std::string* strings) {
  nnga_val head = {};
  auto text = [&](int32_t tag, const std::string& s) {
    head.tag = tag;
    head.i = static_cast<int64_t>(s.size());
    head.p = static_cast<intptr_t>(strings->size());
    *strings += s;
    out->push_back(head);
  };
  auto sequence = [&](int32_t tag, const auto& items) {
    head.tag = tag;
    head.i = static_cast<int64_t>(items.size());
    out->push_back(head);
    for (const IValue& item : items) flatten(item, out, strings);
  };
  if (v.isString()) {
    text(NNGA_STRING, v.toStringRef());
  } else if (v.isDevice()) {
    text(NNGA_DEVICE, v.toDevice().str());
  } else if (v.isTuple()) {
    sequence(NNGA_TUPLE, v.toTupleRef().elements());
  } else if (v.isList()) {
    sequence(NNGA_LIST, v.toListRef());
  } else {
    std::string kind = v.tagKind();
    if (!put_plain(std::move(v), &head)) {
      throw std::invalid_argument("an operator returned a " + kind + ", which has no place in a graph");
    }
    out->push_back(head);
  }
}

// Puts results that are no single plain value into a malloc'd array, texts after the values.
void put_all(torch::jit::Stack&& results, nnga_val** outs, int64_t* nouts) {
  std::vector<nnga_val> values;
  std::string strings;
  try {
    if (results.size() != 1) {
      nnga_val head = {};
      head.tag = NNGA_TUPLE;
      head.i = static_cast<int64_t>(results.size());
      values.push_back(head);
    }
    for (IValue& v : results) flatten(std::move(v), &values, &strings);
    size_t bytes = values.size() * sizeof(nnga_val);
    auto* memory = static_cast<char*>(std::malloc(bytes + strings.size()));
    if (memory == nullptr) throw std::bad_alloc();
    for (nnga_val& v : values) {
      if (v.tag == NNGA_STRING || v.tag == NNGA_DEVICE) v.p += reinterpret_cast<intptr_t>(memory + bytes);
    }
    std::memcpy(memory, values.data(), bytes);
    std::memcpy(memory + bytes, strings.data(), strings.size());
    *outs = reinterpret_cast<nnga_val*>(memory);
    *nouts = static_cast<int64_t>(values.size());
  } catch (...) {
    for (const nnga_val& v : values) {
      if (v.tag == NNGA_TENSOR) nnga_tensor_free(reinterpret_cast<void*>(v.p));
    }
    throw;
  }
}

struct DType {
  const char* name;
  at::ScalarType type;
};

constexpr DType kDTypes[] = {
    {"float32", at::kFloat},
    {"int64", at::kLong},
    {"bool", at::kBool},
    {"float16", at::kHalf},
    {"bfloat16", at::kBFloat16},
    {"float64", at::kDouble},
    {"int32", at::kInt},
    {"int16", at::kShort},
    {"int8", at::kChar},
    {"uint8", at::kByte},
    {"uint16", at::kUInt16},
    {"uint32", at::kUInt32},
    {"uint64", at::kUInt64},
    {"complex32", at::kComplexHalf},
    {"complex64", at::kComplexFloat},
    {"complex128", at::kComplexDouble},
    {"float8_e5m2", at::kFloat8_e5m2},
    {"float8_e4m3fn", at::kFloat8_e4m3fn},
    {"float8_e5m2fnuz", at::kFloat8_e5m2fnuz},
    {"float8_e4m3fnuz", at::kFloat8_e4m3fnuz},
};

}  // namespace

extern "C" {

void nnga_free(void* p) { std::free(p); }

int64_t nnga_live(void) { return live.load(std::memory_order_relaxed); }

void nnga_count(int64_t delta) { live.fetch_add(delta, std::memory_order_relaxed); }

void nnga_tensor_free(void* t) {
  if (t == nullptr) return;
  live.fetch_sub(1, std::memory_order_relaxed);
  delete static_cast<Tensor*>(t);
}

void* nnga_tensor_clone_handle(void* t) {
  try {
    return hand_out(as_tensor(t));
  } catch (...) {
    return nullptr;
  }
}

int nnga_tensor_facts(void* tensor, int64_t* facts, int64_t* sizes, int64_t* strides, int64_t* ndim, char** err) {
  return guarded(err, [&] {
    const Tensor& t = as_tensor(tensor);
    int64_t room = *ndim;
    *ndim = t.dim();
    for (int64_t k = 0; k < std::min(room, t.dim()); k++) {
      sizes[k] = t.size(k);
      strides[k] = t.layout() == at::kStrided ? t.stride(k) : 0;
    }
    bool stored = t.has_storage();
    facts[0] = static_cast<int64_t>(t.scalar_type());
    facts[1] = static_cast<int64_t>(t.device().type());
    facts[2] = t.device().index();
    facts[3] = static_cast<int64_t>(t.element_size());
    facts[4] = stored ? t.storage_offset() : 0;
    facts[5] = t.requires_grad();
    facts[6] = t.numel();
    facts[7] = t.is_inference() ? 0 : static_cast<int64_t>(t._version());
    facts[8] = stored ? reinterpret_cast<int64_t>(t.storage().unsafeGetStorageImpl()) : 0;
    facts[9] = stored && t.device().type() != at::kMeta ? reinterpret_cast<int64_t>(t.const_data_ptr()) : 0;
    facts[10] = static_cast<int64_t>(t.use_count());
    facts[11] = stored ? static_cast<int64_t>(t.storage().nbytes()) : 0;
  });
}

int nnga_from_blob(void* data, const int64_t* sizes, int64_t ndim, int64_t scalar_type, void (*free_fn)(uintptr_t),
                   uintptr_t ctx, void** out, char** err) {
  return guarded(err, [&] {
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(scalar_type));
    at::IntArrayRef shape(sizes, static_cast<size_t>(ndim));
    if (free_fn == nullptr) {
      *out = hand_out(at::from_blob(data, shape, options));
      return;
    }
    // Disarmed while from_blob can still fail: then the memory stays the caller's. A forked child
    // shares the memory but not the threads of whoever lent it, and must not call back.
    auto armed = std::make_shared<bool>(false);
    pid_t owner = getpid();
    Tensor t = at::from_blob(
        data, shape,
        [free_fn, ctx, armed, owner](void*) {
          if (*armed && getpid() == owner) free_fn(ctx);
        },
        options);
    *out = hand_out(std::move(t));
    *armed = true;
  });
}

int nnga_op_find(const char* name, const char* overload, void** out, char** err) {
  return guarded(err, [&] {
    std::string full = name;
    std::vector<c10::OperatorHandle> overloads;
    if (overload == nullptr) {
      overloads = nng::overloads_of(name);
    } else {
      auto handle = c10::Dispatcher::singleton().findSchema({name, overload});
      if (handle.has_value()) overloads.push_back(*handle);
      full += std::string(".") + (overload[0] != 0 ? overload : "default");
    }
    if (overloads.empty()) {
      std::string text = "there is no operator " + full;
      if (overload != nullptr) {
        const char* before = "; the overloads are ";
        for (const auto& op : nng::overloads_of(name)) {
          const std::string& known = op.operator_name().overload_name;
          text += before + (known.empty() ? std::string("default") : known);
          before = ", ";
        }
      }
      throw std::invalid_argument(text);
    }
    *out = new nng::Op(full, std::move(overloads));
  });
}

int nnga_op_schemas(const char* name, char** out, char** err) {
  return guarded(err, [&] {
    std::string text;
    for (const auto& op : nng::overloads_of(name)) text += c10::toString(op.schema()) + "\n";
    *out = copy_text(text.c_str());
  });
}

int nnga_op_writes(void* handle, char** out, char** err) {
  return guarded(err, [&] {
    std::string text;
    for (const auto& op : static_cast<const nng::Op*>(handle)->overloads()) {
      int place = 0;
      for (const c10::Argument& a : op.schema().arguments()) {
        int at = a.kwarg_only() ? -1 : place++;
        if (a.alias_info() != nullptr && a.alias_info()->isWrite()) text += std::to_string(at) + " " + a.name() + "\n";
      }
    }
    *out = copy_text(text.c_str());
  });
}

int nnga_op_call(void* handle, const nnga_val* args, int64_t nargs, int64_t nkw, const char* kwnames,
                 const char* strings, nnga_val* out, nnga_val** outs, int64_t* nouts, char** err) {
  return guarded(err, [&] {
    nng::Call call(args, nargs, nkw, kwnames, strings);
    torch::jit::Stack stack;
    const auto& overload = static_cast<const nng::Op*>(handle)->choose(call, &stack);
    nng::numbers_follow(&stack);
    overload.callBoxed(&stack);
    *nouts = 0;
    if (stack.empty()) {
      *out = {};
    } else if (stack.size() > 1 || !put_plain(std::move(stack[0]), out)) {
      put_all(std::move(stack), outs, nouts);
    }
  });
}

int nnga_index_get(void* self, const nnga_val* index, void** out, char** err) {
  return guarded(err, [&] {
    const Tensor& t = as_tensor(self);
    *out = hand_out(at::indexing::get_item(t, nng::index_of(index, t.device())));
  });
}

int nnga_index_set(void* self, const nnga_val* index, const nnga_val* value, char** err) {
  return guarded(err, [&] {
    const Tensor& t = as_tensor(self);
    auto where = nng::index_of(index, t.device());
    if (value->tag == NNGA_TENSOR) {
      at::indexing::set_item(t, where, nng::tensor_of(value));
    } else if (nng::is_number(value)) {
      at::indexing::set_item(t, where, nng::scalar_of(value));
    } else {
      throw std::invalid_argument(std::string("can't assign a ") + nng::type_name(value) + " to a " + t.toString());
    }
  });
}

void nnga_keep_threads(void) { at::set_num_threads(threads_at_load); }

int32_t nnga_grad_enabled(void) { return at::GradMode::is_enabled(); }

void nnga_set_grad_enabled(int32_t on) { at::GradMode::set_enabled(on != 0); }

int32_t nnga_inference_enabled(void) { return c10::InferenceMode::is_enabled(); }

void* nnga_inference_enter(int32_t on) { return new c10::InferenceMode(on != 0); }

void nnga_inference_leave(void* guard) { delete static_cast<c10::InferenceMode*>(guard); }

int nnga_random_state(const char* device, void** out, char** err) {
  return guarded(err, [&] {
    auto generator = at::globalContext().defaultGenerator(at::Device(device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    *out = hand_out(generator.get_state());
  });
}

int nnga_set_random_state(const char* device, void* state, char** err) {
  return guarded(err, [&] {
    auto generator = at::globalContext().defaultGenerator(at::Device(device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(as_tensor(state));
  });
}

int nnga_track(void* tensor, int32_t retain, void** out, char** err) {
  return guarded(err, [&] { *out = hand_out(nng::tracked(as_tensor(tensor), retain != 0)); });
}

int64_t nnga_grad_order(void* tensor) {
  const auto& node = as_tensor(tensor).grad_fn();
  return node == nullptr ? -1 : static_cast<int64_t>(node->sequence_nr());
}

int nnga_backward(const nnga_tensors* given, int32_t flags, void** grads, char** err) {
  return guarded(err, [&] {
    auto list = [](const nnga_tensors& tensors) {
      nng::variable_list out;
      for (int64_t i = 0; i < tensors.n; i++) {
        out.push_back(tensors.p[i] == nullptr ? Tensor() : as_tensor(tensors.p[i]));
      }
      return out;
    };
    nng::Backward pass{list(given[0]), list(given[1]), list(given[2]), list(given[3]), list(given[4]), list(given[5])};
    pass.retain = (flags & NNGA_RETAIN) != 0;
    pass.create = (flags & NNGA_CREATE) != 0;
    pass.fill = (flags & NNGA_FILL) != 0;
    at::AutoGradMode on(true);  // a pass under no_grad finds the same graph
    auto found = pass.run();
    for (size_t i = 0; i < found.size(); i++) {
      grads[i] = found[i].defined() ? hand_out(std::move(found[i])) : nullptr;
    }
  });
}

int64_t nnga_dtype(const char* name) {
  for (const DType& d : kDTypes) {
    if (std::strcmp(d.name, name) == 0) return static_cast<int64_t>(d.type);
  }
  return -1;
}

const char* nnga_dtype_name(int64_t scalar_type) {
  for (const DType& d : kDTypes) {
    if (static_cast<int64_t>(d.type) == scalar_type) return d.name;
  }
  return nullptr;
}

int32_t nnga_can_capture(const char* device) {
  try {
    return nng::can_capture(at::Device(device).type());
  } catch (...) {
    return 0;
  }
}

int64_t nnga_capture_settings(const char* device) {
  try {
    return nng::capture_settings(at::Device(device).type());
  } catch (...) {
    return -1;
  }
}

int nnga_capture_begin(const char* device, void** capture, char** err) {
  return guarded(err, [&] { *capture = new nng::Capture(at::Device(device)); });
}

int nnga_capture_end(void* capture, char** err) {
  return guarded(err, [&] { static_cast<nng::Capture*>(capture)->end(); });
}

int32_t nnga_capture_here(void* capture) {
  try {
    return static_cast<nng::Capture*>(capture)->here();
  } catch (...) {
    return 0;
  }
}

int nnga_capture_replay(void* capture, char** err) {
  return guarded(err, [&] { static_cast<nng::Capture*>(capture)->replay(); });
}

void nnga_capture_free(void* capture) {
  try {
    delete static_cast<nng::Capture*>(capture);
  } catch (...) {  // a device that is gone
  }
}

int32_t nnga_is_plain(void* t) { return nng::is_elements(as_tensor(t)); }

int32_t nnga_unmoved(void* const* tensors, void* const* others, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    if (!nng::is_in_place_of(as_tensor(tensors[i]), as_tensor(others[i]))) return 0;
  }
  return 1;
}

char* nnga_device_name(int64_t device_type) {
  try {
    return copy_text(c10::DeviceTypeName(static_cast<c10::DeviceType>(device_type), /*lower_case=*/true).c_str());
  } catch (...) {
    return nullptr;
  }
}

int nnga_cap_memory(int64_t more, char** err) {
  return guarded(err, [&] { nng::CountedMemory::instance().cap(more); });
}

int64_t nnga_allocated(void) { return nng::CountedMemory::instance().live(); }

int64_t nnga_peak_allocated(void) { return nng::CountedMemory::instance().peak(); }

int32_t nnga_cuda_available(void) {
  try {
    return at::hasCUDA() && at::detail::getCUDAHooks().deviceCount() > 0;
  } catch (...) {
    return 0;
  }
}

const char* nnga_torch_version(void) { return TORCH_VERSION; }

}  // extern "C"
