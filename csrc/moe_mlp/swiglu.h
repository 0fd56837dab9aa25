// What happens to a finished product: silu(g) u and its derivatives, rounding, and turning back.
// Each function has an AVX-512 form and one for vectors of any width.
#pragma once

#include "../common/product.h"
#include "../common/row32.h"

namespace PTM_NAMESPACE {

#if PTM_ISA_AVX512
// 1 / (1 + 2^(-x log2 e)): 2^f on [0, 1) to 4e-6 and a reciprocal to 6e-5, a sixtieth of what
// rounding to bf16 loses. A precise exp and division here cost as much as the products.
PTM_INLINE __m512 sigmoid(__m512 x) {
  x = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
  const __m512 f = _mm512_reduce_ps(x, 1);  // x - floor(x)
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.01353418f), _mm512_set1_ps(0.05201143f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24144278f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69300383f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000259f));
  return _mm512_rcp14_ps(_mm512_add_ps(_mm512_scalef_ps(p, x), _mm512_set1_ps(1.0f)));
}
#else
PTM_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
#endif

// Features [f, f + 4) of g and u (the halves of A), 16 rows (half q of the columns) -> 2 k pairs of
// a panel of silu(g) u
inline void swiglu(const Block& c, int64_t q, int64_t f, uint32_t* to) {
  const float(*g)[16] = c.c[0][q], (*u)[16] = c.c[1][q];
#if PTM_ISA_AVX512
  auto silu_u = [&](int64_t r) {
    const __m512 gate = _mm512_load_ps(g[r]);
    return _mm512_mul_ps(_mm512_mul_ps(gate, _mm512_load_ps(u[r])), sigmoid(gate));
  };
  for (int64_t r = f; r < f + 4; r += 2)
    _mm512_store_si512(to + 8 * r, zipped(silu_u(r), silu_u(r + 1)));
#else
  auto silu_u = [&](int64_t r, int i) {
    const vf gate = load(g[r] + i);
    return gate * load(u[r] + i) * sigmoid(gate);
  };
  for (int64_t r = f; r < f + 4; r += 2)
    for (int i = 0; i < 16; i += W) {
      const vu both = zipped(silu_u(r, i), silu_u(r + 1, i));
      memcpy(to + 8 * r + i, &both, sizeof both);
    }
#endif
}

// 32 features x 16 rows, at(feature) -> rows of 32: put(row, ...) stores one
template <class At, class Put>
inline void turn_back(At at, Put put) {
#if PTM_ISA_AVX512
  __m512i r[16];
  for (int i = 0; i < 16; i++)
    r[i] = zipped(_mm512_load_ps(at(2 * i)), _mm512_load_ps(at(2 * i + 1)));
  transpose(r);
  for (int i = 0; i < 16; i++) put(i, r[i]);
#elif PTM_ISA_AVX2
  for (int i = 0; i < 16; i += 8) {
    __m256i r[2][8];
    for (int half = 0; half < 2; half++) {
      for (int j = 0; j < 8; j++) {
        const int f = 16 * half + 2 * j;
        r[half][j] = (__m256i)zipped(load(at(f) + i), load(at(f + 1) + i));
      }
      transpose(r[half]);
    }
    for (int j = 0; j < 8; j++) put(i + j, Row32{{r[0][j], r[1][j]}});
  }
#else
  for (int i = 0; i < 16; i++) {
    Row32 row;
    for (int r = 0; r < 32; r++) row.x[r] = to_bf16(at(r)[i]);
    put(i, row);
  }
#endif
}

// n rows of 16 pairs (g, u), one after another
inline void keep(const Block& c, int64_t q, bf16* to, int64_t n) {
  turn_back([&](int64_t f) { return c.c[f & 1][q][f >> 1]; },
            [&](int64_t i, const Row32& row) {
              if (i < n) stream(to + 32 * i, row);
            });
}

// Rows r and r + 1 of dh before the router's weight (scale): with s = sigmoid(g), a = g s
//
//   sums += dh a u;   du = scale dh a;   dg = scale dh u (s + a (1 - s));   pairs of scale a u
//
// hidden: pairs (g, u) of 16 features of both rows, and `next` further on of the next 16; to: rows of
// dg and, F further on, of du, `size` apart; pairs: of two panels, `stride` apart.
inline void swiglu_backward(const Block& dh, int64_t r, const bf16* const* hidden, int64_t next,
                            int64_t F, const float* scale, float* sums, bf16* to, int64_t size,
                            uint32_t* pairs, int64_t stride) {
#if PTM_ISA_AVX512
  __m512 h[2][2];
  for (int j = 0; j < 2; j++, to += size, sums += 16) {
    const __m512 w = _mm512_set1_ps(scale[j]);
    __m512 total = _mm512_load_ps(sums), by_g[2], by_u[2];
    for (int q = 0; q < 2; q++) {
      const __m512i both = _mm512_loadu_si512(hidden[j] + q * next);
      const __m512 g = (__m512)_mm512_slli_epi32(both, 16);
      const __m512 u = (__m512)_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)));
      const __m512 s = sigmoid(g), a = _mm512_mul_ps(g, s), au = _mm512_mul_ps(a, u);
      __m512 d = _mm512_load_ps(dh.c[(r + j) >> 4][q][(r + j) & 15]);
      total = _mm512_fmadd_ps(d, au, total);
      h[j][q] = _mm512_mul_ps(au, w);
      d = _mm512_mul_ps(d, w);
      by_u[q] = _mm512_mul_ps(d, a);
      by_g[q] = _mm512_mul_ps(_mm512_mul_ps(d, u), _mm512_fnmadd_ps(a, s, _mm512_add_ps(a, s)));
    }
    _mm512_store_ps(sums, total);
    _mm512_storeu_si512(to, rounded(by_g[0], by_g[1]));
    _mm512_storeu_si512(to + F, rounded(by_u[0], by_u[1]));
  }
  for (int q = 0; q < 2; q++) _mm512_store_si512(pairs + q * stride, zipped(h[0][q], h[1][q]));
#else
  float h[2][2][16];
  for (int j = 0; j < 2; j++, to += size, sums += 16) {
    const vf w = splat(scale[j]);
    for (int q = 0; q < 2; q++) {
      for (int i = 0, c = 16 * q; i < 16; i += W, c += W) {
        vu both;
        memcpy(&both, hidden[j] + q * next + 2 * i, sizeof both);
        const vf g = (vf)(both << 16), u = (vf)(both & 0xffff0000u);
        const vf d = load(dh.c[(r + j) >> 4][q][(r + j) & 15] + i), s = sigmoid(g), a = g * s;
        store(sums + i, load(sums + i) + d * a * u);
        store(to + c, d * w * u * (s + a - a * s));
        store(to + F + c, d * w * a);
        store(h[j][q] + i, w * a * u);
      }
    }
  }
  for (int q = 0; q < 2; q++)
    for (int i = 0; i < 16; i += W) {
      const vu both = zipped(load(h[0][q] + i), load(h[1][q] + i));
      memcpy(pairs + q * stride + i, &both, sizeof both);
    }
#endif
}

}  // namespace PTM_NAMESPACE
