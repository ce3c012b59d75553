// indexing.h: Python's x[index] out of flat values. Part of aten.cc.
#ifndef NNG_INDEXING_H
#define NNG_INDEXING_H

#include <ATen/TensorIndexing.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "values.h"

namespace nng {

[[noreturn]] inline void refuse_index(const nnga_val* v) {
  throw std::invalid_argument(
      std::string(
          "only integers, slices (`:`), ellipsis (`...`), None and long or byte Variables are valid indices (got ") +
      type_name(v) + ")");
}

// A nested list of integers or booleans as the tensor that Python makes of it: bool if all are
// bools, else int64.
inline at::Tensor list_index(const nnga_val* v, at::Device device) {
  std::vector<int64_t> sizes, flat;
  bool bools = true;
  auto walk = [&](auto&& self, const nnga_val* at, size_t depth) -> void {
    if (is_sequence(at)) {
      if (sizes.size() == depth && flat.empty()) sizes.push_back(at->i);
      if (depth >= sizes.size() || sizes[depth] != at->i) {
        throw std::invalid_argument("the rows of an index list must be of equal length");
      }
      each(at, [&](const nnga_val* e) {
        self(self, e, depth + 1);
        return true;
      });
      return;
    }
    if (depth != sizes.size()) throw std::invalid_argument("the rows of an index list must be of equal length");
    if (at->tag == NNGA_INT || at->tag == NNGA_BOOL) {
      bools = bools && at->tag == NNGA_BOOL;
      flat.push_back(at->i);
    } else if (at->tag == NNGA_TENSOR && tensor_of(at).numel() == 1 &&
               at::isIntegralType(tensor_of(at).scalar_type(), /*includeBool=*/true)) {
      bools = bools && tensor_of(at).scalar_type() == at::kBool;
      flat.push_back(tensor_of(at).item().toLong());
    } else {
      refuse_index(at);
    }
  };
  walk(walk, v, 0);
  at::Tensor index = at::tensor(flat, at::kLong).reshape(sizes);
  return index.to(device, bools && !flat.empty() ? at::kBool : at::kLong);
}

inline int64_t slice_bound(const nnga_val* v, int64_t otherwise) {
  if (v->tag == NNGA_NONE) return otherwise;
  if (v->tag == NNGA_INT || v->tag == NNGA_BOOL) return v->i;
  if (v->tag == NNGA_TENSOR && tensor_of(v).numel() == 1 &&
      at::isIntegralType(tensor_of(v).scalar_type(), /*includeBool=*/true)) {
    return tensor_of(v).item().toLong();
  }
  throw std::invalid_argument("slice indices must be integers or None or have an __index__ method");
}

inline at::indexing::TensorIndex one_index(const nnga_val* v, at::Device device) {
  using at::indexing::TensorIndex;
  switch (v->tag) {
    case NNGA_NONE:
      return TensorIndex(at::indexing::None);
    case NNGA_ELLIPSIS:
      return TensorIndex(at::indexing::Ellipsis);
    case NNGA_BOOL:
      return TensorIndex(v->i != 0);
    case NNGA_INT:
      return TensorIndex(v->i);
    case NNGA_TENSOR:
      return TensorIndex(tensor_of(v));
    case NNGA_SLICE: {
      const nnga_val* start = v + 1;
      const nnga_val* stop = start + span(start);
      const nnga_val* step = stop + span(stop);
      int64_t by = slice_bound(step, 1);
      if (by <= 0) throw std::invalid_argument("step must be greater than zero");
      return TensorIndex(at::indexing::Slice(slice_bound(start, 0), slice_bound(stop, at::indexing::INDEX_MAX), by));
    }
    case NNGA_LIST:
    case NNGA_TUPLE:
      return TensorIndex(list_index(v, device));
    default:
      refuse_index(v);
  }
}

// Whether an index holds one index for each axis. A tuple always does; PyTorch also reads a short
// list so that holds anything but numbers (x[[None, 0]], x[[[0, 1], [2, 3]]]).
inline bool is_index_per_axis(const nnga_val* v) {
  if (v->tag == NNGA_TUPLE) return true;
  constexpr int64_t kLong = 32;
  if (v->tag != NNGA_LIST || v->i >= kLong) return false;
  return !each(v, [](const nnga_val* e) {
    bool plain = !is_sequence(e) && e->tag != NNGA_TENSOR && e->tag != NNGA_SLICE && e->tag != NNGA_NONE &&
                 e->tag != NNGA_ELLIPSIS;
    return plain;
  });
}

inline std::vector<at::indexing::TensorIndex> index_of(const nnga_val* v, at::Device device) {
  std::vector<at::indexing::TensorIndex> out;
  if (!is_index_per_axis(v)) {
    out.push_back(one_index(v, device));
    return out;
  }
  each(v, [&](const nnga_val* e) {
    out.push_back(one_index(e, device));
    return true;
  });
  return out;
}

}  // namespace nng

#endif
