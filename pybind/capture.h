// capture.h: passes that a device does again without being told each operation. Part of aten.cc.
#ifndef NNG_CAPTURE_H
#define NNG_CAPTURE_H

#include <ATen/ATen.h>
#include <ATen/core/GraphImplInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>
#include <stdexcept>

namespace nng {

// What a device was given between the construction and end(): a CUDA graph on CUDA, and what another backend of
// torch registers for itself. It is captured on a stream beside the current one, and replayed on that.
class Capture {
 public:
  explicit Capture(const at::Device& device)
      : device_(device),
        streams_(device.type()),
        outer_(streams_.getStream(device)),
        graph_(at::create_graph_impl(device.type())) {
    if (!graph_) throw std::invalid_argument("torch captures no graphs on " + device.str());
    c10::DeviceGuard on(device_);
    streams_.synchronizeDevice(device_.index());  // what is under way on other streams is not waited for in a graph
    streams_.exchangeStream(streams_.getStreamFromGlobalPool(device_, /*isHighPriority=*/false));
    try {
      // Relaxed: what this thread asks for the first time, such as a handle of cuBLAS, may be made meanwhile, and
      // other threads are not kept from anything. What cannot be captured fails in any mode.
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
  const at::Device device_;
  const c10::impl::VirtualGuardImpl streams_;
  const c10::Stream outer_;
  const std::unique_ptr<at::GraphImplInterface> graph_;
};

}  // namespace nng
#endif
