// The row kernel over a vector type V, compiled once per instruction set (rows_*.cpp). V has:
//
// - static constexpr int width, Reg, Mask.
// - set(float), add, sub, mul, fma(a, b, c) = a * b + c, div.
// - max(a, b), which is b if a or b is NaN, as in MAXPS.
// - less(a, b) -> Mask.
// - select(mask, a, b) = mask ? a : b.
// - first(n) -> Mask of the first n lanes.
// - load(const float*), load(const uint16_t* bf16), store, and all three with a count n < width.
// - round(x) to the nearest integer.
// - pow2(n) = 2^n for integral n in [-126, 127].
// - abs, copysign(magnitude, sign), reduce_max, reduce_add, lane0.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "rows/rows.h"

namespace realign {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// exp(x) for x <= 88, by Cody-Waite reduction and the polynomial of Cephes' expf. The relative
// error of normal results is below 2^-22.6. Below x = -87.3 the result is 0. NaN stays NaN.
template <class V>
typename V::Reg exponential(typename V::Reg x) {
  const auto low = V::set(-87.3f);
  const auto n = V::round(V::mul(V::max(low, x), V::set(1.44269504f)));
  auto r = V::fma(n, V::set(-0.693359375f), V::max(low, x));
  r = V::fma(n, V::set(2.12194440e-4f), r);
  auto p = V::fma(V::set(1.9875691500e-4f), r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(p, V::mul(r, r), V::add(r, V::set(1.0f)));
  return V::select(V::less(x, low), V::set(0.0f), V::mul(p, V::pow2(n)));
}

// tanh(x): the polynomial of Cephes' tanhf below 0.625, 1 - 2 / (exp(2 |x|) + 1) above.
template <class V>
typename V::Reg hyperbolic_tangent(typename V::Reg x) {
  const auto size = V::abs(x);
  const auto square = V::mul(x, x);
  auto p = V::fma(V::set(-5.70498872745e-3f), square, V::set(2.06390887954e-2f));
  p = V::fma(p, square, V::set(-5.37397155531e-2f));
  p = V::fma(p, square, V::set(1.33314422036e-1f));
  p = V::fma(p, square, V::set(-3.33332819422e-1f));
  const auto small = V::fma(V::mul(p, square), x, x);
  // Above 9.02 tanh is 1 in fp32. The order of the arguments keeps NaN.
  const auto capped = V::sub(V::set(0.0f), V::max(V::set(-10.0f), V::sub(V::set(0.0f), size)));
  const auto power = exponential<V>(V::add(capped, capped));
  const auto large =
      V::sub(V::set(1.0f), V::div(V::set(2.0f), V::add(power, V::set(1.0f))));
  return V::select(V::less(size, V::set(0.625f)), small, V::copysign(large, x));
}

// Calls visit(column, lanes) for the columns [begin, end) in vectors. lanes < width only in the
// last.
template <class V, class Visit>
void over(int64_t begin, int64_t end, const Visit& visit) {
  for (; begin + V::width <= end; begin += V::width) visit(begin, V::width);
  if (begin < end) visit(begin, static_cast<int>(end - begin));
}

template <class V, class In>
struct Row {
  using Reg = typename V::Reg;

  const In* raw;
  const float* bias;
  bool capped, tempered;
  Reg cap, inverse_cap, inverse_temperature;

  Row(const RowInputs& in, int64_t row)
      : raw(static_cast<const In*>(in.logits) + row * in.logits_stride),
        bias(in.bias),
        capped(in.softcap > 0),
        tempered(in.temperature != 1),
        cap(V::set(in.softcap)),
        inverse_cap(V::set(capped ? 1 / in.softcap : 0)),
        inverse_temperature(V::set(1 / in.temperature)) {}

  // Returns z in the first `lanes` lanes, -inf in the others. Sets dz_dlogit to dz / d(raw logit).
  Reg value(int64_t column, int lanes, Reg* dz_dlogit = nullptr) const {
    const bool full = lanes == V::width;
    Reg z = full ? V::load(raw + column) : V::load(raw + column, lanes);
    if (bias) z = V::add(z, full ? V::load(bias + column) : V::load(bias + column, lanes));
    if (dz_dlogit) *dz_dlogit = tempered ? inverse_temperature : V::set(1.0f);
    if (capped) {
      const Reg t = hyperbolic_tangent<V>(V::mul(z, inverse_cap));
      z = V::mul(cap, t);
      if (dz_dlogit) *dz_dlogit = V::mul(*dz_dlogit, V::sub(V::set(1.0f), V::mul(t, t)));
    }
    if (tempered) z = V::mul(z, inverse_temperature);
    return full ? z : V::select(V::first(lanes), z, V::set(-kInfinity));
  }
};

template <class V, class In>
float largest(const Row<V, In>& row, int64_t begin, int64_t end, float start) {
  // Four chains hide the latency of max. It may drop a NaN, which the sum of exponentials keeps.
  typename V::Reg m[4] = {V::set(start), V::set(start), V::set(start), V::set(start)};
  int64_t at = begin;
  for (; at + 4 * V::width <= end; at += 4 * V::width) {
    for (int i = 0; i < 4; ++i) m[i] = V::max(m[i], row.value(at + i * V::width, V::width));
  }
  over<V>(at, end, [&](int64_t column, int lanes) {
    m[0] = V::max(m[0], row.value(column, lanes));
  });
  return V::reduce_max(V::max(V::max(m[0], m[1]), V::max(m[2], m[3])));
}

// First column with z equal to `wanted`, or `fallback` if there is none.
template <class V, class In>
int64_t find(const Row<V, In>& row, int64_t begin, int64_t end, float wanted, int64_t fallback) {
  float z[V::width];
  for (; begin < end; begin += V::width) {
    const int lanes = static_cast<int>(end - begin < V::width ? end - begin : V::width);
    V::store(z, row.value(begin, lanes));
    for (int i = 0; i < lanes; ++i) {
      if (z[i] == wanted) return begin + i;
    }
  }
  return fallback;
}

template <class V, class In, class Out>
void row_kernel_as(const RowInputs& in, const RowOutputs& out, int64_t index) {
  using Reg = typename V::Reg;
  const Row<V, In> row(in, index);
  const int64_t end = in.vocabulary;
  int64_t target = in.labels[index];
  if (in.runner_up && in.runner_up[index] && target >= 0) {
    const int64_t label = target;
    const float before = largest(row, 0, label, -kInfinity);
    const float strongest = largest(row, label + 1, end, before);
    target = find(row, label + 1, end, strongest, label > 0 ? 0 : label + 1);
    if (before == strongest) target = find(row, 0, label, strongest, target);
  }
  const int64_t split = target < 0 ? end : target;  // others: [0, split), [split + 1, end)

  // Starts at -FLT_MAX, because without other tokens -inf - -inf would be NaN.
  float max_logit = largest(row, 0, split, -FLT_MAX);
  max_logit = largest(row, split + 1, end, max_logit);

  float logit = -kInfinity, target_dz_dlogit = 0;
  if (target >= 0) {
    Reg dz_dlogit;
    logit = V::lane0(row.value(target, 1, &dz_dlogit));
    target_dz_dlogit = V::lane0(dz_dlogit);
  }

  Out* exp_logits = static_cast<Out*>(out.exp_logits);
  if (exp_logits) exp_logits += index * out.exp_logits_stride;
  const Reg shift = V::set(max_logit);
  Reg sums[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
  const auto numerator = [&](int64_t column, int lanes, Reg& sum) {
    Reg dz_dlogit;
    const Reg power = exponential<V>(V::sub(row.value(column, lanes, &dz_dlogit), shift));
    sum = V::add(sum, power);
    if (!exp_logits) return;
    const bool plain = !row.capped && !row.tempered;
    const Reg result = plain ? power : V::mul(power, dz_dlogit);
    if (lanes == V::width) {
      V::store(exp_logits + column, result);
    } else {
      V::store(exp_logits + column, result, lanes);
    }
  };
  const auto range = [&](int64_t at, int64_t stop) {
    for (; at + 4 * V::width <= stop; at += 4 * V::width) {
      for (int i = 0; i < 4; ++i) numerator(at + i * V::width, V::width, sums[i]);
    }
    over<V>(at, stop, [&](int64_t column, int lanes) { numerator(column, lanes, sums[0]); });
  };
  range(0, split);
  range(split + 1, end);
  if (exp_logits && target >= 0) V::store(exp_logits + target, V::set(0.0f), 1);

  out.target[index] = target;
  out.logit[index] = logit;
  out.max_logit[index] = max_logit;
  out.sum_exp[index] = V::reduce_add(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  out.dz_dlogit[index] = target_dz_dlogit;
}

template <class V>
void row_kernel(const RowInputs& in, const RowOutputs& out, int64_t row) {
  const bool wide_in = in.logits_dtype == Dtype::f32, wide_out = out.exp_logits_dtype == Dtype::f32;
  if (wide_in && wide_out) return row_kernel_as<V, float, float>(in, out, row);
  if (wide_in) return row_kernel_as<V, float, uint16_t>(in, out, row);
  if (wide_out) return row_kernel_as<V, uint16_t, float>(in, out, row);
  return row_kernel_as<V, uint16_t, uint16_t>(in, out, row);
}

template <class V>
void exponentials(const float* x, float* out, int64_t count) {
  over<V>(0, count, [&](int64_t at, int lanes) {
    V::store(out + at, exponential<V>(V::load(x + at, lanes)), lanes);
  });
}

}  // namespace
}  // namespace realign
