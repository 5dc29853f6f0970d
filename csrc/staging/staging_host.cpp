#include "staging/staging_host.h"

#include <cstring>
#include <new>

#include "staging/segments.h"

namespace realign {
namespace {

// All operations are synchronous, so streams and events do nothing.
struct HostDevice {
  // Makes a device current for the lifetime of the object.
  struct Current {
    explicit Current(const HostDevice&) {}
  };

  void* alloc_pinned(size_t bytes) { return ::operator new(bytes); }
  void free_pinned(void* memory) noexcept { ::operator delete(memory); }
  void* alloc(size_t bytes) { return ::operator new(bytes); }
  void free(void* memory) noexcept { ::operator delete(memory); }

  void* create_stream() { return nullptr; }
  void destroy_stream(void*) noexcept {}
  void* create_event() { return nullptr; }
  void destroy_event(void*) noexcept {}

  void copy_to_device_async(void* to, const void* from, size_t bytes, void*) {
    std::memcpy(to, from, bytes);
  }
  void copy_to_host_async(void* to, const void* from, size_t bytes, void*) {
    std::memcpy(to, from, bytes);
  }
  void segment_sums(const float* values, const int64_t* offsets, int64_t leaves, double* sums,
                    void*) {
    for (int64_t leaf = 0; leaf < leaves; ++leaf) {
      sums[leaf] = segment_sum(values, offsets[leaf], offsets[leaf + 1]);
    }
  }
  void record(void*, void*) {}
  void stream_wait(void*, void*) {}
  void synchronize(void*) {}
};

}  // namespace

std::unique_ptr<Staging> make_host_staging(int slots) {
  return std::make_unique<StagingRing<HostDevice>>(slots, HostDevice{});
}

}  // namespace realign
