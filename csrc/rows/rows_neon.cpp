// For aarch64, where every CPU has NEON. BF16 is an extension, so conversion to bf16 uses integers.
#include <arm_neon.h>

#include <cstring>

#include "rows/rows_impl.h"

namespace realign {
namespace {

struct Neon {
  static constexpr int width = 4;
  using Reg = float32x4_t;
  using Mask = uint32x4_t;
  static Reg set(float x) { return vdupq_n_f32(x); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg max(Reg a, Reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // FMAX keeps any NaN
  static Mask less(Reg a, Reg b) { return vcltq_f32(a, b); }
  static Reg select(Mask m, Reg a, Reg b) { return vbslq_f32(m, a, b); }
  static Mask first(int n) {
    const int32_t index[4] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(index), vdupq_n_s32(n));
  }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static Reg load(const float* p, int n) {
    float copy[4] = {};
    std::memcpy(copy, p, n * sizeof(*p));
    return load(copy);
  }
  static Reg load(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static Reg load(const uint16_t* p, int n) {
    uint16_t copy[4] = {};
    std::memcpy(copy, p, n * sizeof(*p));
    return load(copy);
  }
  static void store(float* p, Reg x) { vst1q_f32(p, x); }
  static void store(float* p, Reg x, int n) {
    float copy[4];
    store(copy, x);
    std::memcpy(p, copy, n * sizeof(*p));
  }
  static void store(uint16_t* p, Reg x) { vst1_u16(p, narrow(x)); }
  static void store(uint16_t* p, Reg x, int n) {
    uint16_t copy[4];
    store(copy, x);
    std::memcpy(p, copy, n * sizeof(*p));
  }
  static Reg round(Reg x) { return vrndnq_f32(x); }
  static Reg pow2(Reg n) {
    const int32x4_t biased = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
  }
  static Reg abs(Reg x) { return vabsq_f32(x); }
  static Reg copysign(Reg x, Reg sign) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), sign, x);
  }
  static float reduce_max(Reg x) { return vmaxvq_f32(x); }
  static float reduce_add(Reg x) { return vaddvq_f32(x); }
  static float lane0(Reg x) { return vgetq_lane_f32(x, 0); }

 private:
  static uint16x4_t narrow(Reg x) {  // rounds to nearest even, NaN stays NaN
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), up, quiet), 16);
  }
};

}  // namespace

void row_kernel_neon(const RowInputs& in, const RowOutputs& out, int64_t row) {
  row_kernel<Neon>(in, out, row);
}

void exp_neon(const float* x, float* out, int64_t count) { exponentials<Neon>(x, out, count); }

}  // namespace realign
