// Compiled with and without -mavx512bf16, which has an instruction for conversion to bf16. Called
// only if the CPU has the instruction set.
#include <immintrin.h>

#include "rows/rows_impl.h"

namespace realign {
namespace {

struct Avx512 {
  static constexpr int width = 16;
  using Reg = __m512;
  using Mask = __mmask16;
  static Reg set(float x) { return _mm512_set1_ps(x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Mask less(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Reg select(Mask m, Reg a, Reg b) { return _mm512_mask_blend_ps(m, b, a); }
  static Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static Reg load(const uint16_t* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static Reg load(const uint16_t* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static void store(float* p, Reg x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static void store(uint16_t* p, Reg x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
  static void store(uint16_t* p, Reg x, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(x));
  }
  static Reg round(Reg x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Reg pow2(Reg n) { return _mm512_scalef_ps(set(1.0f), n); }
  static Reg abs(Reg x) { return _mm512_abs_ps(x); }
  static Reg copysign(Reg x, Reg sign) {
    return _mm512_or_ps(abs(x), _mm512_and_ps(set(-0.0f), sign));
  }
  static float reduce_max(Reg x) { return _mm512_reduce_max_ps(x); }
  static float reduce_add(Reg x) { return _mm512_reduce_add_ps(x); }
  static float lane0(Reg x) { return _mm512_cvtss_f32(x); }

 private:
  static Reg widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static __m256i narrow(Reg x) {  // rounds to nearest even, NaN stays NaN
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, up, quiet), 16));
#endif
  }
};

}  // namespace

#ifdef __AVX512BF16__
#define REALIGN_NAME(stem) stem##_avx512_bf16
#else
#define REALIGN_NAME(stem) stem##_avx512
#endif

void REALIGN_NAME(row_kernel)(const RowInputs& in, const RowOutputs& out, int64_t row) {
  row_kernel<Avx512>(in, out, row);
}

void REALIGN_NAME(exp)(const float* x, float* out, int64_t count) {
  exponentials<Avx512>(x, out, count);
}

}  // namespace realign
