// Vectors of fp32 as wide as the instruction set has them, by the compiler's vector extension: the
// same source serves SSE, NEON and AVX-512. Loads and stores take fp32 or bf16 rows of any
// alignment; `n` < W names a ragged end.
#pragma once

#include "ptm.h"

#if PTM_ISA_AVX512
#include <immintrin.h>
#endif

namespace PTM_NAMESPACE {

constexpr int W = PTM_ISA_AVX512 ? 16 : 4;
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
PTM_INLINE vf load(const bf16* p) {
  vh half;
  memcpy(&half, p, sizeof half);
  return (vf)(__builtin_convertvector(half, vu) << 16);
}
PTM_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

PTM_INLINE vu rounded_bits(vf x) {
  vu bits = (vu)x;
  vu near = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  vu is_nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
  return (near & ~is_nan) | (((bits >> 16) | 0x40) & is_nan);
}
PTM_INLINE void store(bf16* p, vf x) {
  vh half = __builtin_convertvector(rounded_bits(x), vh);
  memcpy(p, &half, sizeof half);
}
// What a store in type T and a load would give back.
PTM_INLINE vf as_stored(const bf16*, vf x) { return (vf)(rounded_bits(x) << 16); }
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
#else
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
#endif
}

PTM_INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
PTM_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
PTM_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }

// e^x to 2 units in the last place (Cephes' polynomial); x is held to [-87, 88].
PTM_INLINE vf vexp(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  x = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
  vf shifted = x * 1.44269504f + magic;
  vf whole = shifted - magic;
  vf r = x - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vi power = ((vi)shifted - (vi)magic + 127) << 23;
  return p * (vf)power;
}

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
