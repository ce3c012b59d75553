// memory.h: a count of the memory of CPU tensors, and a bound on it. Part of aten.cc.
#ifndef NNG_MEMORY_H
#define NNG_MEMORY_H

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <malloc.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <mutex>
#include <stdexcept>

namespace nng {

// torch's own CPU allocator, with a count. Its memory is malloc's, which knows how large each piece is, so that
// nothing is kept beside one: a piece counts with what malloc gave for it, both when it comes and when it goes.
// What was allocated before has torch's deleter and is never counted.
class CountedMemory final : public c10::Allocator {
 public:
  // The one of the process. It is never destroyed: tensors may outlive whatever ends first.
  static CountedMemory& instance() {
    static auto* memory = new CountedMemory(c10::GetDefaultCPUAllocator());
    return *memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return base_->allocate(0);
    Reserved reserved(*this, bytes);
    c10::DataPtr data = base_->allocate(bytes);  // freed by its own deleter should what follows throw
    TORCH_INTERNAL_ASSERT(data.get() == data.get_context());
    reserved.keep(malloc_usable_size(data.get()));
    TORCH_INTERNAL_ASSERT(data.compare_exchange_deleter(base_->raw_deleter(), &release));
    return data;
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Installs it, and bounds what there may be more than there is now; a negative number bounds nothing.
  void cap(int64_t more) {
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    if (c10::GetCPUAllocator() != this) {
      if (c10::GetCPUAllocator() != base_ || base_->raw_deleter() == nullptr) {
        throw std::invalid_argument("the memory of tensors is another library's, and cannot be counted");
      }
      c10::SetCPUAllocator(this);
    }
    int64_t now = live_.load();
    peak_.store(now);
    limit_.store(more < 0 || more > kNone - now ? kNone : now + more);
  }

  int64_t live() const { return live_.load(std::memory_order_relaxed); }
  int64_t peak() const { return peak_.load(std::memory_order_relaxed); }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

  explicit CountedMemory(c10::Allocator* base) : base_(base) {}

  // Bytes that count from before they are there, so that no two threads are promised the same ones.
  class Reserved {
   public:
    Reserved(CountedMemory& memory, size_t bytes) : memory_(memory) {
      int64_t limit = memory.limit_.load(std::memory_order_relaxed);
      int64_t now = memory.live_.load(std::memory_order_relaxed);
      do {
        int64_t left = limit > now ? limit - now : 0;
        TORCH_CHECK_WITH(OutOfMemoryError, bytes <= static_cast<size_t>(left), "a tensor needs ", bytes, " bytes, and ",
                         left, " are allowed");
      } while (!memory.live_.compare_exchange_weak(now, now + static_cast<int64_t>(bytes), std::memory_order_relaxed));
      bytes_ = static_cast<int64_t>(bytes);
    }
    Reserved(const Reserved&) = delete;
    Reserved& operator=(const Reserved&) = delete;
    ~Reserved() { memory_.live_.fetch_sub(bytes_, std::memory_order_relaxed); }

    // Goes over to a piece of so many bytes, which counts until it is freed.
    void keep(size_t bytes) {
      int64_t now = memory_.live_.fetch_add(static_cast<int64_t>(bytes) - bytes_, std::memory_order_relaxed);
      now += static_cast<int64_t>(bytes) - bytes_;
      bytes_ = 0;
      int64_t peak = memory_.peak_.load(std::memory_order_relaxed);
      while (now > peak && !memory_.peak_.compare_exchange_weak(peak, now, std::memory_order_relaxed)) {
      }
    }

   private:
    CountedMemory& memory_;
    int64_t bytes_ = 0;
  };

  static void release(void* piece) {
    if (piece == nullptr) return;
    CountedMemory& memory = instance();
    auto bytes = static_cast<int64_t>(malloc_usable_size(piece));
    memory.base_->raw_deallocate(piece);
    memory.live_.fetch_sub(bytes, std::memory_order_relaxed);
  }

  c10::Allocator* base_;
  std::atomic<int64_t> live_{0}, peak_{0}, limit_{kNone};
};

}  // namespace nng

#endif
