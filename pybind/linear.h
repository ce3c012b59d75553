// linear.h: nng::linear, which is aten::linear with ways of its own on the CPU, and nng::prepack.
// Part of aten.cc.
//
// One row: a token that is generated multiplies each weight of the model once, so a step takes as long as
// reading the weights does. torch hands a single row to a BLAS whose matrix-vector product works on one
// thread and reads at half the speed that one thread could; here all threads read, in the order of memory.
//
// Several rows: oneDNN multiplies them faster with a copy of the weight in a layout of its own choice,
// which prepack makes and linear is given beside the weight.
#ifndef NNG_LINEAR_H
#define NNG_LINEAR_H

#include <ATen/ATen.h>
#include <ATen/TensorIterator.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

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

inline bool is_plain(const at::Tensor& t) {
  return t.device().type() == at::kCPU && t.layout() == at::kStrided && !at::isTensorSubclassLike(t) &&
         !(t.requires_grad() && at::GradMode::is_enabled()) && !t.is_neg() && !t.is_conj();
}

// Whether the ways of our own may do the work: aten::linear knows autograd, autocast and all the rest.
inline bool is_plain(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  auto type = x.scalar_type();
  if (type != at::kFloat && type != at::kBFloat16) return false;
  if (x.dim() < 1 || w.dim() != 2 || x.size(-1) != w.size(1) || x.numel() == 0 || w.numel() == 0) return false;
  if (!is_plain(x) || !is_plain(w) || w.scalar_type() != type) return false;
  if (bias.has_value() && bias->defined()) {
    if (!is_plain(*bias) || bias->scalar_type() != type || bias->dim() != 1 || bias->size(0) != w.size(0)) return false;
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

inline at::Tensor one_row(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  at::Tensor y = x.scalar_type() == at::kFloat ? row_times<float>(x, w) : row_times<at::BFloat16>(x, w);
  if (bias.has_value() && bias->defined()) y.add_(*bias);
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  return y.to(x.scalar_type()).view(sizes);
}

// An operator of oneDNN's; none where torch was built without it.
template <typename F>
std::optional<c10::TypedOperatorHandle<F>> find_op(const char* name) {
  auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  if (!op.has_value()) return std::nullopt;
  return op->typed<F>();
}

// Outputs [from, to) of a weight in oneDNN's layout; none where oneDNN does not do such products here.
// transposed says that the weight is [in, out].
inline std::optional<at::Tensor> prepack(const at::Tensor& weight, bool transposed, int64_t from, int64_t to) {
  static const auto reorder =
      find_op<at::Tensor(const at::Tensor&, std::optional<c10::SymInt>)>("mkldnn::_reorder_linear_weight");
  if (!reorder.has_value() || !at::globalContext().userEnabledMkldnn() || !is_plain(weight)) return std::nullopt;
  c10::InferenceMode lasting(false);  // it outlives the trace that it is made in
  at::AutoDispatchBelowADInplaceOrView no_history;
  constexpr int64_t kRows = 64;  // any number gives the same layout; none at all takes twice as long
  try {
    return reorder->call((transposed ? weight.t() : weight).narrow(0, from, to - from), c10::SymInt(kRows));
  } catch (const c10::Error&) {  // this processor lacks what the dtype needs
    return std::nullopt;
  }
}

// The product with a weight that was packed in one piece or several, which follow each other along the outputs.
inline at::Tensor packed_times(const at::Tensor& x, at::TensorList pieces, const std::optional<at::Tensor>& bias) {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  static const auto multiply =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                         Scalars, std::optional<std::string_view>)>("mkldnn::_linear_pointwise");
  at::AutoDispatchBelowADInplaceOrView no_history;
  auto times = [&](const at::Tensor& piece, const std::optional<at::Tensor>& b) {
    return multiply->call(x, piece, b, "none", Scalars(), "");
  };
  if (pieces.size() == 1) return times(pieces[0], bias);
  std::vector<at::Tensor> parts;
  int64_t from = 0;
  for (const at::Tensor& piece : pieces) {
    std::optional<at::Tensor> b;
    if (bias.has_value() && bias->defined()) b = bias->narrow(0, from, piece.size(0));
    parts.push_back(times(piece, b));
    from += piece.size(0);
  }
  return at::cat(parts, -1);
}

// x wᵀ + bias for x [..., in] and bias [out]; w is [out, in], or [in, out] if transposed. pieces, if there are
// any, are the same weight packed.
inline at::Tensor linear_packed(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                bool transposed, at::TensorList pieces) {
  at::Tensor w = transposed ? weight.t() : weight;
  if (!is_plain(x, w, bias)) return at::linear(x, w, bias);
  if (x.numel() == w.size(1)) {
    if (w.is_contiguous() || w.t().is_contiguous()) return one_row(x, w, bias);
  } else if (!pieces.empty() && at::globalContext().userEnabledMkldnn()) {
    return packed_times(x, pieces, bias);
  }
  return at::linear(x, w, bias);
}

inline at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         bool transposed) {
  return linear_packed(x, weight, bias, transposed, {});
}

TORCH_LIBRARY_FRAGMENT(nng, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None, bool transposed=False) -> Tensor", linear);
  m.def("linear_packed(Tensor input, Tensor weight, Tensor? bias, bool transposed, Tensor[] packed) -> Tensor",
        linear_packed);
  m.def("prepack(Tensor weight, bool transposed, int start, int end) -> Tensor?", prepack);
}

}  // namespace nng
#endif
