#include <algorithm>
#include <cstring>

#include "bf16.h"
#include "rows/rows_impl.h"

namespace realign {
namespace {

struct Scalar {
  static constexpr int width = 1;
  using Reg = float;
  using Mask = bool;
  static Reg set(float x) { return x; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static Mask less(Reg a, Reg b) { return a < b; }
  static Reg select(Mask m, Reg a, Reg b) { return m ? a : b; }
  static Mask first(int n) { return n > 0; }
  // memcpy avoids an aliasing violation, because bf16 exp_logits may overwrite fp32 logits.
  static Reg load(const float* p) {
    float x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static Reg load(const float* p, int) { return load(p); }
  static Reg load(const uint16_t* p) {
    uint16_t x;
    std::memcpy(&x, p, sizeof(x));
    return widen(x);
  }
  static Reg load(const uint16_t* p, int) { return load(p); }
  static void store(float* p, Reg x) { std::memcpy(p, &x, sizeof(x)); }
  static void store(float* p, Reg x, int) { store(p, x); }
  static void store(uint16_t* p, Reg x) {
    const uint16_t half = narrow(x);
    std::memcpy(p, &half, sizeof(half));
  }
  static void store(uint16_t* p, Reg x, int) { store(p, x); }
  static Reg round(Reg x) { return std::nearbyint(x); }
  static Reg pow2(Reg n) {
    if (n != n) return n;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n) + 127) << 23;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static Reg abs(Reg x) { return std::fabs(x); }
  static Reg copysign(Reg x, Reg sign) { return std::copysign(x, sign); }
  static float reduce_max(Reg x) { return x; }
  static float reduce_add(Reg x) { return x; }
  static float lane0(Reg x) { return x; }
};

}  // namespace

void row_kernel_scalar(const RowInputs& in, const RowOutputs& out, int64_t row) {
  row_kernel<Scalar>(in, out, row);
}

void exp_scalar(const float* x, float* out, int64_t count) { exponentials<Scalar>(x, out, count); }

}  // namespace realign
