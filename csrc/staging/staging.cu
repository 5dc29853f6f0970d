#include <stdexcept>

#include "cuda_device.h"
#include "staging/segments.h"
#include "staging/staging_cuda.h"

namespace realign {
namespace {

constexpr int kBlock = 128;  // four leaves

__global__ void __launch_bounds__(kBlock) sum_segments(const float* values,     // (count,)
                                                       const int64_t* offsets,  // (leaves + 1,)
                                                       int64_t leaves,
                                                       double* sums) {  // (leaves,)
  const int64_t leaf = int64_t{blockIdx.x} * (kBlock / kLanes) + threadIdx.x / kLanes;
  if (leaf >= leaves) return;  // for all threads of a warp
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  double sum = lane_sum(values, offsets[leaf], offsets[leaf + 1], lane);
  // The tree of segment_sum. The results of lanes from `step` up are not used.
  for (int step = kLanes / 2; step > 0; step /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, step);
  }
  if (lane == 0) sums[leaf] = sum;
}

struct CudaDevice {
  explicit CudaDevice(int index) : index(index) {}

  struct Current : CurrentDevice {
    explicit Current(const CudaDevice& device) : CurrentDevice(device.index) {}
  };

  void* alloc_pinned(size_t bytes) {
    void* memory = nullptr;
    check(cudaMallocHost(&memory, bytes), "cudaMallocHost");
    return memory;
  }
  void free_pinned(void* memory) noexcept { cudaFreeHost(memory); }
  void* alloc(size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    return memory;
  }
  void free(void* memory) noexcept { cudaFree(memory); }

  // Non-blocking, because the default stream, on which torch computes, would wait for every copy.
  void* create_stream() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    return stream;
  }
  void destroy_stream(void* stream) noexcept {
    if (stream != nullptr) cudaStreamDestroy(static_cast<cudaStream_t>(stream));
  }
  void* create_event() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    return event;
  }
  void destroy_event(void* event) noexcept {
    if (event != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event));
  }

  void copy_to_device_async(void* to, const void* from, size_t bytes, void* stream) {
    copy(to, from, bytes, cudaMemcpyHostToDevice, stream);
  }
  void copy_to_host_async(void* to, const void* from, size_t bytes, void* stream) {
    copy(to, from, bytes, cudaMemcpyDeviceToHost, stream);
  }
  void segment_sums(const float* values, const int64_t* offsets, int64_t leaves, double* sums,
                    void* stream) {
    if (leaves == 0) return;  // an empty grid is an error
    constexpr int64_t per_block = kBlock / kLanes;
    const int64_t blocks = (leaves + per_block - 1) / per_block;
    if (blocks > INT32_MAX) throw std::length_error("too many leaves for a CUDA grid");
    sum_segments<<<static_cast<unsigned>(blocks), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(
        values, offsets, leaves, sums);
    check(cudaGetLastError(), "sum_segments");
  }

  void record(void* event, void* stream) {
    check(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)),
          "cudaEventRecord");
  }
  void stream_wait(void* stream, void* event) {
    const auto waited = static_cast<cudaEvent_t>(event);
    check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), waited, 0), "cudaStreamWaitEvent");
  }
  void synchronize(void* event) {
    check(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "cudaEventSynchronize");
  }

  int index;

 private:
  static void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, void* stream) {
    check(cudaMemcpyAsync(to, from, bytes, kind, static_cast<cudaStream_t>(stream)),
          "cudaMemcpyAsync");
  }
};

}  // namespace

std::unique_ptr<Staging> make_cuda_staging(int device, int slots) {
  const CudaDevice cuda(device);
  const CudaDevice::Current current(cuda);
  // Fails here instead of at the first push if the kernel was not compiled for this device.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, sum_segments), "sum_segments");
  return std::make_unique<StagingRing<CudaDevice>>(slots, cuda);
}

const char* cuda_architectures() { return REALIGN_CUDA_ARCHITECTURES; }

}  // namespace realign
