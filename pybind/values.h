// values.h: reading the flat values of aten.h. Part of aten.cc.
//
// A value is an nnga_val; a container is its head with its elements right after it, each of which
// may be a container again. Nothing here owns anything.
#ifndef NNG_VALUES_H
#define NNG_VALUES_H

#include <ATen/ATen.h>

#include <string>

#include "aten.h"

namespace nng {

inline at::Tensor& as_tensor(void* t) { return *static_cast<at::Tensor*>(t); }

inline at::Tensor& tensor_of(const nnga_val* v) { return *reinterpret_cast<at::Tensor*>(v->p); }

// How many values a value takes, its head included.
inline int64_t span(const nnga_val* v) {
  int64_t children = v->tag == NNGA_LIST || v->tag == NNGA_TUPLE ? v->i : v->tag == NNGA_SLICE ? 3 : 0;
  int64_t n = 1;
  for (; children > 0; children--) n += span(v + n);
  return n;
}

inline bool is_sequence(const nnga_val* v) { return v->tag == NNGA_LIST || v->tag == NNGA_TUPLE; }

// Calls f on each element of a list or tuple while it returns true; false if it stopped early.
template <typename F>
bool each(const nnga_val* v, F f) {
  const nnga_val* element = v + 1;
  for (int64_t k = 0; k < v->i; k++, element += span(element)) {
    if (!f(element)) return false;
  }
  return true;
}

inline std::string string_of(const nnga_val* v, const char* strings) {
  return std::string(strings + v->p, static_cast<size_t>(v->i));
}

inline bool is_number(const nnga_val* v) {
  return v->tag == NNGA_INT || v->tag == NNGA_FLOAT || v->tag == NNGA_BOOL || v->tag == NNGA_COMPLEX;
}

inline c10::Scalar scalar_of(const nnga_val* v) {
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

// What Python calls the type of a value.
inline const char* type_name(const nnga_val* v) {
  static const char* const names[] = {"None",   "bool",   "int",           "float",  "str",      "Tensor",
                                      "list",   "tuple",  "dict",          "slice",  "ellipsis", "dtype",
                                      "device", "layout", "memory_format", "complex"};
  return v->tag >= 0 && v->tag <= NNGA_COMPLEX ? names[v->tag] : "unknown value";
}

}  // namespace nng

#endif
