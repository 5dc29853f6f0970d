// The micro-kernel of gemm.cpp for CPUs with AMX: bf16 tiles with fp32 sums.
#pragma once

#include <cstdint>

namespace realign {

constexpr int64_t kAmxSteps = 16;  // steps of k in a tile
constexpr int kPanelColumns = 64;  // columns of b in a panel of gemm.cpp

// Whether the compiler supports AMX and the system lets this process use its registers.
bool amx_granted();

// c (rows, columns) = a @ b over `steps` of two k, or c += a @ b.
// a: rows of `a_row` bytes, contiguous in k.
// panel: (steps, kPanelColumns) pairs of b, as written by pack_b of gemm.cpp.
// steps: a multiple of 16, with zeros beyond k in a and b.
// columns: at most kPanelColumns.
void amx_micro_kernels(const char* a, int64_t a_row, int64_t rows, const float* panel,
                       int64_t steps, float* c, int64_t c_row, int columns, bool accumulate);

// Releases the tile registers. They keep their contents until then.
void amx_release();

}  // namespace realign
