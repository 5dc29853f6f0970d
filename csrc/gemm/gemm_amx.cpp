#include "gemm/gemm_amx.h"

#include <algorithm>

#if defined(REALIGN_AMX) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace realign {

namespace {

constexpr int kSide = 16;  // rows of a tile, and its columns of 4 bytes

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int columns) {
    if (tile_rows == 0 || columns == 0) return;
    rows[tile] = static_cast<uint8_t>(tile_rows);
    bytes[tile] = static_cast<uint16_t>(4 * columns);
  }
};

// Tiles: c is 0 1 / 2 3, a is 4 / 5, b is 6 7.
void configure(int rows, int columns) {
  Config config;
  for (int i = 0; i < 2; ++i) {
    const int tall = std::clamp(rows - kSide * i, 0, kSide);
    const int wide = std::clamp(columns - kSide * i, 0, kSide);
    config.set(4 + i, tall, kAmxSteps);
    config.set(6 + i, kAmxSteps, wide);
    for (int j = 0; j < 2; ++j) {
      config.set(2 * i + j, tall, std::clamp(columns - kSide * j, 0, kSide));
    }
  }
  // GCC 12 assumes that _tile_loadconfig reads 8 bytes, and may drop the other bytes of `config`.
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

template <bool Tall, bool Wide>
void micro_kernel(const char* a, int64_t a_row, const float* b, int64_t steps, float* c,
                  int64_t c_row, bool accumulate) {
  const int64_t row = c_row * 4;
  float* below = c + kSide * c_row;
  if (accumulate) {
    _tile_loadd(0, c, row);
    if (Wide) _tile_loadd(1, c + kSide, row);
    if (Tall) _tile_loadd(2, below, row);
    if (Tall && Wide) _tile_loadd(3, below + kSide, row);
  } else {
    _tile_zero(0);
    if (Wide) _tile_zero(1);
    if (Tall) _tile_zero(2);
    if (Tall && Wide) _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s += kAmxSteps) {
    _tile_loadd(6, b, 4 * kPanelColumns);
    _tile_loadd(4, a, a_row);
    _tile_dpbf16ps(0, 4, 6);
    if (Wide) {
      _tile_loadd(7, b + kSide, 4 * kPanelColumns);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (Tall) {
      _tile_loadd(5, a + kSide * a_row, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if (Wide) _tile_dpbf16ps(3, 5, 7);
    }
    a += 4 * kAmxSteps;
    b += kAmxSteps * kPanelColumns;
  }
  _tile_stored(0, c, row);
  if (Wide) _tile_stored(1, c + kSide, row);
  if (Tall) _tile_stored(2, below, row);
  if (Tall && Wide) _tile_stored(3, below + kSide, row);
}

}  // namespace

bool amx_granted() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

void amx_micro_kernels(const char* a, int64_t a_row, int64_t rows, const float* panel,
                       int64_t steps, float* c, int64_t c_row, int columns, bool accumulate) {
  int shape = 0;
  for (int column = 0; column < columns; column += 2 * kSide) {
    const int wide = std::min(2 * kSide, columns - column);
    for (int64_t row = 0; row < rows; row += 2 * kSide) {
      const int tall = static_cast<int>(std::min<int64_t>(2 * kSide, rows - row));
      if (shape != tall * kPanelColumns + wide) configure(tall, wide);
      shape = tall * kPanelColumns + wide;
      const bool below = tall > kSide, right = wide > kSide;
      const auto kernel = below ? (right ? micro_kernel<true, true> : micro_kernel<true, false>)
                                : (right ? micro_kernel<false, true> : micro_kernel<false, false>);
      kernel(a + row * a_row, a_row, panel + column, steps, c + row * c_row + column, c_row,
             accumulate);
    }
  }
}

void amx_release() { _tile_release(); }

}  // namespace realign

#else

namespace realign {

bool amx_granted() { return false; }
void amx_micro_kernels(const char*, int64_t, int64_t, const float*, int64_t, float*, int64_t, int,
                       bool) {}
void amx_release() {}

}  // namespace realign

#endif
