// sim.cc: a device that is none, for tests of what computes elsewhere than on the CPU.
//
// Its memory is the CPU's and so are its kernels, but torch sees a device of its own: a call that mixes it
// with the CPU fails as it does on a GPU, and so does a look at a value, or a copy from the CPU, while a
// graph is being captured. A graph is captured as CUDA captures one: on a stream that is not the default
// one, computing nothing (what kernels wrote meanwhile is taken back, and what they made is filled with
// rubbish), and replaying it does to the same memory what was recorded.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/GraphImplInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using torch::jit::Stack;

constexpr DeviceType kSim = DeviceType::PrivateUse1;
const Device device(kSim, 0);

std::atomic<int64_t> launched, captured, replayed, alive;

// ---- memory ----

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? std::malloc(n) : nullptr;
    if (p) {
      std::memset(p, 0x7f, n);  // what nobody wrote is rubbish
      alive++;
    }
    return {p, p, &give_back, device};
  }
  static void give_back(void* p) {
    if (p) alive--;
    std::free(p);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};

Memory memory;
REGISTER_ALLOCATOR(kSim, &memory)

// ---- streams ----

thread_local c10::StreamId stream = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kSim; }
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream of(c10::StreamId id) const { return c10::Stream(c10::Stream::UNSAFE, device, id); }
  c10::Stream getStream(Device) const override { return of(stream); }
  c10::Stream getDefaultStream(Device) const override { return of(0); }
  c10::Stream getStreamFromGlobalPool(Device, bool) const override { return of(1); }
  c10::Stream getNewStream(Device, int) const override { return of(2); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto was = of(stream);
    stream = s.id();
    return was;
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = nullptr;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    auto next = memory.allocate(n);
    if (storage.nbytes() && n) std::memcpy(next.get(), storage.data(), std::min(n, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(next));
    storage.set_nbytes(n);
  }
};

// ---- the two sides of a tensor ----

bool is_sim(const at::Tensor& t) { return t.defined() && t.device().type() == kSim; }

// here is a CPU tensor of the same memory.
at::Tensor here(const at::Tensor& t) {
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  if (t.storage().nbytes() == 0) return at::empty_strided(t.sizes(), t.strides(), options);
  auto keep = t.storage();
  auto out = at::for_blob(t.data_ptr(), t.sizes())
                 .strides(t.strides())
                 .deleter([keep](void*) {})
                 .options(options)
                 .make_tensor();
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) out.unsafeGetTensorImpl()->set_wrapped_number(true);
  return out;
}

// there is a tensor of the device that takes a CPU tensor's memory over.
at::Tensor there(const at::Tensor& t) {
  auto* keep = new at::Tensor(t);
  alive++;
  c10::DataPtr data(
      t.data_ptr(), keep,
      [](void* p) {
        alive--;
        delete static_cast<at::Tensor*>(p);
      },
      device);
  auto bytes = t.storage().nbytes() - t.storage_offset() * t.element_size();
  auto storage = c10::Storage(c10::Storage::use_byte_size_t{}, bytes, std::move(data), &memory, true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
  return out;
}

// ---- capturing ----

struct Kernel {
  c10::OperatorHandle op;
  Stack args;                    // of the CPU's side
  std::vector<at::Tensor> made;  // results that it gave when it was recorded
};

struct Capture final : at::GraphImplInterface {
  explicit Capture(const at::GraphImplArgs&) {}
  ~Capture() override { reset(); }
  void capture_begin(at::MempoolId_t, at::GraphCaptureMode) override;
  void capture_end() override;
  void instantiate() override {}
  void replay() override;
  void reset() override {
    kernels.clear();
    ready = false;
  }
  at::MempoolId_t pool() const override { return {1, 0}; }
  void enable_debug_mode() override {}
  void debug_dump(const std::string&) override {}

  std::vector<Kernel> kernels;
  std::vector<std::pair<at::Tensor, at::Tensor>> before;  // what kernels wrote to, and what it was
  std::string broken;
  bool ready = false;
};

thread_local Capture* capturing = nullptr;

// forbidden fails, and the capture with it.
void forbidden(const char* what) {
  if (!capturing) return;
  capturing->broken = what;
  TORCH_CHECK(false, "sim: operation not permitted when stream is capturing: ", what);
}

void Capture::capture_begin(at::MempoolId_t, at::GraphCaptureMode) {
  TORCH_CHECK(stream != 0, "sim: graphs must be captured on a non-default stream");
  TORCH_CHECK(!capturing && !ready, "sim: a graph is captured already");
  capturing = this;
}

void Capture::capture_end() {
  TORCH_CHECK(capturing == this, "sim: no graph is being captured");
  capturing = nullptr;
  c10::InferenceMode any;  // tensors that were made in it may be written to, and others too
  for (size_t i = before.size(); i-- > 0;) before[i].first.copy_(before[i].second);
  before.clear();
  for (auto& k : kernels) {
    for (auto& t : k.made) {
      if (t.storage().nbytes()) std::memset(t.storage().mutable_data(), 0x7f, t.storage().nbytes());
    }
  }
  auto why = std::exchange(broken, "");
  if (!why.empty()) {
    reset();
    TORCH_CHECK(false, "sim: operation failed due to a previous error during capture: ", why);
  }
  ready = true;
  captured++;
}

void Capture::replay() {
  TORCH_CHECK(ready && !capturing, "sim: no graph was captured");
  replayed++;
  c10::InferenceMode any;
  for (auto& k : kernels) {
    Stack stack = k.args;
    k.op.callBoxed(&stack);
    size_t next = 0;
    auto given = [&](const at::Tensor& t) {
      if (next < k.made.size() && t.defined() && t.sizes() == k.made[next].sizes()) k.made[next].copy_(t);
      next++;
    };
    if (k.made.empty()) continue;
    for (auto& v : stack) {
      if (v.isTensor()) given(v.toTensor());
      if (v.isTensorList()) {
        for (const at::Tensor& t : v.toTensorVector()) given(t);
      }
    }
  }
}

// ---- kernels ----

// compute does an operator on the CPU, whose memory the device's is.
void compute(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto n = schema.arguments().size();
  const auto from = stack->size() - n;
  std::vector<at::Tensor> originals(n);
  std::vector<std::pair<at::Tensor, at::Tensor>> unsized;  // results without a size yet, and their CPU side
  launched++;

  auto moved = [&](const at::Tensor& t, bool writes) -> at::Tensor {
    if (!t.defined()) return t;
    if (!is_sim(t)) {
      TORCH_CHECK(t.dim() == 0 && t.device().is_cpu() && !writes,
                  "Expected all tensors to be on the same device, but got a tensor of ", t.sizes(), " on ", t.device(),
                  " and others on ", device, " (", schema.name(), ")");
      if (capturing && !t.unsafeGetTensorImpl()->is_wrapped_number()) return t.clone();  // by value, as CUDA does
      return t;
    }
    if (writes && t.numel() == 0) {
      auto fresh = at::empty({0}, t.options().device(at::kCPU));
      unsized.emplace_back(t, fresh);
      return fresh;
    }
    auto out = here(t);
    if (capturing && writes) capturing->before.emplace_back(out, out.clone());
    return out;
  };

  for (size_t i = 0; i < n; i++) {
    auto& v = (*stack)[from + i];
    const auto* alias = schema.arguments()[i].alias_info();
    bool writes = alias && alias->isWrite();
    if (v.isTensor()) {
      originals[i] = v.toTensor();
      v = moved(originals[i], writes);
    } else if (v.isTensorList()) {
      auto list = v.toTensorVector();
      for (auto& t : list) t = moved(t, writes);
      v = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : v.toOptionalTensorVector()) {
        if (t && t->defined() && !is_sim(*t)) {  // an index, which torch brings to the device
          forbidden("an index on the CPU");
          list.push_back(*t);
          continue;
        }
        list.push_back(t ? std::optional<at::Tensor>(moved(*t, writes)) : std::nullopt);
      }
      v = list;
    } else if (v.isDevice() && v.toDevice().type() == kSim) {
      v = Device(at::kCPU);
    }
  }
  Stack recorded;
  if (capturing) {
    if (!unsized.empty()) forbidden("a result without a size");
    recorded.assign(stack->begin() + from, stack->end());
  }
  op.callBoxed(stack);
  for (auto& [t, fresh] : unsized) {
    if (fresh.numel() == 0) continue;
    at::native::resize_impl_cpu_(t.unsafeGetTensorImpl(), fresh.sizes(), std::nullopt);
    here(t).copy_(fresh);
  }

  Kernel kernel{op, std::move(recorded), {}};
  auto result = [&](const at::Tensor& t) {
    if (!t.defined() || !t.device().is_cpu()) return t;
    if (capturing) kernel.made.push_back(t);
    return there(t);
  };
  const auto& returns = schema.returns();
  const auto first = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); i++) {
    auto& v = (*stack)[first + i];
    const auto* alias = returns[i].alias_info();
    if (v.isTensor() && alias && alias->isWrite()) {
      for (size_t a = 0; a < n; a++) {
        const auto* of = schema.arguments()[a].alias_info();
        if (of && of->isWrite() && *of == *alias) v = originals[a];
      }
    } else if (v.isTensor()) {
      v = result(v.toTensor());
    } else if (v.isTensorList()) {
      auto list = v.toTensorVector();
      for (auto& t : list) t = result(t);
      v = list;
    } else if (capturing) {
      forbidden("a value is looked at");
    }
  }
  if (capturing) capturing->kernels.push_back(std::move(kernel));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (is_sim(from) != is_sim(to)) forbidden("a copy from or to the CPU");
  auto a = is_sim(from) ? here(from) : from, b = is_sim(to) ? here(to) : to;
  launched++;
  if (capturing) {
    capturing->before.emplace_back(b, b.clone());
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    capturing->kernels.push_back({op, {b, a, false}, {}});
  }
  b.copy_(a);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

c10::Scalar local_scalar(const at::Tensor& t) {
  forbidden("a value is looked at");
  return here(t).item();
}

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   at::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           at::dtype_or_default(dtype));
}

const at::Tensor& resize(const at::Tensor& t, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(t.unsafeGetTensorImpl(), sizes, std::nullopt);
  return t;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
}

}  // namespace

namespace at {
C10_REGISTER_CLASS(GraphImplRegistry, SIM, Capture);
}  // namespace at

extern "C" {
// Before anything else: says that the device is there.
void sim_begin() {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}
int64_t sim_launched() { return launched; }
int64_t sim_captured() { return captured; }
int64_t sim_replayed() { return replayed; }
int64_t sim_alive() { return alive; }  // blocks of memory
}
