// Compiled with -mavx2 -mfma, and called only if the CPU has both.
#include <immintrin.h>

#include <cstring>

#include "rows/rows_impl.h"

namespace realign {
namespace {

struct Avx2 {
  static constexpr int width = 8;
  using Reg = __m256;
  using Mask = __m256;
  static Reg set(float x) { return _mm256_set1_ps(x); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Mask less(Reg a, Reg b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Reg select(Mask m, Reg a, Reg b) { return _mm256_blendv_ps(b, a, m); }
  static Mask first(int n) { return _mm256_castsi256_ps(lanes(n)); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const float* p, int n) { return _mm256_maskload_ps(p, lanes(n)); }
  static Reg load(const uint16_t* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static Reg load(const uint16_t* p, int n) {
    uint16_t copy[8] = {};
    std::memcpy(copy, p, n * sizeof(*p));
    return load(copy);
  }
  static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
  static void store(float* p, Reg x, int n) { _mm256_maskstore_ps(p, lanes(n), x); }
  static void store(uint16_t* p, Reg x) { _mm_storeu_si128((__m128i*)p, narrow(x)); }
  static void store(uint16_t* p, Reg x, int n) {
    uint16_t copy[8];
    store(copy, x);
    std::memcpy(p, copy, n * sizeof(*p));
  }
  static Reg round(Reg x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Reg pow2(Reg n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  static Reg abs(Reg x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static Reg copysign(Reg x, Reg sign) {
    return _mm256_or_ps(abs(x), _mm256_and_ps(set(-0.0f), sign));
  }
  static float reduce_max(Reg x) {
    float v[8], m;
    store(v, x);
    m = v[0];
    for (int i = 1; i < 8; ++i) m = m > v[i] ? m : v[i];
    return m;
  }
  static float reduce_add(Reg x) {
    float v[8];
    store(v, x);
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
  }
  static float lane0(Reg x) { return _mm256_cvtss_f32(x); }

 private:
  static __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg widen(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static __m128i narrow(Reg x) {  // rounds to nearest even, NaN stays NaN
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
  }
};

}  // namespace

void row_kernel_avx2(const RowInputs& in, const RowOutputs& out, int64_t row) {
  row_kernel<Avx2>(in, out, row);
}

void exp_avx2(const float* x, float* out, int64_t count) { exponentials<Avx2>(x, out, count); }

}  // namespace realign
