// The row kernel: reads a chunk's logits once the GEMM has written them, and leaves the numerators
// of the softmax in their place. realign_kernels/backends/base.py documents the same contract in Python.
#pragma once

#include <cstdint>
#include <vector>

namespace realign {

enum class Dtype { f32, bf16 };

struct RowInputs {
  void* logits;           // (rows, vocabulary) of logits_dtype
  Dtype logits_dtype;
  int64_t logits_stride;  // elements between rows
  int64_t rows, vocabulary;
  const int64_t* labels;  // (rows,) in [0, vocabulary), or -1: no token of this shard
  const float* bias;      // (vocabulary,) or null
  float softcap;          // 0: none
  float temperature;      // > 0
  const bool* rival;      // (rows,) or null: the target is the strongest token but the label
};

struct RowOutputs {
  void* others;           // (rows, vocabulary) of others_dtype, or null; may be logits
  Dtype others_dtype;
  int64_t others_stride;
  int64_t* target;        // (rows,) the label or the rival; -1 where the label is -1
  float* logit;           // (rows,) z[target], -inf where target is -1
  float* peak;            // (rows,) max of z over v != target, at least -FLT_MAX
  float* total;           // (rows,) sum over v != target of exp(z - peak)
  float* slope;           // (rows,) dz / d(raw logit) at the target, 0 where it is -1
};

// z = cap(logit + bias) / temperature; others = exp(z - peak) * dz / d(raw logit), 0 at the target.
// Rows are independent, and each is one thread's: results do not depend on `threads`.
void read_rows(const RowInputs& in, const RowOutputs& out, int threads);

// out[i] = factor[i] * (slope[i] * weight[target[i]] - pull[i] / total[i]), each (rows, width).
void finish_direction(int64_t rows, int64_t width, const float* pull, const void* weight,
                      int64_t weight_stride, Dtype weight_dtype, const int64_t* target,
                      const float* slope, const float* total, const float* factor, void* out,
                      Dtype out_dtype, int threads);

// The kernels of one instruction set. exp: out[i] = exp(x[i]) as read_row computes it, for the tests
// of its error bound.
struct RowKernels {
  const char* name;
  void (*read_row)(const RowInputs&, const RowOutputs&, int64_t row);
  void (*exp)(const float* x, float* out, int64_t count);
};

// Those that cpu() allows. read_rows takes the last.
std::vector<RowKernels> row_kernels();

void read_row_scalar(const RowInputs& in, const RowOutputs& out, int64_t row);
void read_row_avx2(const RowInputs& in, const RowOutputs& out, int64_t row);
void read_row_avx512(const RowInputs& in, const RowOutputs& out, int64_t row);
void read_row_avx512_bf16(const RowInputs& in, const RowOutputs& out, int64_t row);
void read_row_neon(const RowInputs& in, const RowOutputs& out, int64_t row);
void exp_scalar(const float* x, float* out, int64_t count);
void exp_avx2(const float* x, float* out, int64_t count);
void exp_avx512(const float* x, float* out, int64_t count);
void exp_avx512_bf16(const float* x, float* out, int64_t count);
void exp_neon(const float* x, float* out, int64_t count);

}  // namespace realign
