// The exponential of logits in the epilogue of their GEMM, for Hopper. This header needs no CUDA.
#pragma once

#include <cstdint>

namespace realign {

// Rows and columns of a tile. sums is ceil(vocabulary / columns) x (rows rounded up to tiles).
constexpr int kExpHeadRows = 128, kExpHeadColumns = 256;

struct ExpHead {
  const void* hidden;     // (rows, width) bf16
  const void* weight;     // (vocabulary, width) bf16
  void* exp_logits;       // (rows, vocabulary) bf16, written
  const float* shift;     // (rows,)
  const int32_t* labels;  // (rows,)
  float* sums;            // (tiles of columns, rows rounded up), written
  float* rounded_sums;    // the same shape, written
  int rows, vocabulary, width;
  int64_t hidden_stride, weight_stride, exp_logits_stride;  // elements from row to row
};

// exp_logits[i][v] = exp2(log2(e) * dot(hidden[i], weight[v]) - shift[i]), 0 at the label. Also its
// sums over the columns of each tile, before (sums) and after rounding (rounded_sums). Enqueues on
// the stream and returns. Widths, strides and addresses must be multiples of 16 bytes. Throws
// std::runtime_error if CUTLASS or CUDA fails.
void exp_head(const ExpHead& head, int device, void* stream);

}  // namespace realign
