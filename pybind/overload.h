// overload.h: which overload of an operator a call means, and its arguments as that overload wants
// them. Part of aten.cc.
//
// A call is tried on every overload; each argument costs according to how far it is from the type
// that the schema asks for, and the cheapest overload wins. The costs are set so that the choice is
// the one PyTorch's own Python bindings make: exact types first; a number rather goes to a Scalar
// than to a tensor; a 0-dim tensor rather stays a tensor; an int is never a bool or a dtype, nor
// the other way round. Of two overloads that cost the same, the one with fewer parameters wins.
#ifndef NNG_OVERLOAD_H
#define NNG_OVERLOAD_H

#include <ATen/ScalarOps.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "values.h"

namespace nng {

using c10::IValue;
using c10::TypeKind;

enum Cost : int {
  kExact = 0,
  kDefault = 1,   // a parameter left out
  kWiden = 100,   // int for float, any number for Scalar, str for device
  kRepeat = 200,  // one number for an int[2]
  kBoolForNumber = 300,
  kTensorForNumber = 400,
  kNumberForTensor = 500,
  kRest = 600,  // trailing numbers for one list, as in view(x, 2, 3)
  kNo = -1,     // does not fit
};

// A tensor that Python would take for a number.
inline bool stands_for_number(const nnga_val* v, bool integral) {
  if (v->tag != NNGA_TENSOR) return false;
  const at::Tensor& t = tensor_of(v);
  return t.dim() == 0 && !t.requires_grad() &&
         (!integral || at::isIntegralType(t.scalar_type(), /*includeBool=*/false));
}

int convert(const nnga_val* v, const char* strings, const c10::Type& type, std::optional<int32_t> size, IValue* out);

// Converts a list or tuple element by element.
template <typename T, typename Get>
int convert_elements(const nnga_val* v, const char* strings, const c10::Type& element, Get get, IValue* out) {
  c10::List<T> list;
  list.reserve(static_cast<size_t>(v->i));
  int worst = kExact;
  bool fits = each(v, [&](const nnga_val* e) {
    IValue item;
    int cost = convert(e, strings, element, std::nullopt, &item);
    if (cost < 0) return false;
    worst = std::max(worst, cost);
    list.push_back(get(item));
    return true;
  });
  if (!fits) return kNo;
  *out = std::move(list);
  return worst;
}

// One number where the schema has int[2] and the like: it stands for every element.
inline int convert_repeated(const nnga_val* v, const char* strings, const c10::Type& element, int32_t size,
                            IValue* out) {
  IValue item;
  if (convert(v, strings, element, std::nullopt, &item) < 0) return kNo;
  auto n = static_cast<size_t>(size);
  switch (element.kind()) {
    case TypeKind::IntType:
    case TypeKind::SymIntType:
      *out = c10::List<int64_t>(std::vector<int64_t>(n, item.toInt()));
      return kRepeat;
    case TypeKind::FloatType:
      *out = c10::List<double>(std::vector<double>(n, item.toDouble()));
      return kRepeat;
    case TypeKind::BoolType: {
      c10::List<bool> list;
      list.resize(n, item.toBool());
      *out = std::move(list);
      return kRepeat;
    }
    default:
      return kNo;
  }
}

inline int convert_list(const nnga_val* v, const char* strings, const c10::Type& element, std::optional<int32_t> size,
                        IValue* out) {
  if (!is_sequence(v)) return size.has_value() ? convert_repeated(v, strings, element, *size, out) : kNo;
  auto of = [&]<typename T>(auto get) { return convert_elements<T>(v, strings, element, get, out); };
  switch (element.kind()) {
    case TypeKind::IntType:
    case TypeKind::SymIntType:
      return of.template operator()<int64_t>([](const IValue& x) { return x.toInt(); });
    case TypeKind::FloatType:
      return of.template operator()<double>([](const IValue& x) { return x.toDouble(); });
    case TypeKind::BoolType:
      return of.template operator()<bool>([](const IValue& x) { return x.toBool(); });
    case TypeKind::StringType:
      return of.template operator()<std::string>([](const IValue& x) { return x.toStringRef(); });
    case TypeKind::TensorType:
      // a list of numbers is no list of tensors, though a number may be a tensor
      if (!each(v, [](const nnga_val* e) { return e->tag == NNGA_TENSOR; })) return kNo;
      return of.template operator()<at::Tensor>([](const IValue& x) { return x.toTensor(); });
    case TypeKind::NumberType: {
      c10::impl::GenericList list(c10::NumberType::get());
      if (!each(v, [&](const nnga_val* e) {
            if (is_number(e)) list.push_back(IValue(scalar_of(e)));
            return is_number(e);
          })) {
        return kNo;
      }
      *out = std::move(list);
      return kExact;
    }
    case TypeKind::OptionalType: {  // Tensor?[]
      c10::List<std::optional<at::Tensor>> list;
      if (!each(v, [&](const nnga_val* e) {
            if (e->tag == NNGA_NONE) {
              list.push_back(std::nullopt);
            } else if (e->tag == NNGA_TENSOR) {
              list.push_back(tensor_of(e));
            }
            return e->tag == NNGA_NONE || e->tag == NNGA_TENSOR;
          })) {
        return kNo;
      }
      *out = std::move(list);
      return kExact;
    }
    default:
      return kNo;
  }
}

// Converts a value to a type of a schema, size being the 2 of int[2], and tells what that costs.
inline int convert(const nnga_val* v, const char* strings, const c10::Type& type, std::optional<int32_t> size,
                   IValue* out) {
  switch (type.kind()) {
    case TypeKind::TensorType:
      if (v->tag == NNGA_TENSOR) {
        *out = tensor_of(v);
        return kExact;
      }
      if (!is_number(v)) return kNo;
      // a wrapped number does not take part in type promotion as a tensor would
      *out = at::native::wrapped_scalar_tensor(scalar_of(v));
      return kNumberForTensor;
    case TypeKind::OptionalType:
      if (v->tag == NNGA_NONE) {
        *out = IValue();
        return kExact;
      }
      return convert(v, strings, *type.castRaw<c10::OptionalType>()->getElementType(), size, out);
    case TypeKind::ListType:
      return convert_list(v, strings, *type.castRaw<c10::ListType>()->getElementType(), size, out);
    case TypeKind::IntType:
    case TypeKind::SymIntType:
      if (v->tag == NNGA_INT) {
        *out = v->i;
        return kExact;
      }
      if (!stands_for_number(v, /*integral=*/true)) return kNo;
      *out = tensor_of(v).item().toLong();
      return kTensorForNumber;
    case TypeKind::FloatType:
    case TypeKind::SymFloatType:
      if (v->tag == NNGA_FLOAT) {
        *out = v->d;
        return kExact;
      }
      if (v->tag == NNGA_INT || v->tag == NNGA_BOOL) {
        *out = static_cast<double>(v->i);
        return v->tag == NNGA_INT ? kWiden : kBoolForNumber;
      }
      if (!stands_for_number(v, /*integral=*/false)) return kNo;
      *out = tensor_of(v).item().toDouble();
      return kTensorForNumber;
    case TypeKind::NumberType:
      if (is_number(v)) {
        *out = scalar_of(v);
        return kWiden;
      }
      if (!stands_for_number(v, /*integral=*/false)) return kNo;
      *out = tensor_of(v).item();
      return kTensorForNumber;
    case TypeKind::ComplexType:
      if (!is_number(v)) return kNo;
      *out = scalar_of(v).toComplexDouble();
      return v->tag == NNGA_COMPLEX ? kExact : kWiden;
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
      if (v->tag != NNGA_DEVICE && v->tag != NNGA_STRING) return kNo;
      try {
        *out = c10::Device(string_of(v, strings));
      } catch (const c10::Error&) {
        if (v->tag == NNGA_DEVICE) throw;
        return kNo;  // a string that is no device may be something else to another overload
      }
      return v->tag == NNGA_DEVICE ? kExact : kWiden;
    default:  // Generator and Dimname have no values here; None fits where they are optional
      return kNo;
  }
}

// The arguments of one call: where each value begins.
struct Call {
  c10::SmallVector<const nnga_val*, 16> heads;  // positional, then keyword
  c10::SmallVector<const char*, 4> names;       // of the keyword ones
  size_t positional;
  const char* strings;

  Call(const nnga_val* args, int64_t nargs, int64_t nkw, const char* kwnames, const char* strings)
      : positional(static_cast<size_t>(nargs)), strings(strings) {
    for (int64_t k = 0; k < nargs + nkw; k++, args += span(args)) heads.push_back(args);
    for (int64_t k = 0; k < nkw; k++, kwnames += std::strlen(kwnames) + 1) names.push_back(kwnames);
  }

  const nnga_val* keyword(const std::string& name) const {
    for (size_t k = 0; k < names.size(); k++) {
      if (name == names[k]) return heads[positional + k];
    }
    return nullptr;
  }

  // A number that calls share which differ in nothing that the choice of an overload looks at: the
  // types, the lengths of lists, and whether a tensor could stand for a number.
  uint64_t shape() const {
    uint64_t hash = 14695981039346656037ull;
    auto mix = [&](uint64_t x) { hash = (hash ^ x) * 1099511628211ull; };
    auto value = [&](auto&& self, const nnga_val* v) -> void {
      mix(static_cast<uint64_t>(v->tag));
      if (is_sequence(v)) {
        mix(static_cast<uint64_t>(v->i));
        each(v, [&](const nnga_val* e) {
          self(self, e);
          return true;
        });
      } else if (v->tag == NNGA_TENSOR) {
        mix(stands_for_number(v, true) ? 2 : stands_for_number(v, false) ? 1 : 0);
      }
    };
    mix(positional);
    for (const nnga_val* head : heads) value(value, head);
    for (const char* name : names) {
      for (; *name != 0; name++) mix(static_cast<uint8_t>(*name));
      mix(0);
    }
    return hash;
  }
};

// Fits a call to one overload: fills the stack and gives the cost, or kNo.
inline int fit(const c10::FunctionSchema& schema, const Call& call, torch::jit::Stack* stack) {
  const auto& params = schema.arguments();
  stack->clear();
  stack->reserve(params.size());
  int total = 0;
  size_t position = 0, named = 0;
  for (size_t k = 0; k < params.size(); k++) {
    const c10::Argument& param = params[k];
    const nnga_val* v = nullptr;
    if (!param.kwarg_only() && position < call.positional) {
      v = call.heads[position++];
      bool last = k + 1 == params.size() || params[k + 1].kwarg_only();
      if (last && v->tag == NNGA_INT && param.real_type()->kind() == TypeKind::ListType && !param.N().has_value()) {
        c10::List<int64_t> list;
        for (position--; position < call.positional; position++) {
          if (call.heads[position]->tag != NNGA_INT) return kNo;
          list.push_back(call.heads[position]->i);
        }
        const auto element = param.real_type()->castRaw<c10::ListType>()->getElementType()->kind();
        if (element != TypeKind::IntType && element != TypeKind::SymIntType) return kNo;
        stack->emplace_back(std::move(list));
        total += kRest;
        continue;
      }
    } else if (!call.names.empty() && (v = call.keyword(param.name())) != nullptr) {
      named++;
    }
    if (v == nullptr) {
      if (!param.default_value().has_value()) return kNo;
      stack->push_back(*param.default_value());
      total += kDefault;
      continue;
    }
    stack->emplace_back();
    int cost = convert(v, call.strings, *param.real_type(), param.N(), &stack->back());
    // Python says None for an empty list that may be left out, as in amax(dim=None)
    if (cost < 0 && v->tag == NNGA_NONE && param.real_type()->kind() == TypeKind::ListType &&
        param.default_value().has_value()) {
      stack->back() = *param.default_value();
      cost = kWiden;
    }
    if (cost < 0) return kNo;
    total += cost;
  }
  return position == call.positional && named == call.names.size() ? total : kNo;
}

// Numbers that stand for tensors follow tensors that have no memory, so that nothing is computed of them.
inline void numbers_follow(torch::jit::Stack* stack) {
  auto any = [&](auto&& says) {
    return std::any_of(stack->begin(), stack->end(), [&](const IValue& v) {
      if (v.isTensor()) return says(v.toTensor());
      if (!v.isTensorList()) return false;
      for (const at::Tensor& t : v.toTensorList()) {
        if (says(t)) return true;
      }
      return false;
    });
  };
  auto number = [](const at::Tensor& t) { return t.defined() && t.unsafeGetTensorImpl()->is_wrapped_number(); };
  if (!any([](const at::Tensor& t) { return t.is_meta(); }) || !any(number)) return;
  auto moved = [](const at::Tensor& t) { return at::native::wrapped_scalar_tensor(t.item(), at::kMeta); };
  for (IValue& v : *stack) {
    if (v.isTensor() && number(v.toTensor())) {
      v = moved(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorList()) list.push_back(number(t) ? moved(t) : t);
      v = std::move(list);
    }
  }
}

// An operator by name: one overload, or all of them to choose from.
class Op {
 public:
  Op(std::string name, std::vector<c10::OperatorHandle> overloads)
      : name_(std::move(name)), overloads_(std::move(overloads)) {}

  const std::string& name() const { return name_; }
  const std::vector<c10::OperatorHandle>& overloads() const { return overloads_; }

  // Chooses the overload that a call means and fills the stack with its arguments.
  const c10::OperatorHandle& choose(const Call& call, torch::jit::Stack* stack) const {
    if (overloads_.size() == 1) {
      if (fit(overloads_[0].schema(), call, stack) < 0) refuse(call);
      return overloads_[0];
    }
    // Calls of the same shape choose alike, so the last choices are remembered: the upper bits of a
    // slot are the shape, the lower ones the overload. A lost update costs a little time only.
    uint64_t shape = call.shape() & ~kIndexBits;
    std::atomic<uint64_t>& slot = chosen_[(shape >> 32) % kSlots];
    uint64_t seen = slot.load(std::memory_order_relaxed);
    if ((seen & ~kIndexBits) == shape && (seen & kIndexBits) != 0) {
      const c10::OperatorHandle& known = overloads_[(seen & kIndexBits) - 1];
      if (fit(known.schema(), call, stack) >= 0) return known;
    }
    torch::jit::Stack tried;
    int best = kNo;
    size_t index = 0;
    for (size_t k = 0; k < overloads_.size() && best != kExact; k++) {
      int cost = fit(overloads_[k].schema(), call, &tried);
      if (cost < 0 || (best >= 0 && cost >= best)) continue;
      best = cost;
      index = k;
      std::swap(*stack, tried);
    }
    if (best < 0) refuse(call);
    if (index < kIndexBits) slot.store(shape | (index + 1), std::memory_order_relaxed);
    return overloads_[index];
  }

 private:
  static constexpr uint64_t kIndexBits = 0xff;
  static constexpr size_t kSlots = 16;

  // Says what was given and what could have been.
  [[noreturn]] void refuse(const Call& call) const {
    std::string text = name_ + " does not take (";
    for (size_t k = 0; k < call.heads.size(); k++) {
      if (k > 0) text += ", ";
      if (k >= call.positional) text += std::string(call.names[k - call.positional]) + "=";
      text += type_name(call.heads[k]);
    }
    text += "). It can be called as";
    constexpr size_t kShown = 5;
    size_t shown = 0, left = 0;
    for (const auto& overload : overloads_) {
      const auto& params = overload.schema().arguments();
      bool out = !params.empty() && params.back().is_out() && overloads_.size() > 1;
      if (out || shown == kShown) {
        left++;
        continue;
      }
      shown++;
      text += "\n    " + c10::toString(overload.schema());
    }
    if (left > 0) text += "\n    and " + std::to_string(left) + " more";
    throw std::invalid_argument(text);
  }

  std::string name_;
  std::vector<c10::OperatorHandle> overloads_;
  mutable std::atomic<uint64_t> chosen_[kSlots] = {};
};

// All overloads of an operator, in the order in which they are tried; empty if there is none.
inline std::vector<c10::OperatorHandle> overloads_of(const std::string& name) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::vector<std::string>> index;  // guarded by mutex
  auto& dispatcher = c10::Dispatcher::singleton();
  std::lock_guard<std::mutex> lock(mutex);
  if (index.find(name) == index.end()) {  // the first time, or libraries were loaded since
    index.clear();
    for (const auto& op : dispatcher.getAllOpNames()) index[op.name].push_back(op.overload_name);
  }
  std::vector<c10::OperatorHandle> list;
  auto found = index.find(name);
  if (found == index.end()) return list;
  for (const std::string& overload : found->second) {
    auto handle = dispatcher.findSchema({name, overload});
    if (handle.has_value()) list.push_back(*handle);
  }
  // Named dimensions are strings to a schema, so an empty list fits both int[] and Dimname[]: last.
  auto named = [](const std::string& overload) {
    return overload.find("imname") != std::string::npos || overload.find("names") != std::string::npos;
  };
  std::sort(list.begin(), list.end(), [&](const c10::OperatorHandle& a, const c10::OperatorHandle& b) {
    const std::string &x = a.operator_name().overload_name, &y = b.operator_name().overload_name;
    return std::make_tuple(named(x), a.schema().arguments().size(), std::string_view(x)) <
           std::make_tuple(named(y), b.schema().arguments().size(), std::string_view(y));
  });
  return list;
}

}  // namespace nng

#endif
