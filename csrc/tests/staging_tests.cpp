// Tests the staging ring over a device with deferred operations. tests/csrc/test_csrc.py runs it
// under sanitizers. tests/refcache/test_staging.py tests the sums. Exits with 1 on a failure.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "deferred_device.h"
#include "staging/segments.h"
#include "staging/staging.h"

using namespace realign;

namespace {

using Ring = StagingRing<DeferredDevice>;

// One forward, whose values exist only in stream order. Before the forward and after the push, the
// same memory holds NaN.
struct Forward {
  Forward(World& world, int64_t most) {
    const auto leaves = static_cast<int64_t>(world.random() % (most + 1));
    offsets.push_back(world.random() % 3);
    for (int64_t leaf = 0; leaf < leaves; ++leaf) {
      offsets.push_back(offsets.back() + world.random() % 70);
    }
    std::uniform_real_distribution<float> logp(-9, 0);
    truth.resize(offsets.back() + world.random() % 3);
    for (float& value : truth) value = logp(world.random);
    values.assign(truth.size(), NAN);
    for (int64_t leaf = 0; leaf < leaves; ++leaf) {
      sums.push_back(segment_sum(truth.data(), offsets[leaf], offsets[leaf + 1]));
    }
  }

  void push(World& world, Ring& ring, void* stream) {
    world.enqueue(stream, {[this] { values = truth; }});
    std::vector<int64_t> passing = offsets;
    ring.push(values.data(), static_cast<int64_t>(values.size()), passing.data(),
              static_cast<int64_t>(passing.size()) - 1, stream);
    std::fill(passing.begin(), passing.end(), -1);  // the ring has its own copy
    world.enqueue(stream, {[this] { values.assign(values.size(), NAN); }});
  }

  std::vector<int64_t> offsets;
  std::vector<float> truth, values;
  std::vector<double> sums;
};

// The number of errors in one random history of a ring.
int history(unsigned seed) {
  World world(seed);
  void* computes[] = {world.create_stream(), world.create_stream()};
  std::deque<std::unique_ptr<Forward>> forwards;  // all outlive the ring and the queues
  size_t oldest = 0;
  int wrong = 0;
  {
    Ring ring(1 + static_cast<int>(world.random() % 4), DeferredDevice{&world});
    for (int step = 0; step < 30; ++step) {
      const int pending = static_cast<int>(forwards.size() - oldest);
      wrong += ring.pending() != pending;
      if (pending < ring.slots() && (pending == 0 || world.random() % 2)) {
        // Some forwards make the slot grow, possibly several times.
        const int64_t most = world.random() % 8 ? 20 : 1000 << (world.random() % 3);
        forwards.push_back(std::make_unique<Forward>(world, most));
        forwards.back()->push(world, ring, computes[world.random() % 2]);
      } else {
        wrong += ring.pop() != forwards[oldest++]->sums;
      }
    }
  }  // destroys the ring with its pending pushes
  return wrong + !world.drained();
}

// After a failure of any operation of a push, the next use of the slot is correct. Nothing leaks.
void test_failures() {
  for (unsigned seed = 0; seed < 120; ++seed) {
    const int fail_in = 2 + static_cast<int>(seed % 6);  // operation 1 belongs to the forward
    World world(seed);
    void* compute = world.create_stream();
    void* other = world.create_stream();
    Forward first(world, 9), lost(world, 9), last(world, 9);
    {
      Ring ring(2, DeferredDevice{&world});
      first.push(world, ring, compute);
      world.fail_in = fail_in;
      expect(thrown([&] { lost.push(world, ring, compute); }) == "the device fails", "push throws");
      expect(ring.pop() == first.sums && ring.pending() == 0, "the push before a failure");
      if (seed % 5 != 0) {  // for every fifth seed, the ring is destroyed right after the failure
        last.push(world, ring, other);
        expect(ring.pop() == last.sums, "after a failure of operation " + std::to_string(fail_in));
      }
    }
    expect(world.drained(), "all memory is freed after a failure");
  }
  for (int left = 0; left < 4; ++left) {
    World world(8);
    void* compute = world.create_stream();
    Forward lost(world, 9), last(world, 9);
    {
      Ring ring(1, DeferredDevice{&world});
      world.allocations_left = left;
      expect(thrown([&] { lost.push(world, ring, compute); }) == "std::bad_alloc", "no memory");
      world.allocations_left = 4;
      last.push(world, ring, compute);
      expect(ring.pop() == last.sums, "after memory ran out");
    }
    expect(world.drained(), "all memory is freed after memory ran out");
  }
}

}  // namespace

int main() {
  // Most of these seeds detect a ring with a missing dependency.
  for (unsigned seed = 0; seed < 60; ++seed) {
    expect(history(seed) == 0, "ring, seed " + std::to_string(seed));
  }
  test_failures();
  return report();
}
