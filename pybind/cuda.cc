// cuda.cc: CUDA graphs, for aten.cc (library nng_cuda, which it loads where there is a GPU). Torch registers what
// captures for other accelerators, and not for CUDA.

#include <ATen/core/GraphImplInterface.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <memory>
#include <mutex>

namespace {

// torch's own CUDA graph as the captures of other devices are.
class Graph final : public at::GraphImplInterface {
 public:
  explicit Graph(const at::GraphImplArgs& args) : graph_(args.keep_graph) {}

  void capture_begin(at::MempoolId_t pool, at::GraphCaptureMode mode) override {
    graph_.capture_begin(pool, native(mode));
  }
  void capture_end() override { graph_.capture_end(); }
  void instantiate() override { graph_.instantiate(); }
  void replay() override { graph_.replay(); }
  void reset() override { graph_.reset(); }
  at::MempoolId_t pool() const override { return graph_.pool(); }
  void enable_debug_mode() override { graph_.enable_debug_mode(); }
  void debug_dump(const std::string& path) override { TORCH_CHECK(false, "no CUDA graph is written to ", path); }

 private:
  static cudaStreamCaptureMode native(at::GraphCaptureMode mode) {
    switch (mode) {
      case at::GraphCaptureMode::Relaxed:
        return cudaStreamCaptureModeRelaxed;
      case at::GraphCaptureMode::ThreadLocal:
        return cudaStreamCaptureModeThreadLocal;
      default:
        return cudaStreamCaptureModeGlobal;
    }
  }

  mutable at::cuda::CUDAGraph graph_;
};

}  // namespace

extern "C" {

// Registers it, unless torch has something of its own by now.
void nng_cuda_begin() {
  if (at::has_graph_impl(at::kCUDA)) return;
  at::GraphImplRegistry()->Register("CUDA",
                                    [](const at::GraphImplArgs& args) -> std::unique_ptr<at::GraphImplInterface> {
                                      return std::make_unique<Graph>(args);
                                    });
}

// The id of a stream of a device that nobody else has: those of torch's pool go round, and what somebody gives the
// same stream while it captures would be captured, too.
int64_t nng_cuda_stream(int8_t device) {
  static std::mutex lock;
  static std::array<cudaStream_t, 128> made{};
  std::lock_guard<std::mutex> held(lock);
  auto& stream = made.at(device);
  if (stream == nullptr) C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return c10::cuda::getStreamFromExternal(stream, device).unwrap().id();
}
}
