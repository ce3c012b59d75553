#include "aten.h"

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>
#include <ATen/TensorIndexing.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;
using c10::TypeKind;

std::atomic<int64_t> live{0};

char* copy_text(const char* text) {
  size_t n = std::strlen(text) + 1;
  char* out = static_cast<char*>(std::malloc(n));
  if (out != nullptr) std::memcpy(out, text, n);
  return out;
}

// Runs body; what it throws becomes *err and -1.
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

Tensor& as_tensor(void* t) { return *static_cast<Tensor*>(t); }

void* hand_out(Tensor t) {
  auto* out = new Tensor(std::move(t));
  live.fetch_add(1, std::memory_order_relaxed);
  return out;
}

// Values of a subtree, its head included.
int64_t span(const nnga_val* v) {
  int64_t n = 1;
  switch (v->tag) {
    case NNGA_LIST:
    case NNGA_TUPLE:
      for (int64_t k = 0; k < v->i; k++) n += span(v + n);
      break;
    case NNGA_SLICE:
      for (int k = 0; k < 3; k++) n += span(v + n);
      break;
    default:
      break;
  }
  return n;
}

const char* text_of(const nnga_val* v, const char* strings) { return strings + reinterpret_cast<intptr_t>(v->p); }

std::string string_of(const nnga_val* v, const char* strings) {
  return std::string(text_of(v, strings), static_cast<size_t>(v->i));
}

bool is_sequence(const nnga_val* v) { return v->tag == NNGA_LIST || v->tag == NNGA_TUPLE; }

std::vector<const nnga_val*> elements(const nnga_val* v) {
  std::vector<const nnga_val*> out;
  const nnga_val* at = v + 1;
  for (int64_t k = 0; k < v->i; k++) {
    out.push_back(at);
    at += span(at);
  }
  return out;
}

// How well a value fits a type: smaller is better, and an overload is chosen by the sum. A Python
// number prefers a Scalar overload to a tensor one; a default costs a little, so that of two
// overloads that fit the shorter wins.
constexpr double kExact = 0, kWiden = 1, kWrapList = 2, kBoolAsNumber = 3, kTensorAsScalar = 4, kNumberAsTensor = 5,
                 kDefault = 0.01, kNo = -1;

bool is_number(const nnga_val* v) {
  return v->tag == NNGA_INT || v->tag == NNGA_FLOAT || v->tag == NNGA_BOOL || v->tag == NNGA_COMPLEX;
}

c10::Scalar scalar_of(const nnga_val* v) {
  switch (v->tag) {
    case NNGA_BOOL:
      return c10::Scalar(v->i != 0);
    case NNGA_INT:
      return c10::Scalar(v->i);
    case NNGA_COMPLEX:
      return c10::Scalar(c10::complex<double>(v->d, v->e));
    default:
      return c10::Scalar(v->d);
  }
}

// A tensor that stands for one number where a number is wanted.
bool is_single(const nnga_val* v, bool integral) {
  if (v->tag != NNGA_TENSOR) return false;
  const Tensor& t = as_tensor(v->p);
  return t.dim() == 0 && !t.requires_grad() && (!integral || at::isIntegralType(t.scalar_type(), /*includeBool=*/false));
}

double convert(const nnga_val* v, const char* strings, const c10::Type& type, c10::optional<int32_t> fixed, IValue* out);

template <typename T, typename Get>
double convert_list(const nnga_val* v, const char* strings, const c10::Type& element, Get get, IValue* out) {
  c10::List<T> list;
  double cost = kExact;
  for (const nnga_val* e : elements(v)) {
    IValue item;
    double c = convert(e, strings, element, c10::nullopt, &item);
    if (c < 0) return kNo;
    cost = std::max(cost, c);
    list.push_back(get(item));
  }
  *out = std::move(list);
  return cost;
}

double convert_sequence(const nnga_val* v, const char* strings, const c10::Type& element, c10::optional<int32_t> fixed,
                        IValue* out) {
  TypeKind kind = element.kind();
  if (!is_sequence(v)) {
    if (!fixed.has_value()) return kNo;  // only int[2] and the like take a bare number, for every element
    IValue item;
    double cost = convert(v, strings, element, c10::nullopt, &item);
    if (cost < 0) return kNo;
    if (kind == TypeKind::IntType || kind == TypeKind::SymIntType) {
      *out = c10::List<int64_t>(std::vector<int64_t>(static_cast<size_t>(*fixed), item.toInt()));
    } else if (kind == TypeKind::FloatType) {
      *out = c10::List<double>(std::vector<double>(static_cast<size_t>(*fixed), item.toDouble()));
    } else if (kind == TypeKind::BoolType) {
      c10::List<bool> list;
      for (int32_t k = 0; k < *fixed; k++) list.push_back(item.toBool());
      *out = std::move(list);
    } else {
      return kNo;
    }
    return kWrapList;
  }
  switch (kind) {
    case TypeKind::IntType:
    case TypeKind::SymIntType:
      return convert_list<int64_t>(v, strings, element, [](const IValue& x) { return x.toInt(); }, out);
    case TypeKind::FloatType:
      return convert_list<double>(v, strings, element, [](const IValue& x) { return x.toDouble(); }, out);
    case TypeKind::BoolType:
      return convert_list<bool>(v, strings, element, [](const IValue& x) { return x.toBool(); }, out);
    case TypeKind::StringType:
      return convert_list<std::string>(v, strings, element, [](const IValue& x) { return x.toStringRef(); }, out);
    case TypeKind::NumberType: {
      c10::List<c10::Scalar> list;
      for (const nnga_val* e : elements(v)) {
        if (!is_number(e)) return kNo;
        list.push_back(scalar_of(e));
      }
      c10::impl::GenericList generic(c10::NumberType::get());
      for (const c10::Scalar s : list) generic.push_back(IValue(s));
      *out = generic;
      return kExact;
    }
    case TypeKind::TensorType:
      for (const nnga_val* e : elements(v)) {
        if (e->tag != NNGA_TENSOR) return kNo;
      }
      return convert_list<Tensor>(v, strings, element, [](const IValue& x) { return x.toTensor(); }, out);
    case TypeKind::OptionalType: {
      c10::List<c10::optional<Tensor>> list;
      for (const nnga_val* e : elements(v)) {
        if (e->tag == NNGA_NONE) {
          list.push_back(c10::nullopt);
        } else if (e->tag == NNGA_TENSOR) {
          list.push_back(as_tensor(e->p));
        } else {
          return kNo;
        }
      }
      *out = std::move(list);
      return kExact;
    }
    default:
      return kNo;
  }
}

// Converts a value to a schema type and tells how well it fits, or kNo.
double convert(const nnga_val* v, const char* strings, const c10::Type& type, c10::optional<int32_t> fixed,
               IValue* out) {
  switch (type.kind()) {
    case TypeKind::OptionalType:
      if (v->tag == NNGA_NONE) {
        *out = IValue();
        return kExact;
      }
      return convert(v, strings, *type.castRaw<c10::OptionalType>()->getElementType(), fixed, out);
    case TypeKind::TensorType:
      if (v->tag == NNGA_TENSOR) {
        *out = as_tensor(v->p);
        return kExact;
      }
      if (is_number(v)) {
        *out = at::native::wrapped_scalar_tensor(scalar_of(v));
        return kNumberAsTensor;
      }
      return kNo;
    case TypeKind::IntType:
    case TypeKind::SymIntType:
      if (v->tag == NNGA_INT) {
        *out = v->i;
        return kExact;
      }
      if (v->tag == NNGA_BOOL) {
        *out = v->i;
        return kBoolAsNumber;
      }
      if (is_single(v, true)) {
        *out = as_tensor(v->p).item<int64_t>();
        return kTensorAsScalar;
      }
      return kNo;
    case TypeKind::FloatType:
    case TypeKind::SymFloatType:
      if (v->tag == NNGA_FLOAT) {
        *out = v->d;
        return kExact;
      }
      if (v->tag == NNGA_INT || v->tag == NNGA_BOOL) {
        *out = static_cast<double>(v->i);
        return v->tag == NNGA_INT ? kWiden : kBoolAsNumber;
      }
      if (is_single(v, false)) {
        *out = as_tensor(v->p).item<double>();
        return kTensorAsScalar;
      }
      return kNo;
    case TypeKind::NumberType:
      if (is_number(v)) {
        *out = scalar_of(v);
        return kWiden;
      }
      if (is_single(v, false)) {
        *out = as_tensor(v->p).item();
        return kTensorAsScalar;
      }
      return kNo;
    case TypeKind::BoolType:
    case TypeKind::SymBoolType:
      if (v->tag != NNGA_BOOL) return kNo;
      *out = v->i != 0;
      return kExact;
    case TypeKind::StringType:
      if (v->tag != NNGA_STRING) return kNo;
      *out = string_of(v, strings);
      return kExact;
    case TypeKind::ScalarTypeType:
      if (v->tag != NNGA_DTYPE) return kNo;
      *out = static_cast<c10::ScalarType>(v->i);
      return kExact;
    case TypeKind::LayoutType:
      if (v->tag != NNGA_LAYOUT) return kNo;
      *out = static_cast<c10::Layout>(v->i);
      return kExact;
    case TypeKind::MemoryFormatType:
      if (v->tag != NNGA_MEMORY_FORMAT) return kNo;
      *out = static_cast<c10::MemoryFormat>(v->i);
      return kExact;
    case TypeKind::DeviceObjType:
      if (v->tag == NNGA_DEVICE || v->tag == NNGA_STRING) {
        *out = c10::Device(string_of(v, strings));
        return v->tag == NNGA_DEVICE ? kExact : kWiden;
      }
      return kNo;
    case TypeKind::ListType:
      return convert_sequence(v, strings, *type.castRaw<c10::ListType>()->getElementType(), fixed, out);
    default:
      return kNo;
  }
}

struct Call {
  const nnga_val* args;
  int64_t nargs;
  int64_t nkw;
  const char* const* kwnames;
  const char* strings;
  std::vector<const nnga_val*> at;  // heads: positional, then keyword

  Call(const nnga_val* args, int64_t nargs, int64_t nkw, const char* const* kwnames, const char* strings)
      : args(args), nargs(nargs), nkw(nkw), kwnames(kwnames), strings(strings) {
    const nnga_val* v = args;
    at.reserve(static_cast<size_t>(nargs + nkw));
    for (int64_t k = 0; k < nargs + nkw; k++) {
      at.push_back(v);
      v += span(v);
    }
  }

  const nnga_val* keyword(const std::string& name) const {
    for (int64_t k = 0; k < nkw; k++) {
      if (name == kwnames[k]) return at[static_cast<size_t>(nargs + k)];
    }
    return nullptr;
  }
};

// Fits the call to one overload: fills the stack and gives the cost, or kNo.
double fit(const c10::FunctionSchema& schema, const Call& call, torch::jit::Stack* stack) {
  const auto& params = schema.arguments();
  stack->clear();
  stack->reserve(params.size());
  double cost = 0;
  int64_t used = 0;
  size_t position = 0;
  for (size_t k = 0; k < params.size(); k++) {
    const c10::Argument& param = params[k];
    const nnga_val* v = nullptr;
    bool rest = false;
    if (!param.kwarg_only() && position < static_cast<size_t>(call.nargs)) {
      v = call.at[position++];
      // view(x, 2, 3): trailing numbers where a list of them is wanted
      bool last = k + 1 == params.size() || params[k + 1].kwarg_only();
      rest = last && v->tag == NNGA_INT && param.type()->kind() == TypeKind::ListType && !param.N().has_value();
    } else {
      v = call.keyword(param.name());
    }
    if (v == nullptr) {
      if (!param.default_value().has_value()) return kNo;
      stack->push_back(*param.default_value());
      cost += kDefault;
      continue;
    }
    if (rest) {
      c10::List<int64_t> list;
      for (size_t p = position - 1; p < static_cast<size_t>(call.nargs); p++) {
        if (call.at[p]->tag != NNGA_INT) return kNo;
        list.push_back(call.at[p]->i);
      }
      used += call.nargs - static_cast<int64_t>(position) + 1;
      position = static_cast<size_t>(call.nargs);
      cost += kWrapList;
      stack->push_back(std::move(list));
      continue;
    }
    IValue value;
    double c = convert(v, call.strings, *param.real_type(), param.N(), &value);
    if (c < 0) return kNo;
    cost += c;
    used++;
    stack->push_back(std::move(value));
  }
  return used == call.nargs + call.nkw ? cost : kNo;
}

// An operator by name: one overload, or all of them to choose from.
struct Op {
  std::string name;
  std::vector<c10::OperatorHandle> overloads;
};

const std::vector<c10::OperatorHandle>& overloads_of(const std::string& name) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::vector<c10::OperatorHandle>> known;
  static const std::vector<c10::OperatorHandle> none;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(name);
  if (found != known.end()) return found->second;
  std::vector<c10::OperatorHandle> list;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& op : dispatcher.getAllOpNames()) {
    if (op.name != name) continue;
    auto handle = dispatcher.findSchema(op);
    if (handle.has_value()) list.push_back(*handle);
  }
  if (list.empty()) return none;
  // the registry's order is arbitrary: the same call must choose the same overload every time
  std::sort(list.begin(), list.end(), [](const c10::OperatorHandle& a, const c10::OperatorHandle& b) {
    size_t x = a.schema().arguments().size(), y = b.schema().arguments().size();
    return x != y ? x < y : a.operator_name().overload_name < b.operator_name().overload_name;
  });
  return known.emplace(name, std::move(list)).first->second;
}

const char* tag_name(const nnga_val* v) {
  static const char* const names[] = {"None",  "bool",     "int",   "float",  "str",    "Tensor",        "list",   "tuple",
                                      "dict",  "slice",    "...",   "dtype",  "device", "layout",        "memory_format",
                                      "complex"};
  return v->tag >= 0 && v->tag <= NNGA_COMPLEX ? names[v->tag] : "?";
}

[[noreturn]] void no_overload(const Op& op, const Call& call) {
  std::string text = op.name + " does not take (";
  for (int64_t k = 0; k < call.nargs + call.nkw; k++) {
    if (k > 0) text += ", ";
    if (k >= call.nargs) text += std::string(call.kwnames[k - call.nargs]) + "=";
    text += tag_name(call.at[static_cast<size_t>(k)]);
  }
  text += "). It can be called as";
  size_t shown = 0;
  for (const auto& overload : op.overloads) {
    if (overload.schema().arguments().size() > 0 && overload.schema().arguments().back().is_out()) continue;
    if (shown++ == 4) break;
    text += "\n    " + c10::toString(overload.schema());
  }
  throw std::runtime_error(text);
}

void flatten(const IValue& v, std::vector<nnga_val>* out, std::string* strings) {
  nnga_val head = {};
  auto sequence = [&](int32_t tag, c10::ArrayRef<IValue> items) {
    head.tag = tag;
    head.i = static_cast<int64_t>(items.size());
    out->push_back(head);
    for (const IValue& item : items) flatten(item, out, strings);
  };
  if (v.isTensor()) {
    if (!v.toTensor().defined()) {
      head.tag = NNGA_NONE;
    } else {
      head.tag = NNGA_TENSOR;
      head.p = hand_out(v.toTensor());
    }
  } else if (v.isNone()) {
    head.tag = NNGA_NONE;
  } else if (v.isBool()) {
    head.tag = NNGA_BOOL;
    head.i = v.toBool();
  } else if (v.isInt() || v.isSymInt()) {
    head.tag = NNGA_INT;
    head.i = v.isInt() ? v.toInt() : v.toSymInt().expect_int();
  } else if (v.isDouble()) {
    head.tag = NNGA_FLOAT;
    head.d = v.toDouble();
  } else if (v.isComplexDouble()) {
    head.tag = NNGA_COMPLEX;
    head.d = v.toComplexDouble().real();
    head.e = v.toComplexDouble().imag();
  } else if (v.isString()) {
    head.tag = NNGA_STRING;
    head.i = static_cast<int64_t>(v.toStringRef().size());
    head.p = reinterpret_cast<void*>(static_cast<intptr_t>(strings->size()));
    *strings += v.toStringRef();
  } else if (v.isDevice()) {
    std::string name = v.toDevice().str();
    head.tag = NNGA_DEVICE;
    head.i = static_cast<int64_t>(name.size());
    head.p = reinterpret_cast<void*>(static_cast<intptr_t>(strings->size()));
    *strings += name;
  } else if (v.isTuple()) {
    auto items = v.toTuple()->elements().vec();
    return sequence(NNGA_TUPLE, items);
  } else if (v.isList()) {
    auto items = v.toListRef().vec();
    return sequence(NNGA_LIST, items);
  } else {
    throw std::runtime_error("an operator returned a " + v.tagKind() + ", which has no place in a graph");
  }
  out->push_back(head);
}

void free_tensors(const std::vector<nnga_val>& values) {
  for (const nnga_val& v : values) {
    if (v.tag == NNGA_TENSOR) nnga_tensor_free(v.p);
  }
}

// A nested list of numbers, as an index.
Tensor list_index(const nnga_val* v, const Tensor& self) {
  std::vector<int64_t> sizes, flat;
  bool all_bool = true;
  auto walk = [&](auto&& walk, const nnga_val* at, size_t depth) -> void {
    if (!is_sequence(at)) {
      if (at->tag == NNGA_TENSOR && as_tensor(at->p).dim() == 0) {
        all_bool = all_bool && as_tensor(at->p).scalar_type() == at::kBool;
        flat.push_back(as_tensor(at->p).item<int64_t>());
        return;
      }
      if (at->tag != NNGA_INT && at->tag != NNGA_BOOL) {
        throw std::runtime_error(std::string("an index list holds integers or booleans, not a ") + tag_name(at));
      }
      all_bool = all_bool && at->tag == NNGA_BOOL;
      flat.push_back(at->i);
      return;
    }
    if (sizes.size() <= depth) {
      sizes.push_back(at->i);
    } else if (sizes[depth] != at->i) {
      throw std::runtime_error("an index list must have rows of equal length");
    }
    for (const nnga_val* e : elements(at)) walk(walk, e, depth + 1);
  };
  walk(walk, v, 0);
  int64_t expected = 1;
  for (int64_t s : sizes) expected *= s;
  if (expected != static_cast<int64_t>(flat.size())) throw std::runtime_error("an index list must be rectangular");
  Tensor index = at::tensor(flat, at::kLong).reshape(sizes);
  if (all_bool && !flat.empty()) index = index.to(at::kBool);
  return index.to(self.device());
}

int64_t slice_bound(const nnga_val* v, int64_t otherwise) {
  if (v->tag == NNGA_NONE) return otherwise;
  if (v->tag == NNGA_INT || v->tag == NNGA_BOOL) return v->i;
  if (v->tag == NNGA_TENSOR) return as_tensor(v->p).item<int64_t>();
  throw std::runtime_error(std::string("slice indices must be integers, not ") + tag_name(v));
}

at::indexing::TensorIndex one_index(const nnga_val* v, const Tensor& self) {
  using namespace at::indexing;
  switch (v->tag) {
    case NNGA_NONE:
      return TensorIndex(None);
    case NNGA_ELLIPSIS:
      return TensorIndex(Ellipsis);
    case NNGA_BOOL:
      return TensorIndex(v->i != 0);
    case NNGA_INT:
      return TensorIndex(v->i);
    case NNGA_TENSOR:
      return TensorIndex(as_tensor(v->p));
    case NNGA_SLICE: {
      const nnga_val* start = v + 1;
      const nnga_val* stop = start + span(start);
      const nnga_val* step = stop + span(stop);
      int64_t by = slice_bound(step, 1);
      if (by <= 0) throw std::runtime_error("step must be greater than zero");
      return TensorIndex(Slice(slice_bound(start, 0), slice_bound(stop, INDEX_MAX), by));
    }
    case NNGA_LIST:
    case NNGA_TUPLE:
      return TensorIndex(list_index(v, self));
    default:
      throw std::runtime_error(std::string("only integers, slices, ellipsis, None and tensors are indices, not ") +
                               tag_name(v));
  }
}

std::vector<at::indexing::TensorIndex> index_of(const nnga_val* v, const Tensor& self) {
  std::vector<at::indexing::TensorIndex> out;
  if (v->tag == NNGA_TUPLE) {
    for (const nnga_val* e : elements(v)) out.push_back(one_index(e, self));
  } else {
    out.push_back(one_index(v, self));
  }
  return out;
}

constexpr const char* kDTypeNames[] = {"uint8",      "int8",    "int16",    "int32", "int64",  "float16", "float32",
                                       "float64",    "",        "complex64", "complex128", "bool"};

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

int nnga_tensor_clone_handle(void* t, void** out, char** err) {
  return guarded(err, [&] { *out = hand_out(as_tensor(t)); });
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
    facts[9] = stored && t.device().type() != at::kMeta ? reinterpret_cast<int64_t>(t.data_ptr()) : 0;
    facts[10] = static_cast<int64_t>(t.use_count());
    facts[11] = stored ? static_cast<int64_t>(t.storage().nbytes()) : 0;
  });
}

int nnga_from_blob(void* data, const int64_t* sizes, int64_t ndim, int64_t scalar_type, void (*free_fn)(void*),
                   void* ctx, void** out, char** err) {
  return guarded(err, [&] {
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(scalar_type));
    at::IntArrayRef shape(sizes, static_cast<size_t>(ndim));
    if (free_fn == nullptr) {
      *out = hand_out(at::from_blob(data, shape, options));
    } else {
      *out = hand_out(at::from_blob(data, shape, [free_fn, ctx](void*) { free_fn(ctx); }, options));
    }
  });
}

int nnga_op_find(const char* name, const char* overload, void** out, char** err) {
  return guarded(err, [&] {
    auto op = std::make_unique<Op>();
    op->name = name;
    if (overload == nullptr) {
      op->overloads = overloads_of(name);
    } else {
      auto handle = c10::Dispatcher::singleton().findSchema({name, overload});
      if (handle.has_value()) op->overloads.push_back(*handle);
      if (overload[0] != 0) op->name += std::string(".") + overload;
    }
    if (op->overloads.empty()) throw std::runtime_error("there is no operator " + op->name);
    *out = op.release();
  });
}

int nnga_op_schemas(const char* name, char** out, char** err) {
  return guarded(err, [&] {
    std::string text;
    for (const auto& op : overloads_of(name)) text += c10::toString(op.schema()) + "\n";
    *out = copy_text(text.c_str());
  });
}

int nnga_op_call(void* handle, const nnga_val* args, int64_t nvals, int64_t nargs, int64_t nkw,
                 const char* const* kwnames, const char* strings, nnga_val** outs, int64_t* nouts, char** err) {
  (void)nvals;
  return guarded(err, [&] {
    const Op& op = *static_cast<Op*>(handle);
    Call call(args, nargs, nkw, kwnames, strings);
    torch::jit::Stack best, stack;
    const c10::OperatorHandle* chosen = nullptr;
    double cost = 0;
    for (const auto& overload : op.overloads) {
      double c = fit(overload.schema(), call, &stack);
      if (c < 0 || (chosen != nullptr && c >= cost)) continue;
      chosen = &overload;
      cost = c;
      std::swap(best, stack);
      if (cost == 0) break;
    }
    if (chosen == nullptr) no_overload(op, call);
    chosen->callBoxed(&best);
    std::vector<nnga_val> values;
    std::string text;
    try {
      if (best.size() > 1) {
        nnga_val head = {};
        head.tag = NNGA_TUPLE;
        head.i = static_cast<int64_t>(best.size());
        values.push_back(head);
      }
      for (const IValue& v : best) flatten(v, &values, &text);
      size_t bytes = values.size() * sizeof(nnga_val);
      auto* memory = static_cast<char*>(std::malloc(bytes + text.size() + 1));
      if (memory == nullptr) throw std::bad_alloc();
      std::memcpy(memory + bytes, text.data(), text.size());
      for (nnga_val& v : values) {
        if (v.tag == NNGA_STRING || v.tag == NNGA_DEVICE) v.p = memory + bytes + reinterpret_cast<intptr_t>(v.p);
      }
      std::memcpy(memory, values.data(), bytes);
      *outs = reinterpret_cast<nnga_val*>(memory);
      *nouts = static_cast<int64_t>(values.size());
    } catch (...) {
      free_tensors(values);
      throw;
    }
  });
}

int nnga_index_get(void* self, const nnga_val* index, int64_t nvals, const char* strings, void** out, char** err) {
  (void)nvals;
  (void)strings;
  return guarded(err, [&] {
    const Tensor& t = as_tensor(self);
    *out = hand_out(at::indexing::get_item(t, index_of(index, t)));
  });
}

int nnga_index_set(void* self, const nnga_val* index, int64_t nvals, const char* strings, const nnga_val* value,
                   char** err) {
  (void)nvals;
  (void)strings;
  return guarded(err, [&] {
    const Tensor& t = as_tensor(self);
    auto where = index_of(index, t);
    if (value->tag == NNGA_TENSOR) {
      at::indexing::set_item(t, where, as_tensor(value->p));
    } else if (is_number(value)) {
      at::indexing::set_item(t, where, scalar_of(value));
    } else {
      throw std::runtime_error(std::string("an element of a tensor can be set to a tensor or a number, not to a ") +
                               tag_name(value));
    }
  });
}

int32_t nnga_grad_enabled(void) { return at::GradMode::is_enabled(); }

void nnga_set_grad_enabled(int32_t on) { at::GradMode::set_enabled(on != 0); }

int32_t nnga_inference_enabled(void) { return c10::InferenceMode::is_enabled(); }

void* nnga_inference_enter(int32_t on) { return new c10::InferenceMode(on != 0); }

void nnga_inference_leave(void* guard) { delete static_cast<c10::InferenceMode*>(guard); }

int64_t nnga_dtype(const char* name) {
  for (size_t k = 0; k < std::size(kDTypeNames); k++) {
    if (kDTypeNames[k][0] != 0 && std::strcmp(kDTypeNames[k], name) == 0) return static_cast<int64_t>(k);
  }
  if (std::strcmp(name, "bfloat16") == 0) return static_cast<int64_t>(at::kBFloat16);
  if (std::strcmp(name, "float8_e5m2") == 0) return static_cast<int64_t>(at::kFloat8_e5m2);
  if (std::strcmp(name, "float8_e4m3fn") == 0) return static_cast<int64_t>(at::kFloat8_e4m3fn);
  if (std::strcmp(name, "uint16") == 0) return static_cast<int64_t>(at::kUInt16);
  if (std::strcmp(name, "uint32") == 0) return static_cast<int64_t>(at::kUInt32);
  if (std::strcmp(name, "uint64") == 0) return static_cast<int64_t>(at::kUInt64);
  return -1;
}

const char* nnga_dtype_name(int64_t scalar_type) {
  if (scalar_type >= 0 && scalar_type < static_cast<int64_t>(std::size(kDTypeNames)) &&
      kDTypeNames[scalar_type][0] != 0) {
    return kDTypeNames[scalar_type];
  }
  switch (static_cast<at::ScalarType>(scalar_type)) {
    case at::kBFloat16:
      return "bfloat16";
    case at::kFloat8_e5m2:
      return "float8_e5m2";
    case at::kFloat8_e4m3fn:
      return "float8_e4m3fn";
    case at::kUInt16:
      return "uint16";
    case at::kUInt32:
      return "uint32";
    case at::kUInt64:
      return "uint64";
    default:
      return nullptr;
  }
}

int32_t nnga_cuda_available(void) { return at::hasCUDA() && at::detail::getCUDAHooks().deviceCount() > 0; }

const char* nnga_torch_version(void) { return TORCH_VERSION; }

}  // extern "C"
