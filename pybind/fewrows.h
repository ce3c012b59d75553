// fewrows.h: the product of a few rows with a weight as it lies in memory. Part of aten.cc.
//
// Such a product takes as long as reading the weight does, if the weight is read as fast as memory allows and
// all rows are multiplied on the way. torch hands it to a BLAS, which reads at a half of that speed or less.
// Here all of torch's threads read, each a stretch of its own in the order of memory, and each number once.
#ifndef NNG_FEWROWS_H
#define NNG_FEWROWS_H

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/Version.h>

#if defined(__x86_64__) && !defined(__clang__)
#define NNG_X86 1  // kernels for several kinds of processor
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#define NNG_INLINE inline __attribute__((always_inline))
#define NNG_UNROLL _Pragma("GCC unroll 16")

namespace nng::few {

using std::int64_t;

constexpr int64_t kMost = 64;  // rows at once

// Rows up to which this is as fast as with a packed weight. engine/host/prepack.go has the same numbers.
constexpr int64_t fastest(bool columns) { return columns ? 32 : 8; }

// Rows up to which it is faster than what torch does with the weight as it lies.
template <typename T>
constexpr int64_t faster(bool columns) {
  return columns || sizeof(T) == 4 ? kMost : 24;
}

// y = x wᵀ + bias. Everything is contiguous; w is [out, in] or, by columns, [in, out].
template <typename T>
struct Product {
  const T* x;
  const T* w;
  const T* bias;  // or null
  T* y;
  int64_t rows, in, out;
};

struct Range {
  int64_t from, to;
};

// Part i of n of what is `of` long, in multiples of unit; the last one may be shorter, or there is none.
inline Range part(int64_t i, int64_t n, int64_t of, int64_t unit) {
  int64_t each = ((of + n - 1) / n + unit - 1) / unit * unit;
  return {std::min(i * each, of), std::min((i + 1) * each, of)};
}

inline int64_t divided(int64_t a, int64_t by) { return (a + by - 1) / by; }

// Calls body(i) for each i < n on torch's threads. It is an iterator that cuts its output into parts, since
// torch's other ways want an OpenMP of ours.
template <typename F>
void in_parallel(int64_t n, F body) {
  if (n == 1) return body(0);
  at::Tensor tasks = at::empty({n}, at::kByte);
  auto* first = tasks.mutable_data_ptr<std::uint8_t>();
  auto parts = at::TensorIteratorConfig()
                   .check_all_same_dtype(false)
                   .declare_static_dtype_and_device(at::kByte, at::kCPU)
                   .resize_outputs(false)
                   .add_output(tasks)
                   .build();
  parts.for_each(
      [&](char** data, const int64_t*, int64_t count, int64_t times) {
        int64_t i = reinterpret_cast<std::uint8_t*>(data[0]) - first;
        for (int64_t end = i + count * times; i < end; i++) body(i);
      },
      1);
}

NNG_INLINE float as_float(float x) { return x; }

NNG_INLINE float as_float(at::BFloat16 x) {
  std::uint32_t bits = static_cast<std::uint32_t>(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

}  // namespace nng::few

#define NNG_TARGET plain
#define NNG_LANES 8
#include "fewrows_kernels.h"
#undef NNG_LANES
#undef NNG_TARGET

#ifdef NNG_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NNG_TARGET avx2
#define NNG_LANES 8
#include "fewrows_kernels.h"
#undef NNG_LANES
#undef NNG_TARGET
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#define NNG_TARGET avx512
#define NNG_LANES 16
#include "fewrows_kernels.h"
#undef NNG_TARGET
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")
#define NNG_TARGET avx512bf16
#define NNG_PAIRS 1
#include "fewrows_kernels.h"
#undef NNG_PAIRS
#undef NNG_LANES
#undef NNG_TARGET
#pragma GCC pop_options
#endif

namespace nng::few {

// y = x wᵀ + bias of up to kMost rows, in the kernels of this processor.
template <typename T>
void multiply(const Product<T>& p, bool columns) {
#ifdef NNG_X86
  static const std::string capability = at::get_cpu_capability();
  static const bool pairs = capability == "AVX512" && __builtin_cpu_supports("avx512bf16");
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (pairs) return avx512bf16::multiply<avx512bf16::Pairs>(p, columns);
  }
  if (capability == "AVX512") return avx512::multiply<avx512::Single<T>>(p, columns);
  if (capability == "AVX2") return avx2::multiply<avx2::Single<T>>(p, columns);
#endif
  plain::multiply<plain::Single<T>>(p, columns);
}

}  // namespace nng::few
#endif
