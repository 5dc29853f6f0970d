// A device for tests of the staging ring. Enqueued operations run at random times that their stream
// and events allow. A ring with a missing dependency then returns wrong numbers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "staging/segments.h"

namespace realign {

// Streams are queues. An operation may run whenever another is enqueued or waited for. New memory
// is poisoned.
struct World {
  struct Operation {
    std::function<void()> run;
    void* event = nullptr;  // a wait: the event must have reached `ticket`
    int64_t ticket = 0;
  };
  using Stream = std::deque<Operation>;
  struct Event {
    int64_t recorded = 0, reached = 0;  // numbers of the last record enqueued, and of the last run
  };

  explicit World(unsigned seed) : random(seed) {}
  World(const World&) = delete;

  Stream* create_stream() {
    streams.push_back(std::make_unique<Stream>());
    return streams.back().get();
  }

  void enqueue(void* stream, Operation operation) {
    if (fail_in > 0 && --fail_in == 0) throw std::runtime_error("the device fails");
    static_cast<Stream*>(stream)->push_back(std::move(operation));
    for (auto steps = random() % 4; steps > 0; --steps) run_any();
  }

  bool run_any() {
    std::vector<Stream*> able;
    for (auto& stream : streams) {
      if (stream->empty()) continue;
      const Operation& next = stream->front();
      const bool waits = next.event && static_cast<Event*>(next.event)->reached < next.ticket;
      if (!waits) able.push_back(stream.get());
    }
    if (able.empty()) return false;
    Stream& stream = *able[random() % able.size()];
    const Operation operation = std::move(stream.front());
    stream.pop_front();
    if (operation.run) operation.run();
    return true;
  }

  // Whether everything was freed. Runs remaining operations, so that the sanitizer detects a use of
  // freed memory.
  bool drained() {
    while (run_any()) continue;
    for (const auto& stream : streams) live += static_cast<int>(stream->size());  // can never run
    return live == 0;
  }

  std::mt19937 random;
  int fail_in = 0;  // The n-th next operation fails to be enqueued. 0 for none.
  int allocations_left = 1 << 30;
  int live = 0;     // Allocations, streams of the ring and events that were not freed.
  std::vector<std::unique_ptr<Stream>> streams;
};

struct DeferredDevice {
  struct Current {
    explicit Current(const DeferredDevice&) {}
  };

  World* world;

  void* alloc(size_t bytes) {
    if (world->allocations_left-- == 0) throw std::bad_alloc();
    ++world->live;
    void* memory = ::operator new(bytes);
    std::memset(memory, 0x7f, bytes);
    return memory;
  }
  void free(void* memory) noexcept {
    if (memory == nullptr) return;
    --world->live;
    ::operator delete(memory);
  }
  void* alloc_pinned(size_t bytes) { return alloc(bytes); }
  void free_pinned(void* memory) noexcept { free(memory); }

  void* create_stream() {
    ++world->live;
    return world->create_stream();
  }
  void destroy_stream(void*) noexcept { --world->live; }  // World keeps the stream and its queue
  void* create_event() {
    ++world->live;
    return new World::Event;
  }
  void destroy_event(void* event) noexcept {
    --world->live;
    delete static_cast<World::Event*>(event);
  }

  void copy_to_device_async(void* to, const void* from, size_t bytes, void* stream) {
    world->enqueue(stream, {[=] { std::memcpy(to, from, bytes); }});
  }
  void copy_to_host_async(void* to, const void* from, size_t bytes, void* stream) {
    copy_to_device_async(to, from, bytes, stream);
  }
  void segment_sums(const float* values, const int64_t* offsets, int64_t leaves, double* sums,
                    void* stream) {
    const auto kernel = [=] {
      for (int64_t leaf = 0; leaf < leaves; ++leaf) {
        // Offsets that were not copied yet could point anywhere.
        const bool there = offsets[leaf] >= 0 && offsets[leaf + 1] < (1 << 20);
        sums[leaf] = there ? segment_sum(values, offsets[leaf], offsets[leaf + 1]) : NAN;
      }
    };
    world->enqueue(stream, {kernel});
  }
  void record(void* event, void* stream) {
    auto* recorded = static_cast<World::Event*>(event);
    const int64_t ticket = recorded->recorded + 1;
    world->enqueue(stream, {[=] { recorded->reached = ticket; }});
    recorded->recorded = ticket;
  }
  void stream_wait(void* stream, void* event) {
    const int64_t ticket = static_cast<World::Event*>(event)->recorded;
    world->enqueue(stream, {nullptr, event, ticket});
  }
  void synchronize(void* event) {
    const auto* waited = static_cast<World::Event*>(event);
    while (waited->reached < waited->recorded && world->run_any()) continue;  // else NAN
  }
};

}  // namespace realign
