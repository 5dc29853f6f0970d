// Blocked like BLIS, with one micro-kernel: a tile of 6 rows x 64 columns in 24 registers.
//
//   b is packed into panels of 64 columns, so that a step along k reads 4 registers in a row. bf16
//   is packed in pairs along k, which VDPBF16PS multiplies and adds two by two: a "step" is 4 bytes
//   of k, one fp32 or two bf16.
//   a is broadcast from where it lies if its rows are contiguous in k, else from a packed block.
//
// A panel of 256 steps takes 64 KiB and streams from the second-level cache. Half of that would fit
// the first, and was slower: the sums go to memory and back twice as often.
#include "gemm.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

namespace realign {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileColumns = 64;
constexpr int64_t kSteps = 256;         // of k in a block
constexpr int64_t kBlockRows = 258;     // of a: 43 tiles
constexpr int64_t kBlockColumns = 512;  // of b
constexpr int64_t kKeep = 2 << 20;      // bytes of b that a thread keeps packed

struct F32 {
  using Element = float;
  static constexpr int per_step = 1;
  static __m512 multiply_add(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
};

struct Bf16 {
  using Element = uint16_t;
  static constexpr int per_step = 2;
  static __m512 multiply_add(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

// Grows, is kept by its thread, and is 64-byte aligned.
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

// 16 x 16 matrix of 4-byte values: `lines` lines of `source`, `stride` bytes apart, become columns.
// Each line holds `bytes` valid bytes (at most 64); the rest, and missing lines, are 0.
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

// `lines` lines (columns of b) that are contiguous in k -> out[step][line], `width` lines a step.
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

// `elements` lines of k, each contiguous over `columns` -> out[step][column], `width` a step.
template <class T>
void pack_k_strided(const typename T::Element* source, int64_t stride, int64_t columns,
                    int64_t elements, int64_t width, float* out) {
  if constexpr (std::is_same_v<T, F32>) {
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

// Rows x 64 columns of c over `steps` of k. a: bytes between rows and between steps.
template <class T, int Rows>
void tile(const char* a, int64_t a_row, int64_t a_step, const float* panel, int64_t steps, float* c,
          int64_t c_row, int columns, bool accumulate) {
  __m512 sum[Rows][4];
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < steps; ++s, a += a_step, panel += kTileColumns) {
    const __m512 b0 = _mm512_load_ps(panel), b1 = _mm512_load_ps(panel + 16);
    const __m512 b2 = _mm512_load_ps(panel + 32), b3 = _mm512_load_ps(panel + 48);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      float value;
      std::memcpy(&value, a + i * a_row, sizeof(value));
      const __m512 broadcast = _mm512_set1_ps(value);
      sum[i][0] = T::multiply_add(sum[i][0], broadcast, b0);
      sum[i][1] = T::multiply_add(sum[i][1], broadcast, b1);
      sum[i][2] = T::multiply_add(sum[i][2], broadcast, b2);
      sum[i][3] = T::multiply_add(sum[i][3], broadcast, b3);
    }
  }
  for (int j = 0; j < 4; ++j) {
    const int left = std::clamp(columns - 16 * j, 0, 16);
    const auto valid = static_cast<__mmask16>((1u << left) - 1);
    for (int i = 0; i < Rows; ++i) {
      float* to = c + i * c_row + 16 * j;
      if (accumulate) sum[i][j] = _mm512_add_ps(sum[i][j], _mm512_maskz_loadu_ps(valid, to));
      _mm512_mask_storeu_ps(to, valid, sum[i][j]);
    }
  }
}

template <class T>
void tiles(const char* a, int64_t a_row, int64_t a_step, int64_t rows, const float* panel,
           int64_t steps, float* c, int64_t c_row, int columns, bool accumulate) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    tile<T, kTileRows>(a + row * a_row, a_row, a_step, panel, steps, c + row * c_row, c_row,
                       columns, accumulate);
  }
  const char* from = a + row * a_row;
  float* to = c + row * c_row;
  switch (rows - row) {
    case 1: tile<T, 1>(from, a_row, a_step, panel, steps, to, c_row, columns, accumulate); break;
    case 2: tile<T, 2>(from, a_row, a_step, panel, steps, to, c_row, columns, accumulate); break;
    case 3: tile<T, 3>(from, a_row, a_step, panel, steps, to, c_row, columns, accumulate); break;
    case 4: tile<T, 4>(from, a_row, a_step, panel, steps, to, c_row, columns, accumulate); break;
    case 5: tile<T, 5>(from, a_row, a_step, panel, steps, to, c_row, columns, accumulate); break;
    default: break;
  }
}

void round_rows(const float* sums, int64_t sums_row, int64_t rows, int64_t columns, uint16_t* out,
                int64_t out_row) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += 16) {
      const int left = static_cast<int>(std::min<int64_t>(16, columns - j));
      const auto valid = static_cast<__mmask16>((1u << left) - 1);
      const __m512 wide = _mm512_maskz_loadu_ps(valid, sums + i * sums_row + j);
      _mm256_mask_storeu_epi16(out + i * out_row + j, valid, (__m256i)_mm512_cvtneps_pbh(wide));
    }
  }
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// One thread's part of c: rows [m0, m1), columns [n0, n1).
template <class T>
class Part {
 public:
  using Element = typename T::Element;

  Part(int64_t m0, int64_t m1, int64_t n0, int64_t n1, int64_t k, Matrix a, Matrix b, Product c)
      : m0_(m0), m1_(m1), n0_(n0), n1_(n1), k_(k), a_(a), b_(b), c_(c) {}

  void run() {
    const int64_t columns = std::min(kBlockColumns, n1_ - n0_);
    // Several blocks of rows meet the same columns. Their panels are kept packed for all k where
    // they are small; else k is the outer loop, and the sums of all rows go to memory more often.
    const int64_t whole = columns * round_up(k_, kSteps * T::per_step) * int64_t{sizeof(Element)};
    const bool one_block = m1_ - m0_ <= kBlockRows;
    const bool k_outer = !one_block && !c_.half && whole > kKeep;
    keep_ = !one_block && !k_outer;
    for (int64_t jc = n0_; jc < n1_; jc += kBlockColumns) {
      columns_ = std::min(kBlockColumns, n1_ - jc);
      if (k_outer) {
        for (int64_t pc = 0; pc < k_; pc += depth(pc)) {
          for (int64_t ic = m0_; ic < m1_; ic += kBlockRows) multiply(ic, jc, pc);
        }
      } else {
        for (int64_t ic = m0_; ic < m1_; ic += kBlockRows) {
          for (int64_t pc = 0; pc < k_; pc += depth(pc)) multiply(ic, jc, pc);
          if (c_.half) finish(ic, jc);
        }
      }
    }
  }

 private:
  // Elements of k from pc in one block. The last bf16 of an odd k has no partner in memory: it is a
  // block of its own, whose packed copy has a zero beside it.
  int64_t depth(int64_t pc) const {
    const int64_t even = k_ / T::per_step * T::per_step;
    return pc < even ? std::min(kSteps * T::per_step, even - pc) : k_ - pc;
  }

  int64_t rows(int64_t ic) const { return std::min(kBlockRows, m1_ - ic); }

  // Where the sums of a block go, and the floats between their rows.
  float* sums(int64_t ic, int64_t jc, int64_t& row) const {
    static thread_local Scratch scratch;
    row = c_.half ? kBlockColumns : c_.row;
    if (c_.half) return reinterpret_cast<float*>(scratch.reserve(kBlockRows * row * 4));
    return static_cast<float*>(c_.data) + ic * c_.row + jc;
  }

  void multiply(int64_t ic, int64_t jc, int64_t pc) const {
    static thread_local Scratch scratch_a, scratch_b;
    const int64_t elements = depth(pc), steps = (elements + T::per_step - 1) / T::per_step;
    const auto* a = static_cast<const Element*>(a_.data) + ic * a_.row + pc * a_.column;
    const char* from = reinterpret_cast<const char*>(a);
    int64_t a_row = a_.row * int64_t{sizeof(Element)}, a_step = 4;
    if (a_.column != 1 || elements % T::per_step != 0) {
      const int64_t width = round_up(kBlockRows, 32);
      auto* packed = reinterpret_cast<float*>(scratch_a.reserve(width * kSteps * 4));
      if (a_.column == 1) {
        pack_k_contiguous<T>(a, a_.row, rows(ic), elements, width, packed);
      } else {
        pack_k_strided<T>(a, a_.column, rows(ic), elements, width, packed);
      }
      from = reinterpret_cast<const char*>(packed);
      a_row = 4;
      a_step = width * 4;
    }

    const int64_t panels = (columns_ + kTileColumns - 1) / kTileColumns;
    const int64_t steps_kept = keep_ ? round_up(k_, kSteps * T::per_step) / T::per_step : kSteps;
    const int64_t per_panel = steps_kept * kTileColumns;
    auto* packed_b = reinterpret_cast<float*>(scratch_b.reserve(panels * per_panel * 4));
    int64_t sums_row;
    float* to = sums(ic, jc, sums_row);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = p * kTileColumns;
      const int64_t width = std::min<int64_t>(kTileColumns, columns_ - column);
      float* panel = packed_b + p * per_panel + (keep_ ? pc / T::per_step * kTileColumns : 0);
      if (ic == m0_) {
        const auto* b = static_cast<const Element*>(b_.data) + pc * b_.row;
        b += (jc + column) * b_.column;
        if (b_.row == 1) {
          pack_k_contiguous<T>(b, b_.column, width, elements, kTileColumns, panel);
        } else {
          pack_k_strided<T>(b, b_.row, width, elements, kTileColumns, panel);
        }
      }
      tiles<T>(from, a_row, a_step, rows(ic), panel, steps, to + column, sums_row,
               static_cast<int>(width), c_.accumulate || pc > 0);
    }
  }

  void finish(int64_t ic, int64_t jc) const {
    int64_t row;
    const float* from = sums(ic, jc, row);
    round_rows(from, row, rows(ic), columns_, static_cast<uint16_t*>(c_.data) + ic * c_.row + jc,
               c_.row);
  }

  const int64_t m0_, m1_, n0_, n1_, k_;
  const Matrix a_, b_;
  const Product c_;
  bool keep_ = false;
  int64_t columns_ = 0;
};

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads) {
  threads = std::max(threads, 1);
  if (m == 0 || n == 0) return;
  if (k == 0) {
    const size_t size = c.half ? sizeof(uint16_t) : sizeof(float);
    for (int64_t i = 0; i < m && !c.accumulate; ++i) {
      std::memset(static_cast<char*>(c.data) + i * c.row * size, 0, n * size);
    }
    return;
  }
  // The grid of threads over c that packs least: each packs its rows of a and columns of b.
  int64_t down = 1;
  for (int64_t d = 2; d <= threads; ++d) {
    const auto packed = [&](int64_t rows) { return m / rows + n / (threads / rows); };
    if (threads % d == 0 && packed(d) < packed(down)) down = d;
  }
  const int64_t across = threads / down;
  const int64_t tall = round_up((m + down - 1) / down, kTileRows);
  const int64_t wide = round_up((n + across - 1) / across, kTileColumns);
  std::atomic<bool> out_of_memory{false};  // an exception must not leave a parallel region
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t m0 = part / across * tall, n0 = part % across * wide;
    if (m0 >= m || n0 >= n) continue;
    const int64_t m1 = std::min(m, m0 + tall), n1 = std::min(n, n0 + wide);
    try {
      Part<T>(m0, m1, n0, n1, k, a, b, c).run();
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

void gemm_bf16(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads) {
  gemm<Bf16>(m, n, k, a, b, c, threads);
}

void gemm_f32(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads) {
  gemm<F32>(m, n, k, a, b, c, threads);
}

}  // namespace realign
