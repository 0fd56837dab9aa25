// Rows of 32 elements from a product to memory: rounded to bf16 or in fp32, through the caches or
// past them.
#pragma once

#include "vec.h"

#if PTM_ISA_AVX2
#include <immintrin.h>
#endif

namespace PTM_NAMESPACE {

// 32 elements of a row
#if PTM_ISA_AVX512
typedef __m512i Row32;

PTM_INLINE Row32 rounded(const float* first, const float* second) {
  return rounded(_mm512_load_ps(first), _mm512_load_ps(second));
}
PTM_INLINE void put(bf16* to, Row32 row) { _mm512_storeu_si512(to, row); }
#elif PTM_ISA_AVX2
struct Row32 {
  __m256i x[2];
};

PTM_INLINE Row32 rounded(const float* first, const float* second) {
  Row32 row;
  for (int i = 0; i < 2; i++) {
    const float* from = i ? second : first;
    const __m256i low = (__m256i)(near(load(from)) >> 16);
    const __m256i high = (__m256i)(near(load(from + 8)) >> 16);
    row.x[i] = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  }
  return row;
}
PTM_INLINE void put(bf16* to, const Row32& row) {
  _mm256_storeu_si256((__m256i*)to, row.x[0]);
  _mm256_storeu_si256((__m256i*)(to + 16), row.x[1]);
}
#else
struct Row32 {
  bf16 x[32];
};

inline Row32 rounded(const float* first, const float* second) {
  Row32 row;
  for (int i = 0; i < 16; i += W) {
    store(row.x + i, load(first + i));
    store(row.x + 16 + i, load(second + i));
  }
  return row;
}
inline void put(bf16* to, const Row32& row) { memcpy((void*)to, row.x, sizeof row.x); }
#endif

// The same past the caches, for whole lines that nobody reads soon: a store would fetch them first.
inline void stream(bf16* to, const Row32& row) {
#if PTM_ISA_AVX512
  if ((uintptr_t(to) & 63) == 0) return _mm512_stream_si512((__m512i*)to, row);
#elif PTM_ISA_AVX2
  if ((uintptr_t(to) & 63) == 0) {
    _mm256_stream_si256((__m256i*)to, row.x[0]);
    return _mm256_stream_si256((__m256i*)(to + 16), row.x[1]);
  }
#endif
  put(to, row);
}

// 16 floats, likewise
inline void stream(float* to, const float* from) {
#if PTM_ISA_AVX512
  if ((uintptr_t(to) & 63) == 0) return _mm512_stream_ps(to, _mm512_load_ps(from));
#elif PTM_ISA_AVX2
  if ((uintptr_t(to) & 31) == 0) {
    _mm256_stream_ps(to, _mm256_load_ps(from));
    return _mm256_stream_ps(to + 8, _mm256_load_ps(from + 8));
  }
#endif
  memcpy(to, from, 64);
}

inline void add(float* to, const float* from) {
  for (int i = 0; i < 16; i += W) store(to + i, load(to + i) + load(from + i));
}

// Gradients of weights: rounded to bf16, or in fp32, over what is there or added to it
enum Into : int64_t { kRounded, kExact, kAdded };

// 32 sums to element `at`
inline void put_sums(Into into, void* to, int64_t at, const float* first, const float* second) {
  if (into == kRounded) return stream((bf16*)to + at, rounded(first, second));
  for (int half = 0; half < 2; half++) {
    float* there = (float*)to + at + 16 * half;
    const float* from = half ? second : first;
    into == kExact ? stream(there, from) : add(there, from);
  }
}

}  // namespace PTM_NAMESPACE
