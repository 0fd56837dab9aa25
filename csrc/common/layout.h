// How rows are laid out for the products of product.h, and the ways there.
//
//   A   16 rows x 32 k of bf16; any row-major matrix is made of such blocks, so weights are used as
//       they lie in memory
//   B   "panels" of 16 columns: one after another their k pairs, each 16 dwords of (k, k+1)
//
//   columns_of   16 rows (pointers) become the columns of one panel: 16 x 16 dwords are transposed
//   pair_rows    rows k, k+1 become one k pair of as many panels as they are wide: no transposition
//   turned       the columns of a row-major matrix become A blocks
//
// Each has a form with AVX-512, most one with AVX2, and a plain one with the same result.
#pragma once

#include "vec.h"

namespace PTM_NAMESPACE {

constexpr int64_t kTile = 16;   // rows and columns of a block, k pairs of a step
constexpr int64_t kStep = 32;   // k of a step; rows, columns and k come in multiples of it
constexpr int64_t kBlockA = kTile * kStep;

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline void prefetch(const bf16* p) { __builtin_prefetch(p); }

// dwords of a panel with k deep
inline int64_t panel(int64_t k) { return k / 2 * kTile; }

#if PTM_ISA_AVX512

inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// dwords (a[i], b[i]) of the lower and of the upper half
inline void zip(__m512i a, __m512i b, __m512i& lower, __m512i& upper) {
  alignas(64) static constexpr uint16_t kLower[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                            37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                            11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i lo = _mm512_load_si512(kLower);
  lower = _mm512_permutex2var_epi16(a, lo, b);
  upper = _mm512_permutex2var_epi16(a, _mm512_add_epi16(lo, _mm512_set1_epi16(16)), b);
}

// Two rows of 16 floats, rounded: dwords (a[i], b[i])
inline __m512i zipped(__m512 a, __m512 b) {
#if PTM_ISA_BF16
  alignas(64) static constexpr uint16_t kHalves[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kHalves),
                  rounded(a, b));
#else
  return (__m512i)(near((vf)a) >> 16 | (near((vf)b) & 0xffff0000u));
#endif
}

#else

// Two rows of W floats, rounded: dwords (a[i], b[i])
PTM_INLINE vu zipped(vf a, vf b) { return near(a) >> 16 | (near(b) & 0xffff0000u); }

#if PTM_ISA_AVX2

PTM_INLINE void transpose(__m256i r[8]) {  // of 8 x 8 dwords
  __m256i t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

PTM_INLINE void transpose(__m128i r[8]) {  // of 8 x 8 words of 16 bits
  __m128i t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm_unpacklo_epi16(r[i], r[i + 4]);
    t[2 * i + 1] = _mm_unpackhi_epi16(r[i], r[i + 4]);
  }
  for (int i = 0; i < 4; i++) {
    r[2 * i] = _mm_unpacklo_epi16(t[i], t[i + 4]);
    r[2 * i + 1] = _mm_unpackhi_epi16(t[i], t[i + 4]);
  }
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm_unpacklo_epi16(r[i], r[i + 4]);
    t[2 * i + 1] = _mm_unpackhi_epi16(r[i], r[i + 4]);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

#endif
#endif

// 16 rows of k elements (a null row is zeros) -> one panel
inline void columns_of(const bf16* const* rows, int64_t k, uint32_t* to) {
  for (int64_t j = 0; j < k; j += kStep, to += 256) {
#if PTM_ISA_AVX512
    __m512i r[16];
    for (int i = 0; i < 16; i++)
      r[i] = rows[i] ? _mm512_loadu_si512(rows[i] + j) : _mm512_setzero_si512();
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + 16 * i, r[i]);
#else
    for (int i = 0; i < 16; i++)
      for (int p = 0; p < 16; p++) {
        to[16 * p + i] = 0;
        if (rows[i]) memcpy(to + 16 * p + i, rows[i] + j + 2 * p, 4);
      }
#endif
  }
}

// Rows k and k+1, columns [0, n) -> a k pair of n/16 panels that lie `stride` dwords apart
inline void pair_rows(const bf16* a, const bf16* b, int64_t n, uint32_t* to, int64_t stride) {
  for (int64_t j = 0; j < n; j += kStep, to += 2 * stride) {
#if PTM_ISA_AVX512
    const __m512i zero = _mm512_setzero_si512();
    __m512i lower, upper;
    zip(a ? _mm512_loadu_si512(a + j) : zero, b ? _mm512_loadu_si512(b + j) : zero, lower,
      upper);
    _mm512_store_si512(to, lower);
    _mm512_store_si512(to + stride, upper);
#elif PTM_ISA_AVX2
    for (int i = 0; i < 32; i += 16) {
      const __m256i zero = _mm256_setzero_si256();
      const __m256i even = a ? _mm256_loadu_si256((const __m256i*)(a + j + i)) : zero;
      const __m256i odd = b ? _mm256_loadu_si256((const __m256i*)(b + j + i)) : zero;
      const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
      __m256i* pair = (__m256i*)(to + i / 16 * stride);
      _mm256_store_si256(pair, _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_store_si256(pair + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
#else
    for (int i = 0; i < 32; i++) {
      const uint32_t low = a ? a[j + i].bits : 0, high = b ? b[j + i].bits : 0;
      to[(i >> 4) * stride + (i & 15)] = low | high << 16;
    }
#endif
  }
}

// Columns [0, 32) of k rows -> A blocks of 32 rows: [2][k/32][16][32]
inline void turned(const bf16* from, int64_t stride, int64_t k, bf16* to) {
  bf16 *first = to, *second = to + k * kTile;
  for (int64_t j = 0; j < k; j += kStep, first += kBlockA, second += kBlockA) {
#if PTM_ISA_AVX512
    __m512i x[16], y[16];
    for (int p = 0; p < 16; p++)
      zip(_mm512_loadu_si512(from + (j + 2 * p) * stride),
        _mm512_loadu_si512(from + (j + 2 * p + 1) * stride), x[p], y[p]);
    transpose(x);
    transpose(y);
    for (int i = 0; i < 16; i++) {
      _mm512_store_si512(first + kStep * i, x[i]);
      _mm512_store_si512(second + kStep * i, y[i]);
    }
#elif PTM_ISA_AVX2
    for (int p = 0; p < 32; p += 8)
      for (int i = 0; i < 32; i += 8) {
        __m128i r[8];
        for (int k = 0; k < 8; k++)
          r[k] = _mm_loadu_si128((const __m128i*)(from + (j + p + k) * stride + i));
        transpose(r);
        bf16* block = (i < 16 ? first : second) + i % 16 * kStep + p;
        for (int k = 0; k < 8; k++) _mm_store_si128((__m128i*)(block + k * kStep), r[k]);
      }
#else
    for (int p = 0; p < 32; p++)
      for (int i = 0; i < 16; i++) {
        first[kStep * i + p] = from[(j + p) * stride + i];
        second[kStep * i + p] = from[(j + p) * stride + 16 + i];
      }
#endif
  }
}

}  // namespace PTM_NAMESPACE
