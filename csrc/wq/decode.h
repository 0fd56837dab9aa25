// Codes to fp32 with AVX2, in registers: outputs in two vectors of 8 ("halves").
//
//   add      part[row][half][chain] += codes of a block x inputs; `finish` makes a half's sums of it
//   each     f(input, half, 8 numbers) for a block; of 4 bits the codes 0 to 15, less no MIDDLE
//
// FP6 values are exact in bf16: their two bytes come from two tables of 16 bytes each, and the top bit
// of a code is the sign. Bytes then lie in the order of pairs: a vector has two inputs of four
// outputs, and meets a pair of inputs.
#pragma once

#include "packed.h"

#if PTM_ISA_AVX2 && !PTM_ISA_BF16

namespace PTM_NAMESPACE {

PTM_INLINE __m256i bytes_at(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
PTM_INLINE vf number(__m256i x) { return (vf)_mm256_cvtepi32_ps(x); }

template <int CHAINS>
PTM_INLINE vf sum_of(const vf* part) {
  return CHAINS == 4 ? (part[0] + part[1]) + (part[2] + part[3]) : part[0] + part[1];
}

template <int BITS>
struct Decoder;

template <>
struct Decoder<4> {
  static constexpr int64_t INPUTS = 8, BYTES = 64;
  static constexpr float MIDDLE = 8;
  explicit Decoder(const float*) {}

  // In `add` a nibble stays where it lies in its word, and the input is as much smaller.
  static float factor(int64_t k) {
    const int64_t i = (k & 7) / 2 + (k & 1) * 4;
    return i == 7 ? 1.0f : 1.0f / float(int64_t(1) << 4 * i);
  }

  template <int M, int CHAINS>
  PTM_INLINE void add(const uint8_t* p, const float* x, int64_t stride,
                      vf (&part)[M][2][CHAINS]) const {
    const __m256i w[2] = {bytes_at(p), bytes_at(p + 32)};
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
      for (int half = 0; half < 2; half++) {
        const vf code = number(i == 7 ? _mm256_srli_epi32(w[half], 28)
                                      : _mm256_and_si256(w[half], _mm256_set1_epi32(15 << 4 * i)));
        for (int m = 0; m < M; m++)
          part[m][half][i % CHAINS] += code * x[m * stride + (i & 3) * 2 + i / 4];
      }
  }
  template <int CHAINS>
  static PTM_INLINE vf finish(const vf* part) { return sum_of<CHAINS>(part); }

  template <class F>
  PTM_INLINE void each(const uint8_t* p, F f) const {
    for (int half = 0; half < 2; half++) {
      const __m256i w = bytes_at(p + 32 * half);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++)
        f((i & 3) * 2 + i / 4, half,
          number(_mm256_and_si256(_mm256_srli_epi32(w, 4 * i), _mm256_set1_epi32(15))));
    }
  }
};

template <>
struct Decoder<8> {
  static constexpr int64_t INPUTS = 4, BYTES = 64;
  static constexpr float MIDDLE = 0;  // a code is stored less 128
  explicit Decoder(const float*) {}
  static float factor(int64_t) { return 1; }

  template <class F>
  PTM_INLINE void each(const uint8_t* p, F f) const {
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
      for (int half = 0; half < 2; half++)
        f(k, half,
          number(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 16 * k + 8 * half)))));
  }
  template <int M, int CHAINS>
  PTM_INLINE void add(const uint8_t* p, const float* x, int64_t stride,
                      vf (&part)[M][2][CHAINS]) const {
    each(p, [&](int k, int half, vf code) {
      for (int m = 0; m < M; m++) part[m][half][k % CHAINS] += code * x[m * stride + k];
    });
  }
  template <int CHAINS>
  static PTM_INLINE vf finish(const vf* part) { return sum_of<CHAINS>(part); }
};

template <>
struct Decoder<6> {
  static constexpr int64_t INPUTS = 16, BYTES = 192;
  static constexpr float MIDDLE = 0;
  __m256i low[2], high[2];  // bytes of the bf16 of codes 16 t to 16 t + 15
  static float factor(int64_t) { return 1; }

  explicit Decoder(const float* values) {
    for (int t = 0; t < 2; t++) {
      alignas(32) uint8_t bytes[2][32];
      for (int i = 0; i < 32; i++) {
        const uint16_t bits = to_bf16(values[16 * t + i % 16]).bits;
        bytes[0][i] = uint8_t(bits);
        bytes[1][i] = uint8_t(bits >> 8);
      }
      low[t] = bytes_at(bytes[0]);
      high[t] = bytes_at(bytes[1]);
    }
  }

  static PTM_INLINE __m256i look_up(const __m256i* table, __m256i code) {
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(table[0], code),
                              _mm256_shuffle_epi8(table[1], code), _mm256_slli_epi16(code, 3));
  }

  // f(j, half, x, y): inputs 2 j and 2 j + 1 in turn, of outputs 0 1 | 4 5 in x and 2 3 | 6 7 in y
  template <class F>
  PTM_INLINE void pairs(const uint8_t* p, F f) const {
    const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi32(int(0xffff0000));
    const __m256i sign = _mm256_set1_epi8(-128);
    const int64_t ones = 0x0101010101010101;
    const __m256i bits4 = _mm256_set1_epi16(0x0030), bits12 = _mm256_set1_epi16(0x3000);
    const __m256i eight = _mm256_broadcastsi128_si256(_mm_set_epi64x(8 * ones, 0));
    const __m256i even_bytes = _mm256_add_epi8(_mm256_set1_epi64x(0x0606040402020000), eight);
    const __m256i odd_bytes = _mm256_add_epi8(even_bytes, _mm256_set1_epi8(1));
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
      for (int b = 0; b < 2; b++) {
        const __m256i l = bytes_at(p + 64 * b + 32 * half), h = bytes_at(p + 128 + 32 * half);
        // The byte of a word with this block's high bits, in both bytes
        const __m256i twice = _mm256_shuffle_epi8(h, b ? odd_bytes : even_bytes);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
          const __m256i four = _mm256_and_si256(odd ? _mm256_srli_epi16(l, 4) : l, nibble);
          const __m256i left = _mm256_slli_epi16(twice, odd ? 2 : 4);
          const __m256i right = odd ? _mm256_srli_epi16(twice, 2) : twice;
          const __m256i two = _mm256_or_si256(_mm256_and_si256(left, bits4),
                                              _mm256_and_si256(right, bits12));
          const __m256i code = _mm256_or_si256(four, two);
          const __m256i lower = look_up(low, code);
          const __m256i higher = _mm256_or_si256(
              look_up(high, code), _mm256_and_si256(_mm256_slli_epi16(code, 2), sign));
          const __m256i x = _mm256_unpacklo_epi8(lower, higher);
          const __m256i y = _mm256_unpackhi_epi8(lower, higher);
          f(4 * b + odd, half, (vf)_mm256_slli_epi32(x, 16), (vf)_mm256_slli_epi32(y, 16));
          f(4 * b + odd + 2, half, (vf)_mm256_and_si256(x, upper), (vf)_mm256_and_si256(y, upper));
        }
      }
  }

  template <int M, int CHAINS>
  PTM_INLINE void add(const uint8_t* p, const float* x, int64_t stride,
                      vf (&part)[M][2][CHAINS]) const {
    pairs(p, [&](int j, int half, vf a, vf b) {
      const int chain = (j & 2) % CHAINS;
      for (int m = 0; m < M; m++) {
        const vf both = (vf)_mm256_broadcast_sd((const double*)(x + m * stride + 2 * j));
        part[m][half][chain] += a * both;
        part[m][half][chain + 1] += b * both;
      }
    });
  }
  template <int CHAINS>
  static PTM_INLINE vf finish(const vf* part) {
    vf a = part[0], b = part[1];
    if (CHAINS == 4) a += part[CHAINS - 2], b += part[CHAINS - 1];
    return (vf)_mm256_hadd_ps((__m256)a, (__m256)b);
  }

  template <class F>
  PTM_INLINE void each(const uint8_t* p, F f) const {
    pairs(p, [&](int j, int half, vf a, vf b) {
      f(2 * j, half, (vf)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88));
      f(2 * j + 1, half, (vf)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd));
    });
  }
};

}  // namespace PTM_NAMESPACE
#endif
