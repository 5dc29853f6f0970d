// Matrix products with fp32 results: from bf16 or fp32 inputs on CPUs with AVX-512, and from bf16
// inputs on aarch64 CPUs with BF16.
//
// torch has no bf16 x bf16 -> fp32 product on the CPU. It rounds to bf16, which changes a log-prob
// by 1e-2. This GEMM keeps the fp32 sums, and is as fast as torch's with AVX512_BF16. With AMX
// torch is up to 2x faster, because it writes less.
#pragma once

#include <cstdint>

namespace realign {

struct Matrix {
  const void* data;
  int64_t row;     // Elements from one row to the next.
  int64_t column;  // Elements from one column to the next. row or column must be 1.
};

struct Product {
  void* data;
  int64_t row;      // Elements from one row to the next.
  bool half;        // bf16, rounded once from the fp32 sums. If false, fp32.
  bool accumulate;  // c += a @ b. For fp32 only.
};

// c (m, n) = a (m, k) @ b (k, n).
//
// The summation order of an element does not depend on m, n and threads. So results are bitwise
// equal for any number of threads and any split into chunks of rows. AMX and AVX-512 differ in
// their order. Denormal bf16 inputs count as 0, and with AMX denormal sums as well.
//
// gemm_of_* return the product for this CPU, or null if torch has to multiply.
using Gemm = void (*)(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads);
Gemm gemm_of_bf16();
Gemm gemm_of_f32();

void gemm_bf16(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads);
void gemm_f32(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, Product c, int threads);

}  // namespace realign
