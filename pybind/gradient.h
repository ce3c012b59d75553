// gradient.h: values that autograd follows, and backward passes. Part of aten.cc.
#ifndef NNG_GRADIENT_H
#define NNG_GRADIENT_H

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace nng {

using torch::autograd::variable_list;

// Where autograd begins: a value that it follows from here on, though nothing before it is followed.
// Unlike a leaf it keeps no gradient of its own, and it may be changed in place.
struct Source : public torch::autograd::Node {
  variable_list apply(variable_list&&) override { return {}; }
  std::string name() const override { return "Source"; }
};

// The value that is to take t's place, so that autograd follows it: of the same memory.
inline at::Tensor tracked(const at::Tensor& t, bool retain) {
  if (!at::isFloatingType(t.scalar_type()) && !at::isComplexType(t.scalar_type())) {
    throw std::invalid_argument(std::string("a tensor of dtype ") + at::toString(t.scalar_type()) +
                                " has no gradient: only floating point and complex ones do");
  }
  if (t.is_inference() || c10::InferenceMode::is_enabled()) {
    throw std::invalid_argument("a tensor that was made in inference mode has no gradient");
  }
  at::Tensor out = t;
  if (!t.requires_grad()) {
    auto* impl = t.unsafeGetTensorImpl();
    out = at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/true));
    torch::autograd::set_history(out, c10::make_intrusive<Source>());
  }
  if (retain && out.grad_fn() != nullptr) out.retain_grad();
  return out;
}

// Whether a backward pass from these values comes to leaves, whose .grad it fills.
inline bool reaches_leaves(const variable_list& roots) {
  std::unordered_set<torch::autograd::Node*> seen;
  std::vector<torch::autograd::Node*> open;
  auto visit = [&](torch::autograd::Node* n) {
    if (n != nullptr && seen.insert(n).second) open.push_back(n);
  };
  for (const auto& r : roots) {
    if (r.grad_fn() != nullptr) {
      visit(r.grad_fn().get());
    } else if (r.requires_grad()) {
      return true;
    }
  }
  while (!open.empty()) {
    auto* n = open.back();
    open.pop_back();
    if (dynamic_cast<torch::autograd::AccumulateGrad*>(n) != nullptr) return true;
    for (const auto& edge : n->next_edges()) visit(edge.function.get());
  }
  return false;
}

// Hooks on values for the time of one backward pass.
class Hooks {
 public:
  Hooks() = default;
  Hooks(const Hooks&) = delete;
  Hooks& operator=(const Hooks&) = delete;
  ~Hooks() {
    for (auto& [t, at] : hooks_) t.remove_hook(at);
  }
  template <typename F>
  void add(const at::Tensor& t, F f) {
    hooks_.emplace_back(t, t.register_hook(std::move(f)));
  }

 private:
  std::vector<std::pair<at::Tensor, unsigned>> hooks_;
};

// What a backward pass is told.
struct Backward {
  variable_list roots, seeds;      // what it starts from, and their gradients (undefined: one)
  variable_list targets;           // whose gradients are asked for
  variable_list retained;          // values that retain their gradients
  variable_list edited, replaced;  // values whose gradients are others from here on, and those
  bool retain = false, create = false;
  bool fill = false;  // the .grad of leaves and of values that retain it

  variable_list run() const {
    Hooks hooks;
    for (size_t i = 0; i < edited.size(); i++) {
      hooks.add(edited[i], [value = replaced[i]](const at::Tensor&) { return value; });
    }
    if (!fill || !(!retained.empty() || reaches_leaves(roots))) {
      if (targets.empty()) {
        for (const auto& r : roots) {  // as torch would have said it
          TORCH_CHECK(r.requires_grad(), "element 0 of tensors does not require grad and does not have a grad_fn");
        }
        return {};
      }
      variable_list kept;  // values that retain their gradients get those that are only asked for, too
      for (const auto& t : retained) kept.push_back(t.mutable_grad());
      auto found = torch::autograd::grad(roots, targets, seeds, retain, create, /*allow_unused=*/true);
      for (size_t i = 0; i < retained.size(); i++) retained[i].mutable_grad() = kept[i];
      return found;
    }
    variable_list found(targets.size());
    for (size_t i = 0; i < targets.size(); i++) {
      hooks.add(targets[i], [&found, i](const at::Tensor& g) {
        found[i] = g;
        return at::Tensor();
      });
    }
    torch::autograd::backward(roots, seeds, retain, create);
    return found;
  }
};

inline at::Tensor grad_of(const at::Tensor& t) {
  if (!t.requires_grad() || !t.mutable_grad().defined()) {
    throw std::invalid_argument("no backward pass has come to this value, so it has no gradient");
  }
  return t.mutable_grad();
}

inline at::Tensor set_grad(at::Tensor t, const std::optional<at::Tensor>& grad) {
  if (grad.has_value() && grad->defined() && (grad->sizes() != t.sizes() || grad->scalar_type() != t.scalar_type())) {
    throw std::invalid_argument("a gradient has the sizes and the dtype of its value");
  }
  t.mutable_grad() = grad.has_value() ? *grad : at::Tensor();
  return t;
}

inline at::Tensor add_grad(at::Tensor t, const at::Tensor& grad) {
  at::Tensor before = t.mutable_grad();
  t.mutable_grad() = before.defined() ? before + grad : grad.clone();
  return t;
}

TORCH_LIBRARY_FRAGMENT(nng, m) {
  m.def("add_grad(Tensor(a!) input, Tensor grad) -> Tensor(a!)", add_grad);
  m.def("grad_of(Tensor input) -> Tensor", grad_of);
  m.def("set_grad(Tensor(a!) input, Tensor? grad) -> Tensor(a!)", set_grad);
}

}  // namespace nng
#endif
