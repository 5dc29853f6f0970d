#include "rows/rows.h"

#include "bf16.h"
#include "cpu.h"

namespace realign {
namespace {

float value_of(float x) { return x; }
float value_of(uint16_t x) { return widen(x); }
void assign(float& out, float x) { out = x; }
void assign(uint16_t& out, float x) { out = narrow(x); }

template <class Weight, class Out>
void epilogue_row(int64_t width, const float* exp_w, const Weight* weight, float dz_dlogit,
                  float sum_exp, float factor, Out* out) {
  // sum_exp is 0 only if the target is the only token. exp_w is then 0 as well.
  const float towards = factor * dz_dlogit, away = sum_exp > 0 ? factor / sum_exp : factor;
  for (int64_t j = 0; j < width; ++j) {
    assign(out[j], towards * (weight ? value_of(weight[j]) : 0) - away * exp_w[j]);
  }
}

}  // namespace

std::vector<RowKernels> row_kernels() {
  std::vector<RowKernels> found{{"scalar", row_kernel_scalar, exp_scalar}};
#if defined(REALIGN_X86)
  if (cpu().level >= CpuLevel::avx2) found.push_back({"avx2", row_kernel_avx2, exp_avx2});
  if (cpu().level >= CpuLevel::avx512) {
    found.push_back({"avx512", row_kernel_avx512, exp_avx512});
    if (cpu().bf16) found.push_back({"avx512_bf16", row_kernel_avx512_bf16, exp_avx512_bf16});
  }
#elif defined(REALIGN_ARM)
  if (cpu().level >= CpuLevel::neon) found.push_back({"neon", row_kernel_neon, exp_neon});
#endif
  return found;
}

void row_stats(const RowInputs& in, const RowOutputs& out, int threads) {
  const auto kernel = row_kernels().back().row_kernel;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < in.rows; ++row) kernel(in, out, row);
}

void hidden_grad_epilogue(int64_t rows, int64_t width, const float* exp_w, const void* weight,
                          int64_t weight_stride, Dtype weight_dtype, const int64_t* target,
                          const float* dz_dlogit, const float* sum_exp, const float* factor,
                          void* out, Dtype out_dtype, int threads) {
  const auto finish = [&](int64_t i, auto* elements, auto* result) {
    const auto* label = target[i] < 0 ? nullptr : elements + target[i] * weight_stride;
    epilogue_row(width, exp_w + i * width, label, dz_dlogit[i], sum_exp[i], factor[i],
                 result + i * width);
  };
  const auto* wide = static_cast<const float*>(weight);
  const auto* half = static_cast<const uint16_t*>(weight);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const bool wide_out = out_dtype == Dtype::f32;
    if (weight_dtype == Dtype::f32) {
      if (wide_out) finish(i, wide, static_cast<float*>(out));
      else finish(i, wide, static_cast<uint16_t*>(out));
    } else {
      if (wide_out) finish(i, half, static_cast<float*>(out));
      else finish(i, half, static_cast<uint16_t*>(out));
    }
  }
}

}  // namespace realign
