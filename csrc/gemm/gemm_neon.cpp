// gemm_bf16 of gemm.h for aarch64. It uses BFMMLA, which multiplies 2 x 4 by 4 x 2 and adds to 2 x
// 2 fp32 sums.
//
//   A task is a block of c, 256 x 256. It packs a and b for 512 values of k at a time. Packed
//   groups of 8 lines have 4 consecutive values of k per line, so that a register holds 2 lines.
//   The micro-kernel computes a tile of 8 x 8 in 16 registers. The sums stay in register order,
//   padded to whole tiles. After the last k they are reordered and rounded.
//
// Compiled for BF16 and called only if the CPU has it. So nothing here may be inline and shared
// with other files.
#include <arm_neon.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "gemm/gemm.h"

namespace realign {
namespace {

constexpr int64_t kTile = 8;  // rows of a, columns of b
constexpr int64_t kStep = 4;  // values of k
constexpr int64_t kBlock = 256, kDepth = 512;

struct Block {
  uint16_t a[kBlock * kDepth], b[kBlock * kDepth];
  float sums[kBlock * kBlock];
};

// One Block for each thread, without constructors, which would touch all of the memory.
class Blocks {
 public:
  explicit Blocks(size_t count)
      : data_(static_cast<Block*>(std::aligned_alloc(64, count * sizeof(Block)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Blocks() { std::free(data_); }
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;
  Block& operator[](int64_t i) const { return data_[i]; }

 private:
  Block* data_;
};

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t in_parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rows of a or columns of b -> out[line / 8][k / 4][line % 8][k % 4], 0 beyond `lines` and `depth`.
void pack(const uint16_t* source, int64_t line, int64_t k, int64_t lines, int64_t depth,
          uint16_t* out) {
  for (int64_t first = 0; first < lines; first += kTile) {
    for (int64_t p = 0; p < depth; p += kStep, out += kTile * kStep) {
      const uint16_t* from = source + first * line + p * k;
      const int64_t wide = least(kTile, lines - first), deep = least(kStep, depth - p);
      if (wide == kTile && deep == kStep && k == 1) {
        for (int64_t i = 0; i < kTile; ++i) std::memcpy(out + i * kStep, from + i * line, 8);
      } else if (wide == kTile && deep == kStep && line == 1) {
        const uint16x8x4_t rows = {{vld1q_u16(from), vld1q_u16(from + k), vld1q_u16(from + 2 * k),
                                    vld1q_u16(from + 3 * k)}};
        vst4q_u16(out, rows);
      } else {
        for (int64_t i = 0; i < kTile * kStep; ++i) {
          const int64_t at = i / kStep, step = i % kStep;
          out[i] = at < wide && step < deep ? from[at * line + step * k] : 0;
        }
      }
    }
  }
}

// Adds a @ b over `steps` of 4 k to sums[4][4], which are registers of 2 x 2.
void micro_kernel(const uint16_t* a, const uint16_t* b, int64_t steps, float* sums) {
  float32x4_t sum[4][4];
  for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = vld1q_f32(sums + 4 * i);
  for (int64_t s = 0; s < steps; ++s, a += kTile * kStep, b += kTile * kStep) {
    bfloat16x8_t left[4], right[4];
    for (int i = 0; i < 4; ++i) {
      left[i] = vreinterpretq_bf16_u16(vld1q_u16(a + 8 * i));
      right[i] = vreinterpretq_bf16_u16(vld1q_u16(b + 8 * i));
    }
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) sum[i][j] = vbfmmlaq_f32(sum[i][j], left[i], right[j]);
    }
  }
  for (int i = 0; i < 16; ++i) vst1q_f32(sums + 4 * i, sum[i / 4][i % 4]);
}

// Computes rows [m0, m0 + rows) and columns [n0, n0 + columns) of c.
void macro_kernel(int64_t m0, int64_t rows, int64_t n0, int64_t columns, int64_t k, const Matrix& a,
                  const Matrix& b, const Product& c, Block& block) {
  const int64_t down = in_parts(rows, kTile), across = in_parts(columns, kTile);
  std::memset(block.sums, 0, down * across * kTile * kTile * sizeof(float));
  for (int64_t p = 0; p < k; p += kDepth) {
    const int64_t depth = least(kDepth, k - p), steps = in_parts(depth, kStep);
    const auto* left = static_cast<const uint16_t*>(a.data) + m0 * a.row + p * a.column;
    const auto* right = static_cast<const uint16_t*>(b.data) + p * b.row + n0 * b.column;
    pack(left, a.row, a.column, rows, depth, block.a);
    pack(right, b.column, b.row, columns, depth, block.b);
    for (int64_t j = 0; j < across; ++j) {
      for (int64_t i = 0; i < down; ++i) {
        micro_kernel(block.a + i * steps * kTile * kStep, block.b + j * steps * kTile * kStep,
                     steps, block.sums + (i * across + j) * kTile * kTile);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const float* sums = block.sums + (i / kTile * across + j / kTile) * kTile * kTile;
      const float sum = sums[i % kTile / 2 * 16 + j % kTile / 2 * 4 + i % 2 * 2 + j % 2];
      const int64_t at = (m0 + i) * c.row + n0 + j;
      if (c.half) {
        const bfloat16_t rounded = vcvth_bf16_f32(sum);
        std::memcpy(static_cast<uint16_t*>(c.data) + at, &rounded, sizeof(rounded));
      } else {
        float& out = static_cast<float*>(c.data)[at];
        out = c.accumulate ? out + sum : sum;
      }
    }
  }
}

}  // namespace

void gemm_bf16(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads) {
  const int64_t across = in_parts(n, kBlock), tasks = in_parts(m, kBlock) * across;
  threads = static_cast<int>(least(threads < 1 ? 1 : threads, tasks));
  const Blocks blocks(threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t thread = 0; thread < threads; ++thread) {
    for (int64_t task = thread; task < tasks; task += threads) {
      const int64_t m0 = task / across * kBlock, n0 = task % across * kBlock;
      macro_kernel(m0, least(kBlock, m - m0), n0, least(kBlock, n - n0), k, a, b, c,
                   blocks[thread]);
    }
  }
}

}  // namespace realign
