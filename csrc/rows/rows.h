// The row kernel: reads a chunk's logits after the GEMM, and replaces them by the numerators of the
// softmax. realign_kernels/backends/base.py documents the same contract in Python.
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
  const int64_t* labels;  // (rows,) in [0, vocabulary), or -1 for a token of another shard.
  const float* bias;      // (vocabulary,) or null.
  float softcap;          // 0 for none.
  float temperature;      // > 0.
  const bool* runner_up;  // (rows,) or null: the target is the strongest token except the label.
};

struct RowOutputs {
  void* exp_logits;       // (rows, vocabulary) of exp_logits_dtype, or null. May be logits.
  Dtype exp_logits_dtype;
  int64_t exp_logits_stride;
  int64_t* target;        // (rows,) the label or the runner-up, -1 for label -1.
  float* logit;           // (rows,) z[target], -inf for target -1.
  float* max_logit;       // (rows,) max of z over v != target, at least -FLT_MAX.
  float* sum_exp;         // (rows,) sum over v != target of exp(z - max_logit).
  float* dz_dlogit;       // (rows,) dz / d(raw logit) at the target, 0 for target -1.
};

// z = cap(logit + bias) / temperature. exp_logits = exp(z - max_logit) * dz / d(raw logit), 0 at
// the target. Each row is computed by one thread, so results do not depend on `threads`.
void row_stats(const RowInputs& in, const RowOutputs& out, int threads);

// out[i] = factor[i] * (dz_dlogit[i] * weight[target[i]] - exp_w[i] / sum_exp[i]), (rows, width).
void hidden_grad_epilogue(int64_t rows, int64_t width, const float* exp_w, const void* weight,
                          int64_t weight_stride, Dtype weight_dtype, const int64_t* target,
                          const float* dz_dlogit, const float* sum_exp, const float* factor,
                          void* out, Dtype out_dtype, int threads);

// The kernels of one instruction set. exp is the exponential of row_kernel, out[i] = exp(x[i]), for
// tests of its error bound.
struct RowKernels {
  const char* name;
  void (*row_kernel)(const RowInputs&, const RowOutputs&, int64_t row);
  void (*exp)(const float* x, float* out, int64_t count);
};

// The kernels that cpu() allows. row_stats uses the last.
std::vector<RowKernels> row_kernels();

void row_kernel_scalar(const RowInputs& in, const RowOutputs& out, int64_t row);
void row_kernel_avx2(const RowInputs& in, const RowOutputs& out, int64_t row);
void row_kernel_avx512(const RowInputs& in, const RowOutputs& out, int64_t row);
void row_kernel_avx512_bf16(const RowInputs& in, const RowOutputs& out, int64_t row);
void row_kernel_neon(const RowInputs& in, const RowOutputs& out, int64_t row);
void exp_scalar(const float* x, float* out, int64_t count);
void exp_avx2(const float* x, float* out, int64_t count);
void exp_avx512(const float* x, float* out, int64_t count);
void exp_avx512_bf16(const float* x, float* out, int64_t count);
void exp_neon(const float* x, float* out, int64_t count);

}  // namespace realign
