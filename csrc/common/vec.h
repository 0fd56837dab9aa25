// Vectors of fp32 as wide as the instruction set has them, by the compiler's vector extension: the
// same source serves SSE, NEON, AVX2 and AVX-512. Loads and stores take fp32 or bf16 rows of any
// alignment; `n` < W names a ragged end.
#pragma once

#include "ptm.h"

#if PTM_ISA_AVX2
#include <immintrin.h>
#elif defined(__SSE4_1__)
#include <smmintrin.h>
#endif

namespace PTM_NAMESPACE {

constexpr int W = PTM_ISA_AVX512 ? 16 : PTM_ISA_AVX2 ? 8 : 4;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

#define PTM_INLINE inline __attribute__((always_inline))

PTM_INLINE vf splat(float x) { return vf{} + x; }

PTM_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
PTM_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

// The lower halves of words whose upper halves are 0; the compiler's own conversion takes a dozen
// instructions for it.
PTM_INLINE vh halves(vu x) {
#if PTM_ISA_AVX2 && !PTM_ISA_AVX512
  __m256i both = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08));
#elif defined(__SSE4_1__) && !PTM_ISA_AVX2
  __m128i both = _mm_packus_epi32((__m128i)x, (__m128i)x);
  vh low;
  memcpy(&low, &both, sizeof low);
  return low;
#else
  return __builtin_convertvector(x, vh);
#endif
}

// Round to nearest, ties to even; a NaN stays one. What counts is in the upper halves of the words.
PTM_INLINE vu near(vf x) {
  vu bits = (vu)x;
  return x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1);
}

// AVX-512's instruction makes numbers below 1.2e-38 zero, which the other path keeps.
PTM_INLINE vh rounded(vf x) {
#if PTM_ISA_BF16
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  return halves(near(x) >> 16);
#endif
}
#if PTM_ISA_AVX512
// 32 of bf16: those of `low`, then those of `high`
PTM_INLINE __m512i rounded(__m512 low, __m512 high) {
#if PTM_ISA_BF16
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                            23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                            45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16((__m512i)near((vf)low), _mm512_load_si512(kUpper),
                   (__m512i)near((vf)high));
#endif
}
#endif
PTM_INLINE vf widened(vh half) {
#if PTM_ISA_AVX2 && !PTM_ISA_AVX512
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)half), 16);
#else
  return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
}
PTM_INLINE vf load(const bf16* p) {
  vh half;
  memcpy(&half, p, sizeof half);
  return widened(half);
}
PTM_INLINE void store(bf16* p, vf x) {
  vh half = rounded(x);
  memcpy(p, &half, sizeof half);
}
// What a store in type T and a load would give back.
PTM_INLINE vf as_stored(const bf16*, vf x) {
#if PTM_ISA_BF16
  return widened(rounded(x));
#else
  return (vf)(near(x) & 0xffff0000u);
#endif
}
PTM_INLINE vf as_stored(const float*, vf x) { return x; }

// The first n of W; the others are 0.
template <class T>
PTM_INLINE vf load(const T* p, int64_t n) {
  T whole[W] = {};
  memcpy(whole, p, sizeof(T) * size_t(n));
  return load(whole);
}
template <class T>
PTM_INLINE void store(T* p, vf x, int64_t n) {
  T whole[W];
  store(whole, x);
  memcpy(p, whole, sizeof(T) * size_t(n));
}

PTM_INLINE float sum(vf x) {
#if PTM_ISA_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#elif PTM_ISA_AVX2
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
#endif
}

// Of a NaN and a number, b.
PTM_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
PTM_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

PTM_INLINE float largest(vf x) {
#if PTM_ISA_AVX512
  return _mm512_reduce_max_ps((__m512)x);
#else
  float most = x[0];
  for (int i = 1; i < W; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
}
PTM_INLINE float least(vf x) { return -largest(-x); }

// 2^x within 2.5e-7 of itself, by a minimax polynomial on [-1/2, 1/2]; a NaN stays one. What is too
// small for a normal number may become 0, what is too large may become 2^127.
PTM_INLINE vf vexp2(vf x) {
#if PTM_ISA_AVX512
  vf whole = (vf)_mm512_roundscale_ps((__m512)x, 8);
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  x = vmin(splat(127.0f), vmax(splat(-126.0f), x));
  vf shifted = x + magic, whole = shifted - magic;
#endif
  vf r = x - whole;
  vf p = r * 1.327647198e-3f + 9.675541334e-3f;
  p = p * r + 5.550713274e-2f;
  p = p * r + 2.402211972e-1f;
  p = p * r + 6.931469671e-1f;
  p = p * r + 1.0f;
#if PTM_ISA_AVX512
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return p * (vf)(((vi)shifted - (vi)magic + 127) << 23);
#endif
}

constexpr float LOG2E = 1.44269504f;

// e^x; the rounding of x log2(e) adds 6e-8 |x| to the relative error of vexp2.
PTM_INLINE vf vexp(vf x) { return vexp2(x * LOG2E); }

// for_lanes(n, f): f(offset, lanes) over [0, n) in steps of W; lanes is W as a constant but at the
// ragged end.
struct Whole {};
struct Ragged {
  int64_t n;
};
template <class T>
PTM_INLINE vf load(const T* p, Whole) {
  return load(p);
}
template <class T>
PTM_INLINE vf load(const T* p, Ragged end) {
  return load(p, end.n);
}
template <class T>
PTM_INLINE void store(T* p, vf x, Whole) {
  store(p, x);
}
template <class T>
PTM_INLINE void store(T* p, vf x, Ragged end) {
  store(p, x, end.n);
}
template <class F>
PTM_INLINE void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Whole{});
  if (i < n) f(i, Ragged{n - i});
}

}  // namespace PTM_NAMESPACE
