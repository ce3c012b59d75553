// linear.h: nng::linear and nng::gelu, which are aten's with ways of their own on the CPU, and nng::prepack.
// Part of aten.cc.
//
// A few rows, a prompt's or a token's that is generated, are multiplied with the weight as it lies (fewrows.h).
//
// More rows: oneDNN multiplies them faster with a copy of the weight in a layout of its own choice, which
// prepack makes and linear is given beside the weight.
#ifndef NNG_LINEAR_H
#define NNG_LINEAR_H

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace nng {

using std::int64_t;

// Whether a tensor is numbers in memory on the CPU, and nothing but those: no tangent goes with them either.
inline bool is_dense(const at::Tensor& t) {
  return t.device().type() == at::kCPU && t.layout() == at::kStrided && !at::isTensorSubclassLike(t) && !t.is_neg() &&
         !t.is_conj() && !t.is_nested() && !t._is_zerotensor() && !t._fw_grad(0).defined();
}

inline bool is_followed(const at::Tensor& t) { return t.requires_grad() && at::GradMode::is_enabled(); }

inline bool is_plain(const at::Tensor& t) { return is_dense(t) && !is_followed(t); }

// Whether the ways of our own may do the work: aten::linear knows autocast, gradients of weights and all the rest.
inline bool is_ours(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  if (!is_dense(x) || !is_plain(w)) return false;
  auto type = x.scalar_type();
  if ((type != at::kFloat && type != at::kBFloat16) || w.scalar_type() != type) return false;
  if (x.dim() < 1 || w.dim() != 2 || x.size(-1) != w.size(1) || x.numel() == 0 || w.numel() == 0) return false;
  if (bias.has_value() && bias->defined()) {
    if (!is_plain(*bias) || bias->scalar_type() != type || bias->dim() != 1 || bias->size(0) != w.size(0)) return false;
  }
  return !at::autocast::is_autocast_enabled(at::kCPU);
}

// The product of a few rows with w [out, in], which is contiguous as it is or transposed.
template <typename T>
void few_rows(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias, const at::Tensor& y) {
  at::Tensor rows = x.contiguous();
  at::Tensor b = bias.has_value() && bias->defined() ? bias->contiguous() : at::Tensor();
  kernels::Product<T> product{rows.const_data_ptr<T>(),
                              w.const_data_ptr<T>(),
                              b.defined() ? b.const_data_ptr<T>() : nullptr,
                              y.mutable_data_ptr<T>(),
                              x.numel() / w.size(1),
                              w.size(1),
                              w.size(0)};
  kernels::multiply(product, !w.is_contiguous());
}

// Whether that is the fastest way of a product that is_ours, of which a packed weight is there or not.
inline bool are_few(const at::Tensor& x, const at::Tensor& w, bool packed) {
  bool columns = !w.is_contiguous();
  if (columns && (!w.t().is_contiguous() || w.size(0) < kernels::kWidest)) return false;
  int64_t most = packed ? kernels::fastest(columns) : kernels::faster(x.scalar_type(), columns);
  return x.numel() <= most * w.size(1);
}

inline at::Tensor few_rows(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  auto sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  at::Tensor y = at::empty(sizes, x.options());
  if (x.scalar_type() == at::kFloat) {
    few_rows<float>(x, w, bias, y);
  } else {
    few_rows<at::BFloat16>(x, w, bias, y);
  }
  return y;
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

inline at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         bool transposed);

// The product of a few rows that autograd follows, with a frozen weight. Backwards it is a product with the same
// weight read the other way, of as many rows, which may itself be followed.
struct FewRows : torch::autograd::Function<FewRows> {
  static at::Tensor forward(torch::autograd::AutogradContext* node, const at::Tensor& x, const at::Tensor& w,
                            const std::optional<at::Tensor>& bias) {
    node->save_for_backward({w});
    return few_rows(x, w, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* node,
                                                 const torch::autograd::variable_list& grads) {
    at::Tensor w = node->get_saved_variables()[0], of_x;
    if (grads[0].defined()) of_x = linear(grads[0], w.t(), {}, false);
    return {of_x, {}, {}};
  }
};

// x wᵀ + bias for x [..., in] and bias [out]; w is [out, in], or [in, out] if transposed. pieces, if there are
// any, are the same weight packed.
inline at::Tensor linear_packed(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                bool transposed, at::TensorList pieces) {
  at::Tensor w = transposed ? weight.t() : weight;
  if (!is_ours(x, w, bias)) return at::linear(x, w, bias);
  if (is_followed(x)) return are_few(x, w, false) ? FewRows::apply(x, w, bias) : at::linear(x, w, bias);
  bool packed = !pieces.empty() && at::globalContext().userEnabledMkldnn();
  if (are_few(x, w, packed)) return few_rows(x, w, bias);
  if (packed) return packed_times(x, pieces, bias);
  return at::linear(x, w, bias);
}

inline at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         bool transposed) {
  return linear_packed(x, weight, bias, transposed, {});
}

template <typename T>
at::Tensor tanh_gelu(const at::Tensor& x) {
  at::Tensor y = at::empty_like(x);
  kernels::tanh_gelu(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.numel());
  return y;
}

inline at::Tensor gelu(const at::Tensor& x, std::string_view approximate) {
  if (approximate == "tanh" && is_plain(x) && x.is_contiguous()) {
    if (x.scalar_type() == at::kFloat) return tanh_gelu<float>(x);
    if (x.scalar_type() == at::kBFloat16) return tanh_gelu<at::BFloat16>(x);
  }
  return at::gelu(x, approximate);
}

TORCH_LIBRARY_FRAGMENT(nng, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None, bool transposed=False) -> Tensor", linear);
  m.def("linear_packed(Tensor input, Tensor weight, Tensor? bias, bool transposed, Tensor[] packed) -> Tensor",
        linear_packed);
  m.def("gelu(Tensor self, *, str approximate='none') -> Tensor", gelu);
  m.def("prepack(Tensor weight, bool transposed, int start, int end) -> Tensor?", prepack);
}

}  // namespace nng
#endif
