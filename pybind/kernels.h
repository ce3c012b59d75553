// kernels.h: what the engine computes by code of its own on the CPU, in versions for several kinds of processor.
// Part of aten.cc.
//
// lanes.h, fewrows.h and gelu.h are compiled once for each kind, into a namespace of its name. Which one runs is
// chosen as torch chooses (ATEN_CPU_CAPABILITY).
#ifndef NNG_KERNELS_H
#define NNG_KERNELS_H

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/Version.h>

#if defined(__x86_64__) && !defined(__clang__)
#define NNG_X86 1
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>
#include <type_traits>

#define NNG_INLINE inline __attribute__((always_inline))
#define NNG_UNROLL _Pragma("GCC unroll 16")

namespace nng::kernels {

using std::int64_t;

// y = x wᵀ + bias. Everything is contiguous; w is [out, in] or, by columns, [in, out].
template <typename T>
struct Product {
  const T* x;
  const T* w;
  const T* bias;  // or null
  T* y;
  int64_t rows, in, out;
};

constexpr int64_t kMost = 64;    // rows of a product
constexpr int64_t kWidest = 32;  // columns that a kernel may take at once

struct Range {
  int64_t from, to;
};

inline int64_t divided(int64_t a, int64_t by) { return (a + by - 1) / by; }

// Part i of n of what is `of` long, in multiples of unit; the last one may be shorter, or there is none.
inline Range part(int64_t i, int64_t n, int64_t of, int64_t unit) {
  int64_t each = divided(divided(of, n), unit) * unit;
  return {std::min(i * each, of), std::min((i + 1) * each, of)};
}

// How many threads so much work is for, of which `least` is worth one.
inline int64_t threads_for(int64_t work, int64_t least) {
  return std::clamp<int64_t>(work / least, 1, at::get_num_threads());
}

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

}  // namespace nng::kernels

// clang-format off: each of these needs the one before it
#define NNG_TARGET plain
#define NNG_LANES 8
#include "lanes.h"
#include "fewrows.h"
#include "gelu.h"
#undef NNG_LANES
#undef NNG_TARGET

#ifdef NNG_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NNG_TARGET avx2
#define NNG_LANES 8
#include "lanes.h"
#include "fewrows.h"
#include "gelu.h"
#undef NNG_LANES
#undef NNG_TARGET
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#define NNG_TARGET avx512
#define NNG_LANES 16
#include "lanes.h"
#include "fewrows.h"
#include "gelu.h"
#undef NNG_TARGET
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")
#define NNG_TARGET avx512bf16
#define NNG_PAIRS 1
#include "lanes.h"
#include "fewrows.h"
#undef NNG_PAIRS
#undef NNG_LANES
#undef NNG_TARGET
#pragma GCC pop_options
#endif
// clang-format on

namespace nng::kernels {

enum class Kind { kPlain, kAVX2, kAVX512, kAVX512BF16 };

inline Kind kind() {
#ifdef NNG_X86
  static const Kind here = [] {
    std::string capability = at::get_cpu_capability();
    if (capability == "AVX2") return Kind::kAVX2;
    if (capability != "AVX512") return Kind::kPlain;
    return __builtin_cpu_supports("avx512bf16") ? Kind::kAVX512BF16 : Kind::kAVX512;
  }();
  return here;
#else
  return Kind::kPlain;
#endif
}

// Rows up to which multiply is as fast as with a packed weight. engine/host/prepack.go has the same numbers.
constexpr int64_t fastest(bool columns) { return columns ? 32 : 8; }

// Rows up to which it is faster than what torch does with the weight as it lies.
constexpr int64_t faster(at::ScalarType type, bool columns) { return columns || type == at::kFloat ? kMost : 24; }

// y = x wᵀ + bias of up to kMost rows; by columns, out is at least kWidest.
template <typename T>
void multiply(const Product<T>& p, bool columns) {
#ifdef NNG_X86
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (kind() == Kind::kAVX512BF16) return avx512bf16::multiply<avx512bf16::Pairs>(p, columns);
  }
  if (kind() >= Kind::kAVX512) return avx512::multiply<avx512::Single<T>>(p, columns);
  if (kind() == Kind::kAVX2) return avx2::multiply<avx2::Single<T>>(p, columns);
#endif
  plain::multiply<plain::Single<T>>(p, columns);
}

// y = gelu(x) of n numbers.
template <typename T>
void tanh_gelu(const T* x, T* y, int64_t n) {
#ifdef NNG_X86
  if (kind() >= Kind::kAVX512) return avx512::tanh_gelu(x, y, n);
  if (kind() == Kind::kAVX2) return avx2::tanh_gelu(x, y, n);
#endif
  plain::tanh_gelu(x, y, n);
}

}  // namespace nng::kernels
#endif
