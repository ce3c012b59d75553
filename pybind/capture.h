// capture.h: passes that a device does again without being told each operation. Part of aten.cc.
#ifndef NNG_CAPTURE_H
#define NNG_CAPTURE_H

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/GraphImplInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace nng {

// What torch lacks to capture on CUDA: library nng_cuda beside this one (cuda.cc), where that was built.
struct Cuda {
  int64_t (*stream)(int8_t device) = nullptr;

  static const Cuda& instance() {
    static const Cuda cuda = [] {
      Cuda found;
      Dl_info self;
      if (dladdr(reinterpret_cast<const void*>(&Cuda::instance), &self) == 0) return found;
      std::string path = self.dli_fname;
      path = path.substr(0, path.rfind('/') + 1) + "libnng_cuda.so";
      void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library == nullptr) return found;  // torch is built without CUDA
      found.stream = reinterpret_cast<int64_t (*)(int8_t)>(dlsym(library, "nng_cuda_stream"));
      auto* begin = reinterpret_cast<void (*)()>(dlsym(library, "nng_cuda_begin"));
      if (found.stream == nullptr || begin == nullptr) return Cuda();
      begin();
      return found;
    }();
    return cuda;
  }
};

inline bool can_capture(at::DeviceType type) {
  if (type == at::kCUDA && Cuda::instance().stream == nullptr) return false;
  return at::has_graph_impl(type);
}

// What torch computes a pass by, and does not look at again when it is replayed; -1 where it must not be captured now.
inline int64_t capture_settings(at::DeviceType type) {
  if (at::autocast::is_autocast_enabled(type)) return -1;
  const auto& torch = at::globalContext();
  int64_t out = 0;
  for (int64_t setting : {
           static_cast<int64_t>(torch.float32MatmulPrecision()),
           static_cast<int64_t>(torch.allowTF32CuDNN()),
           static_cast<int64_t>(torch.allowFP16ReductionCuBLAS()),
           static_cast<int64_t>(torch.allowBF16ReductionCuBLAS()),
           static_cast<int64_t>(torch.allowFP16AccumulationCuBLAS()),
           static_cast<int64_t>(torch.deterministicAlgorithms()),
           static_cast<int64_t>(torch.deterministicCuDNN()),
           static_cast<int64_t>(torch.userEnabledCuDNN()),
           static_cast<int64_t>(torch.userEnabledFlashSDP()),
           static_cast<int64_t>(torch.userEnabledMemEfficientSDP()),
           static_cast<int64_t>(torch.userEnabledMathSDP()),
           static_cast<int64_t>(torch.userEnabledCuDNNSDP()),
       }) {
    out = out * 8 + setting;
  }
  return out;
}

// What a device was given between the construction and end(): a CUDA graph on CUDA, and what another backend of
// torch registers for itself. It is captured on a stream beside the current one, and replayed on that.
class Capture {
 public:
  explicit Capture(const at::Device& device)
      : device_(device),
        streams_(device.type()),
        outer_(streams_.getStream(device)),
        graph_(can_capture(device.type()) ? at::create_graph_impl(device.type()) : nullptr) {
    if (!graph_) throw std::invalid_argument("torch captures no graphs on " + device.str());
    c10::DeviceGuard on(device_);
    streams_.exchangeStream(aside());
    try {
      // Relaxed: what this thread asks for the first time, such as a handle of cuBLAS, may be made meanwhile, and
      // other threads may make what they like, too. What cannot be captured fails in any mode.
      graph_->capture_begin({0, 0}, at::GraphCaptureMode::Relaxed);
    } catch (...) {
      streams_.exchangeStream(outer_);
      throw;
    }
  }

  // Ends the capture, on the thread that began it; whatever comes of it, the thread has its own stream again.
  void end() {
    c10::DeviceGuard on(device_);
    try {
      graph_->capture_end();
    } catch (...) {
      streams_.exchangeStream(outer_);
      throw;
    }
    streams_.exchangeStream(outer_);
  }

  // Whether this thread gives its work to the stream that the capture belongs to: another one would not wait for it.
  bool here() const { return streams_.getStream(device_) == outer_; }

  void replay() {
    c10::DeviceGuard on(device_);
    graph_->replay();
  }

 private:
  c10::Stream aside() const {
    if (device_.type() != at::kCUDA) return streams_.getStreamFromGlobalPool(device_, /*isHighPriority=*/false);
    return c10::Stream(c10::Stream::UNSAFE, device_, Cuda::instance().stream(device_.index()));
  }

  const at::Device device_;
  const c10::impl::VirtualGuardImpl streams_;
  const c10::Stream outer_;
  const std::unique_ptr<at::GraphImplInterface> graph_;
};

// Whether a tensor is no more than elements in a storage of its device.
inline bool is_elements(const at::Tensor& t) {
  return t.layout() == at::kStrided && t.has_storage() && !t.is_conj() && !t.is_neg() && !t.is_quantized();
}

// Whether a tensor is where another was, with the same meaning, and autograd does not follow it.
inline bool is_in_place_of(const at::Tensor& t, const at::Tensor& other) {
  return is_elements(t) && t.unsafeGetTensorImpl()->data() == other.unsafeGetTensorImpl()->data() &&
         t.scalar_type() == other.scalar_type() && t.sizes() == other.sizes() && t.strides() == other.strides() &&
         t.device() == other.device() && !t.requires_grad();
}

}  // namespace nng
#endif
