// Tests row kernels of every instruction set and the GEMM against double precision, for odd sizes.
// tests/csrc/test_csrc.py runs it under AddressSanitizer and UBSan. Exits with 1 on a failure.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bf16.h"
#include "check.h"
#include "gemm/gemm.h"
#include "gemm/masked_exp.h"
#include "rows/rows.h"

using namespace realign;

namespace {

// The relative error of exp is at most 2^-22.5 for normal results. Below it is 0. NaN stays NaN.
void test_exp(const RowKernels& level) {
  std::vector<float> x, y;
  for (double v = -110; v <= 20; v += 1.0 / 4096) x.push_back(static_cast<float>(v));
  for (uint32_t bits = 0x33000000; bits < 0x42b00000; bits += 977) {  // 3e-8 .. 88, negated
    float v;
    std::memcpy(&v, &bits, 4);
    x.push_back(-v);
  }
  const float special[] = {0.0f, -0.0f, std::nanf(""), -std::numeric_limits<float>::infinity()};
  x.insert(x.end(), std::begin(special), std::end(special));
  y.resize(x.size());
  level.exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
  double worst = 0;
  bool right = true;
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i])) {
      right = right && std::isnan(y[i]);
    } else if (x[i] < -87.3f) {
      right = right && y[i] == 0;
    } else {
      const double exact = std::exp(static_cast<double>(x[i]));
      worst = std::max(worst, std::abs(y[i] / exact - 1));
    }
  }
  expect(right, std::string("exp of NaN, -inf and tiny results, ") + level.name);
  expect(worst <= std::exp2(-22.5), std::string("exp error, ") + level.name);
  std::printf("exp %-12s largest relative error 2^%.2f\n", level.name, std::log2(worst));
}

struct Case {
  int64_t vocabulary;
  bool bias, runner_up, half_in, half_out, in_place;
  float softcap, temperature;
};

// Compares the second of two rows of `test` with the definition in double.
void test_row(const RowKernels& level, const Case& test, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const int64_t v = test.vocabulary;
  // Exact sizes, so that AddressSanitizer detects a read beyond the last row.
  std::vector<float> wide(2 * v), bias(v), wide_out(2 * v, NAN);
  std::vector<uint16_t> half(2 * v), half_out(2 * v, 0x7fc0);
  for (int64_t i = 0; i < 2 * v; ++i) {
    half[i] = narrow(4 * normal(random));
    wide[i] = test.half_in ? widen(half[i]) : 4 * normal(random);
  }
  for (auto& b : bias) b = normal(random);
  const int64_t label = static_cast<int64_t>(random() % v);
  const int64_t labels[2] = {0, random() % 5 == 0 ? -1 : label};
  const bool runner_up[2] = {false, test.runner_up && v > 1};

  const double cap = test.softcap, heat = test.temperature;
  std::vector<double> z(v), dz_dlogit(v, 1 / heat);
  for (int64_t i = 0; i < v; ++i) {
    z[i] = static_cast<double>(wide[v + i]) + (test.bias ? bias[i] : 0);
    if (cap > 0) {
      const double t = std::tanh(z[i] / cap);
      dz_dlogit[i] *= 1 - t * t;
      z[i] = cap * t;
    }
    z[i] /= heat;
  }

  void* logits = test.half_in ? static_cast<void*>(half.data()) : wide.data();
  void* exp_logits = test.half_out ? static_cast<void*>(half_out.data()) : wide_out.data();
  const Dtype in_dtype = test.half_in ? Dtype::bf16 : Dtype::f32;
  const Dtype out_dtype = test.half_out ? Dtype::bf16 : Dtype::f32;
  int64_t out_stride = v, target[2];
  if (test.in_place) {  // a bf16 row starts at its fp32 logits
    exp_logits = logits;
    out_stride = test.half_out && !test.half_in ? 2 * v : v;
  }
  float logit[2], max_logit[2], sum_exp[2], slope[2];
  level.row_kernel({logits, in_dtype, v, 2, v, labels, test.bias ? bias.data() : nullptr,
                    test.softcap, test.temperature, test.runner_up ? runner_up : nullptr},
                   {exp_logits, out_dtype, out_stride, target, logit, max_logit, sum_exp, slope},
                   1);

  char name[160];
  std::snprintf(name, sizeof(name),
                "row %s V=%ld bias=%d runner_up=%d in=%d out=%d place=%d cap=%g T=%g: ", level.name,
                static_cast<long>(v), test.bias, test.runner_up, test.half_in, test.half_out,
                test.in_place, cap, heat);
  const auto near = [&](double found, double exact, double bound, const char* what) {
    expect(std::abs(found - exact) <= bound, std::string(name) + what);  // false for NaN
  };
  int64_t expected = labels[1];
  if (runner_up[1] && expected >= 0) {
    // The strongest other token, or any token that is equal within rounding.
    double best = -1e300;
    for (int64_t i = 0; i < v; ++i) {
      if (i != label) best = std::max(best, z[i]);
    }
    expected = target[1];
    expect(expected != label, std::string(name) + "runner-up");
    near(z[expected], best, 1e-4, "runner-up");
  }
  expect(target[1] == expected, std::string(name) + "target");
  double top = -std::numeric_limits<float>::max(), sum = 0;
  for (int64_t i = 0; i < v; ++i) {
    if (i != expected) top = std::max(top, z[i]);
  }
  for (int64_t i = 0; i < v; ++i) {
    if (i != expected) sum += std::exp(z[i] - max_logit[1]);
  }
  if (expected < 0) {
    expect(std::isinf(logit[1]) && logit[1] < 0 && slope[1] == 0, std::string(name) + "no target");
  } else {
    near(logit[1], z[expected], 1e-5 * (1 + std::abs(z[expected])), "logit");
    near(slope[1], dz_dlogit[expected], 2e-5, "dz_dlogit");
  }
  near(max_logit[1], top, 1e-5 * std::max(1.0, std::abs(top)), "max_logit");
  near(sum_exp[1], sum, 2e-5 * sum, "sum_exp");
  for (int64_t i = 0; i < v; ++i) {
    const int64_t at = out_stride + i;
    const double found = test.half_out ? widen(static_cast<const uint16_t*>(exp_logits)[at])
                                       : static_cast<const float*>(exp_logits)[at];
    const double exact = i == expected ? 0 : std::exp(z[i] - max_logit[1]) * dz_dlogit[i];
    near(found, exact, (test.half_out ? 5e-3 : 4e-5) / heat, "exp_logits");
  }
}

void test_rows(const RowKernels& level) {
  std::mt19937 random(0);
  for (const int64_t v : {1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 97, 257, 1003}) {
    for (int bits = 0; bits < 128; ++bits) {
      const auto bit = [bits](int place) { return (bits >> place & 1) != 0; };
      const bool half_in = bit(0), half_out = bit(1), in_place = bit(2);
      if (in_place && half_in && !half_out) continue;  // does not fit
      const float cap = bit(5) ? 5.0f : 0.0f, heat = bit(6) ? 0.7f : 1.0f;
      test_row(level, {v, bit(3), bit(4), half_in, half_out, in_place, cap, heat}, random);
    }
  }
}

// NaN and inf must not become a finite log-prob:
// logit_gap = logit - max_logit - log(sum_exp) + (logit - logit).
void test_non_finite(const RowKernels& level) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const int64_t v : {2, 16, 33}) {
    for (int64_t place = 0; place < v; ++place) {
      for (const float value : {inf, std::nanf("")}) {
        std::vector<float> logits(v, 1.0f), exp_logits(v);
        logits[place] = value;
        const int64_t label = 1;
        int64_t target;
        float logit, max_logit, sum_exp, slope;
        level.row_kernel(
            {logits.data(), Dtype::f32, v, 1, v, &label, nullptr, 0, 1, nullptr},
            {exp_logits.data(), Dtype::f32, v, &target, &logit, &max_logit, &sum_exp, &slope}, 0);
        const float logit_gap = logit - max_logit - std::log(sum_exp) + (logit - logit);
        expect(std::isnan(logit_gap), std::string("NaN or inf in a row, ") + level.name);
      }
    }
  }
}

// bf16 exp_logits round ties to even, and NaN stays NaN. With equal logits they are 1 / T.
void test_rounding(const RowKernels& level) {
  const int64_t v = 9, label = -1;
  const auto exp_logits = [&](uint32_t raw, float temperature) {
    float value;
    std::memcpy(&value, &raw, 4);
    std::vector<float> logits(v, value);
    std::vector<uint16_t> result(v);
    int64_t target;
    float logit, max_logit, sum_exp, slope;
    level.row_kernel({logits.data(), Dtype::f32, v, 1, v, &label, nullptr, 0, temperature, nullptr},
                     {result.data(), Dtype::bf16, v, &target, &logit, &max_logit, &sum_exp, &slope},
                     0);
    return result;
  };
  int ties = 0;
  for (uint32_t bits = 0x3f000000; ties < 8; ++bits) {
    float temperature;
    std::memcpy(&temperature, &bits, 4);
    const float inverse = 1 / temperature;
    uint32_t wide;
    std::memcpy(&wide, &inverse, 4);
    if ((wide & 0xffff) != 0x8000) continue;
    ++ties;
    const auto even = static_cast<uint16_t>((wide >> 16) + (wide >> 16 & 1));
    expect(exp_logits(0x3f800000, temperature) == std::vector<uint16_t>(v, even),
           std::string("bf16 ties, ") + level.name);
  }
  for (const uint16_t half : exp_logits(0x7fffffff, 1)) {
    expect(std::isnan(widen(half)), std::string("NaN to bf16, ") + level.name);
  }
}

// Normally distributed values that bf16 represents exactly, as matrices of both dtypes.
struct Values {
  std::vector<float> wide;
  std::vector<uint16_t> half;

  Values(int64_t size, std::mt19937& random) : wide(size), half(size) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i) wide[i] = widen(half[i] = narrow(normal(random)));
  }

  Matrix view(bool as_half, bool transposed, int64_t rows, int64_t columns) const {
    const void* data = as_half ? static_cast<const void*>(half.data()) : wide.data();
    return transposed ? Matrix{data, 1, rows} : Matrix{data, columns, 1};
  }
};

// Compares products of all layouts of a and b, with and without accumulation, with double
// precision.
void test_gemm() {
  const Gemm products[] = {gemm_of_f32(), gemm_of_bf16()};
  std::mt19937 random(0);
  const int64_t sizes[][3] = {{1, 1, 1},    {7, 97, 33},    {6, 64, 512},  {13, 65, 513},
                              {261, 70, 37}, {9, 600, 514}, {300, 130, 3}, {5, 3, 1100},
                              {300, 17, 511}};
  const std::vector<uint16_t> nan(600 * 600, 0x7fc0);
  std::vector<float> lost(300 * 600);
  for (const auto& [m, n, k] : sizes) {
    for (int threads = 1; threads <= 3 && products[1]; threads += 2) {  // NaN in packed memory
      for (const auto& shape : {std::pair{300, 64}, std::pair{8, 600}}) {  // of a, of b
        products[1](shape.first, shape.second, 600, {nan.data(), 600, 1}, {nan.data(), 600, 1},
                    {lost.data(), 600, false, false}, threads);
      }
    }
    const Values a(m * k, random), b(k * n, random);
    const int64_t stride = n + 3;
    for (int which = 0; which < 16; ++which) {
      const bool ta = which & 1, tb = which & 2, accumulate = which & 4, half = which & 8;
      if (products[half] == nullptr) continue;
      const Matrix left = a.view(half, ta, m, k), right = b.view(half, tb, k, n);
      std::vector<float> one(m * stride, 2.0f), two(m * stride, 2.0f);
      products[half](m, n, k, left, right, {one.data(), stride, false, accumulate}, 1);
      products[half](m, n, k, left, right, {two.data(), stride, false, accumulate}, 3);
      expect(one == two, "GEMM depends on the number of threads");
      std::vector<uint16_t> rounded(m * stride, 7);
      const bool rounds = half && !accumulate;
      if (rounds) products[1](m, n, k, left, right, {rounded.data(), stride, true, false}, 2);
      double worst = 0;
      bool same = true, inside = true;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < stride; ++j) {
          const int64_t at = i * stride + j;
          same = same && rounded[at] == (rounds && j < n ? narrow(one[at]) : 7);
          if (j >= n) {
            inside = inside && one[at] == 2.0f;
            continue;
          }
          double sum = accumulate ? 2 : 0;
          for (int64_t x = 0; x < k; ++x) {
            const double factor = a.wide[ta ? x * m + i : i * k + x];
            sum += factor * b.wide[tb ? j * k + x : x * n + j];
          }
          worst = std::max(worst, std::abs(sum - one[at]));
        }
      }
      expect(same, "bf16 product is the rounded fp32 one");
      expect(inside, "GEMM writes beyond its columns");
      expect(worst < 1e-5 * std::sqrt(static_cast<double>(k)) + 1e-6, "GEMM error");
    }
  }
  const auto source = [](Gemm product) { return product ? "own" : "of torch"; };
  std::printf("GEMM bf16 %s, f32 %s\n", source(products[1]), source(products[0]));
}

// Tests the arithmetic of the GEMM's epilogue on Hopper: E / 2^58, shifted by the label's logit.
void test_masked_exp() {
  constexpr float kScale = 1.44269504f, kBits = 58.0f;
  std::mt19937 random(0);
  for (const double spread : {1.0, 2.0, 4.0, 6.0}) {
    for (const double lift : {0.0, 14.0, 30.0, -30.0, -80.0}) {
      std::normal_distribution<float> logits(0.0f, static_cast<float>(spread));
      const float label = logits(random) + static_cast<float>(lift);
      const float shift = fmaf(label, kScale, kBits);
      double sum = 0, exact = 0, worst = 0;
      for (int v = 0; v < 20000; ++v) {
        const float z = logits(random);
        const double e = masked_exp2(z, kScale, shift, false) * std::exp2(58.0);
        const double truth = std::exp(static_cast<double>(z) - label);
        sum += e;
        exact += truth;
        if (truth > 1e-20) worst = std::max(worst, std::abs(e / truth - 1));  // below: underflow
      }
      expect(worst < 2e-5, "E of the epilogue");
      expect(std::abs(std::log1p(sum) - std::log1p(exact)) < 1e-5, "log-prob of the epilogue");
    }
  }
  const float infinite = std::numeric_limits<float>::infinity();
  expect(masked_exp2(3.0f, kScale, 2.0f, true) == 0, "E of the label");
  expect(std::isnan(masked_exp2(std::nanf(""), kScale, 0.0f, false)), "E of NaN");
  expect(masked_exp2(infinite, kScale, 0.0f, false) == infinite, "E of inf");
  expect(masked_exp2(0.0f, kScale, fmaf(-200.0f, kScale, kBits), false) == infinite,
         "E if the label is 200 nats below");
  expect(masked_exp2(-80.0f, kScale, fmaf(0.0f, kScale, kBits), false) == 0, "E below 2^-126");
}

}  // namespace

int main() {
  for (const RowKernels& level : row_kernels()) {
    test_exp(level);
    test_rows(level);
    test_non_finite(level);
    test_rounding(level);
  }
  test_gemm();
  test_masked_exp();
  return report();
}
