// linear.h: nng::linear, which is aten::linear with a kernel of its own for a single row on the CPU.
// Part of aten.cc.
//
// A token that is generated multiplies each weight of the model once, so a step takes as long as reading
// the weights does. torch hands a single row to a BLAS whose matrix-vector product works on one thread
// and reads at half the speed that one thread could; here all threads read, in the order of memory.
#ifndef NNG_LINEAR_H
#define NNG_LINEAR_H

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <type_traits>

namespace nng {

using std::int64_t;

inline __attribute__((always_inline)) float as_float(float x) { return x; }

inline __attribute__((always_inline)) float as_float(at::BFloat16 x) {
  std::uint32_t bits = static_cast<std::uint32_t>(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// y[from:to] of a weight [out, in] in memory order: each output is a dot product with one row of it.
template <typename W>
inline __attribute__((always_inline)) void dots(const float* x, const W* w, int64_t in, float* y, int64_t from,
                                                int64_t to) {
  constexpr int kLanes = 64;                             // sums that are independent of each other
  constexpr int64_t kAhead = 2048 / int64_t{sizeof(W)};  // far enough to hide the memory's latency
  for (int64_t o = from; o < to; o++) {
    const W* row = w + o * in;
    float sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= in; i += kLanes) {
      for (std::size_t k = 0; k < kLanes * sizeof(W); k += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(row + i + kAhead) + k);
      }
#pragma omp simd
      for (int k = 0; k < kLanes; k++) sums[k] += x[i + k] * as_float(row[i + k]);
    }
    float sum = 0;
    for (; i < in; i++) sum += x[i] * as_float(row[i]);
#pragma omp simd reduction(+ : sum)
    for (int k = 0; k < kLanes; k++) sum += sums[k];
    y[o] = sum;
  }
}

// y[from:to] of a weight [in, out] in memory order: a sum of its rows, eight of them at a time.
template <typename W>
inline __attribute__((always_inline)) void sums(const float* x, const W* w, int64_t in, int64_t out, float* y,
                                                int64_t from, int64_t to) {
  for (int64_t j = from; j < to; j++) y[j] = 0;
  int64_t i = 0;
  for (; i + 8 <= in; i += 8) {
    const W* row = w + i * out;
    const float* f = x + i;
#pragma omp simd
    for (int64_t j = from; j < to; j++) {
      const W* c = row + j;
      y[j] += f[0] * as_float(c[0]) + f[1] * as_float(c[out]) + f[2] * as_float(c[2 * out]) +
              f[3] * as_float(c[3 * out]) + f[4] * as_float(c[4 * out]) + f[5] * as_float(c[5 * out]) +
              f[6] * as_float(c[6 * out]) + f[7] * as_float(c[7 * out]);
    }
  }
  for (; i < in; i++) {
    const W* row = w + i * out;
#pragma omp simd
    for (int64_t j = from; j < to; j++) y[j] += x[i] * as_float(row[j]);
  }
}

// A part of one product, and the code for it: the compiler makes one of each kind of processor.
template <typename W>
struct Part {
  const float* x;
  const W* w;
  int64_t in, out;
  bool rows;  // the weight is [out, in] in memory order, not [in, out]
  float* y;

  inline __attribute__((always_inline)) void body(int64_t from, int64_t to) const {
    if (rows) {
      dots(x, w, in, y, from, to);
    } else {
      sums(x, w, in, out, y, from, to);
    }
  }

#if defined(__x86_64__)
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))) void avx512(int64_t from, int64_t to) const {
    body(from, to);
  }
  __attribute__((target("avx2,fma"))) void avx2(int64_t from, int64_t to) const { body(from, to); }
#endif

  void plain(int64_t from, int64_t to) const { body(from, to); }

  void run(int64_t from, int64_t to) const {
#if defined(__x86_64__)
    static const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return avx512(from, to);
    if (capability == "AVX2") return avx2(from, to);
#endif
    plain(from, to);
  }
};

// Does product on all threads; y is [out], in float32.
template <typename W>
void in_parallel(const Part<W>& product, const at::Tensor& y) {
  // An iterator over the output alone: it cuts it into parts, one a thread, with torch's own threads.
  auto parts = at::TensorIteratorConfig()
                   .check_all_same_dtype(false)
                   .declare_static_dtype_and_device(at::kFloat, at::kCPU)
                   .resize_outputs(false)
                   .add_output(y)
                   .build();
  constexpr int64_t kLeast = int64_t{1} << 15;  // multiplications that are worth a thread
  parts.for_each(
      [&](char** data, const int64_t*, int64_t n, int64_t times) {
        int64_t from = reinterpret_cast<float*>(data[0]) - product.y;
        product.run(from, from + n * times);  // y has no gaps
      },
      std::max<int64_t>(kLeast / std::max<int64_t>(product.in, 1), 64));
}

// Whether the kernel above may do the work.
inline bool single_row(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  auto plain = [](const at::Tensor& t) {
    return t.device().type() == at::kCPU && t.layout() == at::kStrided && !at::isTensorSubclassLike(t) &&
           !(t.requires_grad() && at::GradMode::is_enabled()) && !t.is_neg() && !t.is_conj();
  };
  auto type = x.scalar_type();
  if (type != at::kFloat && type != at::kBFloat16) return false;
  if (x.dim() < 1 || w.dim() != 2 || x.size(-1) != w.size(1) || x.numel() != w.size(1) || w.numel() == 0) return false;
  if (!plain(x) || !plain(w) || w.scalar_type() != type || !(w.is_contiguous() || w.t().is_contiguous())) return false;
  if (bias.has_value() && bias->defined()) {
    if (!plain(*bias) || bias->scalar_type() != type || bias->dim() != 1 || bias->size(0) != w.size(0)) return false;
  }
  return !at::autocast::is_autocast_enabled(at::kCPU);
}

template <typename W>
at::Tensor row_times(const at::Tensor& x, const at::Tensor& w) {
  at::Tensor row = x.reshape({-1}).to(at::kFloat).contiguous();
  at::Tensor y = at::empty({w.size(0)}, row.options());
  Part<W> product{row.const_data_ptr<float>(), w.const_data_ptr<W>(),      w.size(1), w.size(0),
                  w.is_contiguous(),           y.mutable_data_ptr<float>()};
  in_parallel(product, y);
  return y;
}

// linear is x wᵀ + bias for x [..., in], w [out, in] and bias [out].
inline at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  if (!single_row(x, w, bias)) return at::linear(x, w, bias);
  at::Tensor y = x.scalar_type() == at::kFloat ? row_times<float>(x, w) : row_times<at::BFloat16>(x, w);
  if (bias.has_value() && bias->defined()) y.add_(*bias);
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  return y.to(x.scalar_type()).view(sizes);
}

TORCH_LIBRARY_FRAGMENT(nng, m) { m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", linear); }

}  // namespace nng
#endif
