// The micro-kernel of gemm.cpp on a CPU with AMX: tiles of bf16, sums in fp32.
#pragma once

#include <cstdint>

namespace realign {

constexpr int64_t kAmxSteps = 16;  // of k in a tile
constexpr int kPanelColumns = 64;  // of b in a panel of gemm.cpp

// Whether the compiler knows AMX and the system gives its registers to this process.
bool amx_granted();

// c (rows, columns) = a @ b over `steps` of two k, or c += a @ b.
// a: rows of `a_row` bytes, contiguous in k. panel: (steps, kPanelColumns) pairs of b, as pack_b of
// gemm.cpp writes them. steps: a multiple of 16, with zeros beyond k in a and in b. columns:
// kPanelColumns at most.
void amx_micro_kernels(const char* a, int64_t a_row, int64_t rows, const float* panel,
                       int64_t steps, float* c, int64_t c_row, int columns, bool accumulate);

// Gives the tile registers back, which keep their contents until then.
void amx_release();

}  // namespace realign
