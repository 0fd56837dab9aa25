// Products in fp32, where the instruction set has none of bf16: a few rows times two vectors of
// columns, their sums in registers and over k in order. A is rows of fp32; B is panels of 16
// columns, one after another their k.
#pragma once

#include "vec.h"

namespace PTM_NAMESPACE {

#if !PTM_ISA_BF16

// Rows at once: with AVX2 6 x 2 sums, 2 of B and 1 of A are 15 of 16 registers, and hide the
// latency of a multiply-add; SSE needs one for the product. AVX-512 has 32.
constexpr int kRowsAtOnce = PTM_ISA_AVX512 ? 8 : PTM_ISA_AVX2 ? 6 : 4;

template <int N>
struct Number {
  static constexpr int value = N;
};

// B as fp32, and as dwords of bf16 (k, k + 1): vector v of k = 2 pair + odd. Two vectors are a panel
// or less, or two panels that lie `next` apart.
struct Columns {
  const float* data;
  PTM_INLINE vf at(int64_t pair, int odd, int v) const {
    return load(data + (2 * pair + odd) * 16 + v * W);
  }
  PTM_INLINE Columns from(int64_t column) const { return {data + column}; }
};
struct PairedColumns {
  const uint32_t* data;
  int64_t next = W;
  PTM_INLINE vf at(int64_t pair, int odd, int v) const {
    vu both;
    memcpy(&both, data + pair * 16 + v * next, sizeof both);
    return (vf)(odd ? both & 0xffff0000u : both << 16);
  }
  PTM_INLINE PairedColumns from(int64_t column) const { return {data + column, next}; }
};

template <int R, class B>
PTM_INLINE void multiply_rows(const float* a, int64_t stride, int64_t pairs, B b, float* c,
                              int64_t c_stride, int64_t c_next, bool add) {
  vf sum[R][2];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 2; v++) sum[r][v] = add ? load(c + r * c_stride + v * c_next) : vf{};
  for (int64_t p = 0; p < pairs; p++)
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      const vf first = b.at(p, odd, 0), second = b.at(p, odd, 1);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const float one = a[r * stride + 2 * p + odd];
        sum[r][0] += first * one;
        sum[r][1] += second * one;
      }
    }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 2; v++) store(c + r * c_stride + v * c_next, sum[r][v]);
}

// c (rows x 16; with AVX-512 two of them, `c_next` apart) = a b, or c += a b where `add`; k even.
template <class B>
inline void multiply(const float* a, int64_t stride, int64_t rows, int64_t k, B b, float* c,
                     int64_t c_stride, bool add, int64_t c_next = W) {
  for (int64_t column = 0; column < 16; column += 2 * W) {
    auto run = [&](auto number, int64_t r) {
      multiply_rows<number.value>(a + r * stride, stride, k / 2, b.from(column),
                                  c + r * c_stride + column, c_stride, c_next, add);
    };
    int64_t r = 0;
    for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) run(Number<kRowsAtOnce>{}, r);
    switch (rows - r) {
      case 1: run(Number<1>{}, r); break;
      case 2: run(Number<2>{}, r); break;
      case 3: run(Number<3>{}, r); break;
#if PTM_ISA_AVX2
      case 4: run(Number<4>{}, r); break;
      case 5: run(Number<5>{}, r); break;
#endif
#if PTM_ISA_AVX512
      case 6: run(Number<6>{}, r); break;
      case 7: run(Number<7>{}, r); break;
#endif
    }
  }
}

#endif

}  // namespace PTM_NAMESPACE
