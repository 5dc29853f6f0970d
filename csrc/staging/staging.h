// A ring of buffers that transfers per-token log-probs to the host as one sum per leaf, while the
// device computes the next forward. Only pop waits, for a single event.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace realign {

// One thread may push while another pops.
class Staging {
 public:
  virtual ~Staging() = default;

  // Enqueues the sums of values[offsets[i]:offsets[i + 1]] and returns before they are computed.
  // Until they are popped, only later work of the same stream may overwrite `values`. `offsets` is
  // copied.
  virtual void push(const float* values,     // (count,) on the device
                    int64_t count,
                    const int64_t* offsets,  // (leaves + 1,) on the host
                    int64_t leaves,
                    void* stream) = 0;

  // Returns the sums (leaves,) of the oldest push that was not popped.
  virtual std::vector<double> pop() = 0;

  virtual int pending() const = 0;
  virtual int slots() const = 0;
};

// HostDevice in staging_host.cpp lists the operations of Device. Streams and events are opaque
// handles. Operations on a stream may throw, but free and destroy functions may not.
template <class Device>
class StagingRing final : public Staging {
 public:
  StagingRing(int slots, Device device) : StagingRing(std::move(device)) {
    // The delegated constructor has returned, so the destructor runs even if this one throws.
    if (slots < 1) {
      throw std::invalid_argument("slots must be at least 1, got " + std::to_string(slots));
    }
    const typename Device::Current current(device_);
    slots_.resize(static_cast<size_t>(slots));
    copies_ = device_.create_stream();
    for (Slot& slot : slots_) {
      slot.summed = device_.create_event();
      slot.done = device_.create_event();
    }
  }

  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  ~StagingRing() override {
    try {
      const typename Device::Current current(device_);
      for (; pending_ > 0; --pending_) wait(slots_[oldest_++ % slots_.size()].done);
      for (Slot& slot : slots_) {
        release(slot);
        device_.destroy_event(slot.summed);
        device_.destroy_event(slot.done);
      }
      device_.destroy_stream(copies_);
    } catch (...) {
      // The device is unusable, and its resources are lost.
    }
  }

  void push(const float* values,
            int64_t count,
            const int64_t* offsets,
            int64_t leaves,
            void* stream) override {
    check(offsets, leaves, count);
    const std::lock_guard<std::mutex> lock(pushing_);
    if (pending() == slots()) {
      throw std::logic_error("all " + std::to_string(slots()) +
                             " slots of the staging ring are taken. Call pop first.");
    }
    const typename Device::Current current(device_);
    Slot& slot = slots_[next_ % slots_.size()];
    if (leaves + 1 > slot.room) grow(slot, leaves + 1);
    std::copy(offsets, offsets + leaves + 1, slot.host_offsets);
    try {
      const auto size = static_cast<size_t>(leaves);
      device_.copy_to_device_async(slot.offsets, slot.host_offsets, (size + 1) * sizeof(int64_t),
                                   stream);
      device_.segment_sums(values, slot.offsets, leaves, slot.sums, stream);
      device_.record(slot.summed, stream);
      // A copy on the caller's stream would delay its next kernel.
      device_.stream_wait(copies_, slot.summed);
      device_.copy_to_host_async(slot.host_sums, slot.sums, size * sizeof(double), copies_);
      device_.record(slot.done, copies_);
    } catch (...) {
      settle(slot, stream);
      throw;
    }
    slot.leaves = leaves;
    ++next_;
    pending_.fetch_add(1, std::memory_order_release);
  }

  // If the wait fails, the slot stays taken.
  std::vector<double> pop() override {
    const std::lock_guard<std::mutex> lock(popping_);
    if (pending() == 0) throw std::logic_error("the staging ring is empty. Call push first.");
    const typename Device::Current current(device_);
    const Slot& slot = slots_[oldest_ % slots_.size()];
    device_.synchronize(slot.done);
    std::vector<double> sums(slot.host_sums, slot.host_sums + slot.leaves);
    ++oldest_;
    pending_.fetch_sub(1, std::memory_order_release);
    return sums;
  }

  int pending() const override { return pending_.load(std::memory_order_acquire); }
  int slots() const override { return static_cast<int>(slots_.size()); }

 private:
  struct Slot {
    int64_t* host_offsets = nullptr;  // (room,) pinned
    double* host_sums = nullptr;      // (room,) pinned
    int64_t* offsets = nullptr;       // (room,)
    double* sums = nullptr;           // (room,)
    int64_t room = 0;
    int64_t leaves = 0;
    void* summed = nullptr;  // Event: the caller's stream has written sums.
    void* done = nullptr;    // Event: host_sums are complete, and nothing uses the slot.
  };

  explicit StagingRing(Device device) : device_(std::move(device)) {}

  static void check(const int64_t* offsets, int64_t leaves, int64_t count) {
    bool right = offsets[0] >= 0 && offsets[leaves] <= count;
    for (int64_t i = 0; i < leaves; ++i) right = right && offsets[i] <= offsets[i + 1];
    if (!right) {
      throw std::invalid_argument("offsets must be non-decreasing and in [0, " +
                                  std::to_string(count) + "]");
    }
  }

  // Enlarges a free slot. Allocating and freeing memory may stall a device, so sizes are powers of
  // two. A slot that starts at 1024 and reaches a million leaves has been allocated 11 times.
  void grow(Slot& slot, int64_t entries) {
    int64_t room = 1024;
    while (room < entries) room *= 2;
    release(slot);
    const auto size = static_cast<size_t>(room);
    slot.host_offsets = static_cast<int64_t*>(device_.alloc_pinned(size * sizeof(int64_t)));
    slot.host_sums = static_cast<double*>(device_.alloc_pinned(size * sizeof(double)));
    slot.offsets = static_cast<int64_t*>(device_.alloc(size * sizeof(int64_t)));
    slot.sums = static_cast<double*>(device_.alloc(size * sizeof(double)));
    slot.room = room;
  }

  void release(Slot& slot) noexcept {
    slot.room = 0;
    device_.free_pinned(std::exchange(slot.host_offsets, nullptr));
    device_.free_pinned(std::exchange(slot.host_sums, nullptr));
    device_.free(std::exchange(slot.offsets, nullptr));
    device_.free(std::exchange(slot.sums, nullptr));
  }

  // Waits for the operations that a failed push has enqueued, before the slot is used again.
  void settle(Slot& slot, void* stream) noexcept {
    for (void* used : {stream, copies_}) {
      try {
        device_.record(slot.done, used);
      } catch (...) {
        continue;
      }
      wait(slot.done);
    }
  }

  void wait(void* event) noexcept {
    try {
      device_.synchronize(event);
    } catch (...) {
      // The first error is the one to report.
    }
  }

  Device device_;
  std::vector<Slot> slots_;
  void* copies_ = nullptr;  // stream of the ring, for copies to the host
  std::mutex pushing_, popping_;
  size_t next_ = 0;    // pushes so far, under pushing_
  size_t oldest_ = 0;  // pops so far, under popping_
  std::atomic<int> pending_{0};
};

}  // namespace realign
