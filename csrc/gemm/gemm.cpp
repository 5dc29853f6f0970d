// A GEMM with the blocking of BLIS. Every thread has a MacroKernel, which packs blocks of a and b
// and runs the micro-kernel over them: 6 rows x 64 columns of c in 24 registers. bf16 on a CPU with
// AMX uses the micro-kernel of gemm_amx.cpp, 32 x 32.
//
// A "step" along k is 4 bytes: one fp32 or two bf16. VDPBF16PS multiplies and adds pairs of bf16.
//
//   pack_b writes panels of 64 columns, so that a step reads 4 consecutive registers.
//   pack_a leaves a in place if its rows are contiguous in k. The micro-kernel broadcasts from it.
//
// A panel of 256 steps takes 64 KiB and streams from the second-level cache. A panel of half the
// size would fit into the first-level cache, but was slower: the sums go to memory and back twice
// as often.
#include "gemm/gemm.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "cpu.h"
#include "gemm/gemm_pack.h"

namespace realign {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileColumns = kPanelColumns;
constexpr int64_t kBlockColumns = 512;  // columns of b in a block
constexpr int64_t kKeep = 2 << 20;      // bytes of b that a thread keeps packed

// Rows of a in the layout of the micro-kernel.
struct PackedA {
  const char* data;
  int64_t row, step;  // bytes between rows, and between steps
};

// Computes Rows x 64 columns of c over `steps` of k.
template <class T, int Rows>
void micro_kernel(PackedA a, const float* panel, int64_t steps, float* c, int64_t c_row,
                  int columns, bool accumulate) {
  __m512 sum[Rows][4];
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < steps; ++s, a.data += a.step, panel += kTileColumns) {
    const __m512 b0 = _mm512_load_ps(panel), b1 = _mm512_load_ps(panel + 16);
    const __m512 b2 = _mm512_load_ps(panel + 32), b3 = _mm512_load_ps(panel + 48);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      float value;
      std::memcpy(&value, a.data + i * a.row, sizeof(value));
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
void micro_kernels(PackedA a, int64_t rows, const float* panel, int64_t steps, float* c,
                   int64_t c_row, int columns, bool accumulate) {
  for (; rows >= kTileRows; rows -= kTileRows, c += kTileRows * c_row) {
    micro_kernel<T, kTileRows>(a, panel, steps, c, c_row, columns, accumulate);
    a.data += kTileRows * a.row;
  }
  switch (rows) {
    case 1: micro_kernel<T, 1>(a, panel, steps, c, c_row, columns, accumulate); break;
    case 2: micro_kernel<T, 2>(a, panel, steps, c, c_row, columns, accumulate); break;
    case 3: micro_kernel<T, 3>(a, panel, steps, c, c_row, columns, accumulate); break;
    case 4: micro_kernel<T, 4>(a, panel, steps, c, c_row, columns, accumulate); break;
    case 5: micro_kernel<T, 5>(a, panel, steps, c, c_row, columns, accumulate); break;
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

// One thread's part of c: rows [m0, m1), columns [n0, n1).
template <class T>
class MacroKernel {
 public:
  using Element = typename T::Element;

  MacroKernel(int64_t m0, int64_t m1, int64_t n0, int64_t n1, int64_t k, Matrix a, Matrix b,
              Product c)
      : m0_(m0), m1_(m1), n0_(n0), n1_(n1), k_(k), a_(a), b_(b), c_(c) {}

  void run() {
    const int64_t columns = std::min(kBlockColumns, n1_ - n0_);
    // Several blocks of rows use the same columns. Small panels stay packed for all k. For large
    // panels k is the outer loop, and the sums of all rows go to memory more often.
    const int64_t whole = columns * round_up(k_, kSteps * T::per_step) * int64_t{sizeof(Element)};
    const bool one_block = m1_ - m0_ <= T::block_rows;
    const bool k_outer = !one_block && !c_.half && whole > kKeep;
    keep_ = !one_block && !k_outer;
    for (int64_t jc = n0_; jc < n1_; jc += kBlockColumns) {
      columns_ = std::min(kBlockColumns, n1_ - jc);
      if (k_outer) {
        for (int64_t pc = 0; pc < k_; pc += depth(pc)) {
          for (int64_t ic = m0_; ic < m1_; ic += T::block_rows) multiply(ic, jc, pc);
        }
      } else {
        for (int64_t ic = m0_; ic < m1_; ic += T::block_rows) {
          for (int64_t pc = 0; pc < k_; pc += depth(pc)) multiply(ic, jc, pc);
          if (c_.half) round_block(ic, jc);
        }
      }
    }
  }

 private:
  // Number of elements of k in the block that starts at pc. The last bf16 of an odd k has no
  // partner in memory. If a is not packed, this element is a separate block, packed with a zero.
  int64_t depth(int64_t pc) const {
    if (T::amx) return std::min(kSteps * T::per_step, k_ - pc);
    const int64_t even = k_ / T::per_step * T::per_step;
    return pc < even ? std::min(kSteps * T::per_step, even - pc) : k_ - pc;
  }

  int64_t rows(int64_t ic) const { return std::min(T::block_rows, m1_ - ic); }

  // Address of the sums of a block. `row` is the number of floats between rows.
  float* sums(int64_t ic, int64_t jc, int64_t& row) const {
    static thread_local Scratch scratch;
    row = c_.half ? kBlockColumns : c_.row;
    if (c_.half) return reinterpret_cast<float*>(scratch.reserve(T::block_rows * row * 4));
    return static_cast<float*>(c_.data) + ic * c_.row + jc;
  }

  // The block of a at (ic, pc), in place if its rows are contiguous in k, else packed.
  PackedA pack_a(int64_t ic, int64_t pc, int64_t elements) const {
    static thread_local Scratch steps, lines;
    const auto* a = static_cast<const Element*>(a_.data) + ic * a_.row + pc * a_.column;
    const int64_t width = round_up(T::block_rows, 32);
    const bool contiguous = a_.column == 1;
    if (!T::amx && contiguous && elements % T::per_step == 0) {
      return {reinterpret_cast<const char*>(a), a_.row * int64_t{sizeof(Element)}, 4};
    }
    float* packed = nullptr;
    if (!T::amx || !contiguous) {
      packed = reinterpret_cast<float*>(steps.reserve(width * kSteps * 4));
    }
    if constexpr (T::amx) {
      char* to = lines.reserve(width * kAmxRow);
      pack_rows(a, a_.row, a_.column, rows(ic), elements, width, packed, to);
      return {to, kAmxRow, 4};
    }
    if (contiguous) {
      pack_k_contiguous<T>(a, a_.row, rows(ic), elements, width, packed);
    } else {
      pack_k_strided<T>(a, a_.column, rows(ic), elements, width, packed);
    }
    return {reinterpret_cast<const char*>(packed), 4, width * 4};
  }

  // Packs columns of b, starting at `column` and pc, into a panel of `steps`, with 0 beyond b.
  void pack_b(int64_t pc, int64_t column, int columns, int64_t elements, int64_t steps,
              float* panel) const {
    const auto* b = static_cast<const Element*>(b_.data) + pc * b_.row + column * b_.column;
    if (b_.row == 1) {
      pack_k_contiguous<T>(b, b_.column, columns, elements, kTileColumns, panel);
    } else {
      pack_k_strided<T>(b, b_.row, columns, elements, kTileColumns, panel);
    }
    const int64_t packed = (elements + T::per_step - 1) / T::per_step;
    std::fill(panel + packed * kTileColumns, panel + steps * kTileColumns, 0.0f);
  }

  void multiply(int64_t ic, int64_t jc, int64_t pc) const {
    static thread_local Scratch scratch;
    const int64_t elements = depth(pc), whole = (elements + T::per_step - 1) / T::per_step;
    const int64_t steps = T::amx ? round_up(whole, kAmxSteps) : whole;
    const PackedA a = pack_a(ic, pc, elements);
    const int64_t panels = (columns_ + kTileColumns - 1) / kTileColumns;
    const int64_t steps_kept = keep_ ? round_up(k_, kSteps * T::per_step) / T::per_step : kSteps;
    const int64_t per_panel = steps_kept * kTileColumns;
    auto* packed_b = reinterpret_cast<float*>(scratch.reserve(panels * per_panel * 4));
    int64_t sums_row;
    float* to = sums(ic, jc, sums_row);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t column = p * kTileColumns;
      const int columns = static_cast<int>(std::min<int64_t>(kTileColumns, columns_ - column));
      float* panel = packed_b + p * per_panel + (keep_ ? pc / T::per_step * kTileColumns : 0);
      if (ic == m0_) pack_b(pc, jc + column, columns, elements, steps, panel);
      const bool accumulate = c_.accumulate || pc > 0;
      if constexpr (T::amx) {
        amx_micro_kernels(a.data, a.row, rows(ic), panel, steps, to + column, sums_row, columns,
                          accumulate);
      } else {
        micro_kernels<T>(a, rows(ic), panel, steps, to + column, sums_row, columns, accumulate);
      }
    }
  }

  void round_block(int64_t ic, int64_t jc) const {
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
  // Chooses the grid of threads over c with the least packing. Each thread packs its rows of a and
  // columns of b.
  int64_t down = 1;
  for (int64_t d = 2; d <= threads; ++d) {
    const auto packed = [&](int64_t rows) { return m / rows + n / (threads / rows); };
    if (threads % d == 0 && packed(d) < packed(down)) down = d;
  }
  const int64_t across = threads / down;
  const int64_t tall = round_up((m + down - 1) / down, T::rows);
  const int64_t wide = round_up((n + across - 1) / across, kTileColumns);
  std::atomic<bool> out_of_memory{false};  // an exception must not leave a parallel region
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t m0 = part / across * tall, n0 = part % across * wide;
    if (m0 >= m || n0 >= n) continue;
    const int64_t m1 = std::min(m, m0 + tall), n1 = std::min(n, n0 + wide);
    try {
      MacroKernel<T>(m0, m1, n0, n1, k, a, b, c).run();
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
    if constexpr (T::amx) amx_release();
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

void gemm_bf16(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads) {
  if (cpu().amx) return gemm<Amx>(m, n, k, a, b, c, threads);
  gemm<Bf16>(m, n, k, a, b, c, threads);
}

void gemm_f32(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads) {
  gemm<F32>(m, n, k, a, b, c, threads);
}

}  // namespace realign
