// Element types and packing for gemm.cpp, included only there and compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "gemm/gemm_amx.h"

namespace realign {
namespace {

constexpr int64_t kSteps = 256;   // steps of k in a block
constexpr int64_t kAmxRow = kSteps * 4 + 64;  // bytes of a packed row, padded for cache sets

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

struct F32 {
  using Element = float;
  static constexpr int per_step = 1;
  static constexpr bool amx = false;
  static constexpr int64_t rows = 6, block_rows = 258;  // rows of a in a tile, and in a block
  static __m512 multiply_add(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
};

struct Bf16 {
  using Element = uint16_t;
  static constexpr int per_step = 2;
  static constexpr bool amx = false;
  static constexpr int64_t rows = 6, block_rows = 258;
  static __m512 multiply_add(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

struct Amx : Bf16 {
  static constexpr bool amx = true;
  static constexpr int64_t rows = 32, block_rows = 256;
};

// A growing, 64-byte aligned buffer, one per thread.
class Scratch {
 public:
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// Transposes a 16 x 16 matrix of 4-byte values: `lines` lines of `source`, `stride` bytes apart,
// become columns. Each line has `bytes` valid bytes (at most 64). Other bytes and lines are 0.
void transpose(const char* source, int64_t stride, int lines, int bytes, float* out, int out_row) {
  const __mmask64 valid = bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) {
    r[i] = i < lines ? _mm512_maskz_loadu_epi8(valid, source + i * stride) : _mm512_setzero_si512();
  }
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  const int steps = (bytes + 3) / 4;
  for (int i = 0; i < 8; ++i) {
    const __m512i first = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    const __m512i second = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    if (i < steps) _mm512_storeu_si512(out + i * out_row, first);
    if (i + 8 < steps) _mm512_storeu_si512(out + (i + 8) * out_row, second);
  }
}

// `lines` lines (columns of b), contiguous in k -> out[step][line], with `width` lines per step.
template <class T>
void pack_k_contiguous(const typename T::Element* source, int64_t stride, int64_t lines,
                       int64_t elements, int64_t width, float* out) {
  const int64_t size = sizeof(typename T::Element);
  for (int64_t line = 0; line < width; line += 16) {
    const int count = static_cast<int>(std::clamp<int64_t>(lines - line, 0, 16));
    const char* from = reinterpret_cast<const char*>(source + line * stride);
    for (int64_t byte = 0; byte < elements * size; byte += 64) {
      const int bytes = static_cast<int>(std::min<int64_t>(64, elements * size - byte));
      transpose(from + byte, stride * size, count, bytes, out + byte / 4 * width + line,
                static_cast<int>(width));
    }
  }
}

// `elements` lines of k, each contiguous over `columns` -> out[step][column], with `width` columns
// per step.
template <class T>
void pack_k_strided(const typename T::Element* source, int64_t stride, int64_t columns,
                    int64_t elements, int64_t width, float* out) {
  if constexpr (T::per_step == 1) {
    for (int64_t k = 0; k < elements; ++k) {
      std::memcpy(out + k * width, source + k * stride, columns * sizeof(float));
      std::fill(out + k * width + columns, out + (k + 1) * width, 0.0f);
    }
  } else {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; ++i) {  // interleaves two lines: a0 b0 a1 b1 ...
      low[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
      high[i] = static_cast<uint16_t>(16 + i / 2 + (i % 2) * 32);
    }
    const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
    for (int64_t k = 0; k < elements; k += 2) {
      const uint16_t* line = source + k * stride;
      float* to = out + k / 2 * width;
      for (int64_t column = 0; column < width; column += 32) {
        const int64_t left = std::clamp<int64_t>(columns - column, 0, 32);
        const __mmask32 valid = left == 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
        const __m512i a = _mm512_maskz_loadu_epi16(valid, line + column);
        const __m512i b = k + 1 < elements ? _mm512_maskz_loadu_epi16(valid, line + stride + column)
                                           : _mm512_setzero_si512();
        _mm512_storeu_si512(to + column, _mm512_permutex2var_epi16(a, to_low, b));
        _mm512_storeu_si512(to + column + 16, _mm512_permutex2var_epi16(a, to_high, b));
      }
    }
  }
}

// `rows` lines of k -> rows of kAmxRow bytes, 0 from `elements` to the end of the last tile.
// `scratch` has `width` lines per step. It is used if `column` is not 1.
void pack_rows(const uint16_t* source, int64_t row, int64_t column, int64_t rows, int64_t elements,
               int64_t width, float* scratch, char* out) {
  const int64_t bytes = elements * 2, padded = (bytes + 63) / 64 * 64;
  if (column == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(out + i * kAmxRow, source + i * row, bytes);
      std::memset(out + i * kAmxRow + bytes, 0, padded - bytes);
    }
    return;
  }
  pack_k_strided<Bf16>(source, column, rows, elements, width, scratch);
  for (int64_t byte = 0; byte < padded; byte += 64) {
    const int steps = static_cast<int>(std::min<int64_t>(16, (bytes - byte + 3) / 4));
    for (int64_t i = 0; i < rows; i += 16) {
      transpose(reinterpret_cast<const char*>(scratch + byte / 4 * width + i), width * 4, steps, 64,
                reinterpret_cast<float*>(out + i * kAmxRow + byte), kAmxRow / 4);
    }
  }
}

}  // namespace
}  // namespace realign
