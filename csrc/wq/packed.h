// How quantized weights lie in memory for the kernels, and how codes become numbers.
//
// Outputs go in panels of 16: a lane of a vector is an output, so nothing is summed across lanes and
// a group's scales are one vector. Inputs go in pairs, the order that VDPBF16PS and an AMX B tile
// want: decoding a block yields rows r of 16 x 2 bf16, row r holding inputs 2r and 2r+1 of all 16.
//
//   4 bits   block = 8 inputs, 64 bytes: word 2n+h of output n, nibble j = code of input 2j+h
//   6 bits   block = 16 inputs, 192 bytes: two such blocks of the low four bits (inputs 0-7, 8-15),
//            then 64 bytes of the high two: word 2n+h, bits 2j and 2j+1 = those of input 2j+h
//   8 bits   block = 4 inputs, 64 bytes: byte 16k+n = code of input k less 128, signed
//
// codes (panels, inputs up to 32, ...); scale fp16 or fp32 (panels, groups, 16); zero int8, less its
// middle, likewise or null; values fp32 (2^bits,), of each code at scale 1: integers less the
// middle, or of 6 bits numbers whose sign is the top bit.
// Each is exact in bf16, so a product with bf16 rows is rounded in the fp32 sums only: weights are
// never rounded, as a group's scale multiplies the group's sum.
#pragma once

#include "../common/vec.h"

namespace PTM_NAMESPACE {

constexpr int64_t PANEL = 16;
constexpr int64_t GRAIN = 4;     // panels of a part
constexpr int64_t AHEAD = 2048;  // bytes of codes asked for before their use

struct Packed {
  const uint8_t* codes;
  const void* scale;
  const int8_t* zero;
  const float* values;
  int64_t bits, is_half, N, K, group;  // K is padded; a group is a multiple of 32, or all of K

  int64_t panels() const { return (N + PANEL - 1) / PANEL; }
  int64_t groups() const { return (K + group - 1) / group; }
  int64_t panel_bytes() const { return PANEL * K * bits / 8; }
  int64_t scale_bytes() const { return panels() * groups() * PANEL * (is_half ? 2 : 4); }
};

PTM_INLINE int64_t outputs_of(const Packed& w, int64_t p) {
  return w.N - p * PANEL < PANEL ? w.N - p * PANEL : PANEL;
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff, bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000u | (rest & 0x3ff) << 13;
  } else {  // times 2^112 moves the exponent's bias, and makes normal what was not
    float value;
    uint32_t shifted = rest << 13, power = 0x77800000u;
    float up;
    memcpy(&value, &shifted, 4);
    memcpy(&up, &power, 4);
    value *= up;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

// 16 scales of panel p, group g.
PTM_INLINE void load_scales(const Packed& w, int64_t p, int64_t g, float* to) {
  int64_t at = (p * w.groups() + g) * PANEL;
  for (int64_t n = 0; n < PANEL; n++)
    to[n] = w.is_half ? half_to_float(((const uint16_t*)w.scale)[at + n])
                      : ((const float*)w.scale)[at + n];
}

// Input k of panel p, all 16 outputs, at scale 1.
inline void decode_input(const Packed& w, int64_t p, int64_t k, float* to) {
  const uint8_t* panel = w.codes + p * w.panel_bytes();
  if (w.bits == 8) {
    const int8_t* row = (const int8_t*)panel + k * PANEL;
    for (int64_t n = 0; n < PANEL; n++) to[n] = row[n];
    return;
  }
  int64_t j = (k & 7) >> 1, h = k & 1;
  const uint8_t* low = panel + (w.bits == 4 ? (k >> 3) * 64 : (k >> 4) * 192 + ((k >> 3) & 1) * 64);
  const uint8_t* high = panel + (k >> 4) * 192 + 128;
  for (int64_t n = 0; n < PANEL; n++) {
    int64_t byte = (2 * n + h) * 2;
    int code = (low[byte + (j >> 1)] >> (4 * (j & 1))) & 15;
    if (w.bits == 6) {
      int64_t i = (k & 15) >> 1;
      code |= ((high[byte + (i >> 2)] >> (2 * (i & 3))) & 3) << 4;
    }
    to[n] = w.values[code];
  }
}

#if PTM_ISA_BF16

PTM_INLINE __m512 scales_of(const Packed& w, int64_t p, int64_t g) {
  int64_t at = (p * w.groups() + g) * PANEL;
  if (w.is_half)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)w.scale + at)));
  return _mm512_loadu_ps((const float*)w.scale + at);
}
PTM_INLINE __m512 zeros_of(const Packed& w, int64_t p, int64_t g) {
  const int8_t* at = w.zero + (p * w.groups() + g) * PANEL;
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
}

template <int BITS>
struct Decoder {
  static constexpr int ROWS = BITS == 4 ? 4 : BITS == 6 ? 8 : 2;
  static constexpr int64_t BYTES = BITS == 6 ? 192 : 64;
  __m512i table[2];

  explicit Decoder(const float* values) {
    alignas(64) uint16_t bits[64];
    for (int i = 0; i < 64; i++) bits[i] = BITS == 8 ? 0 : to_bf16(values[i % (1 << BITS)]).bits;
    table[0] = _mm512_load_si512(bits);
    table[1] = _mm512_load_si512(bits + 32);
  }

  // f(r, row) for the rows of one block; r is a constant after unrolling.
  template <class F>
  PTM_INLINE void block(const uint8_t* p, F f) const {
    if constexpr (BITS == 4) {  // VPERMW minds five bits, and both halves of the table agree
      __m512i w = _mm512_loadu_si512(p);
      f(0, _mm512_permutexvar_epi16(w, table[0]));
      f(1, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), table[0]));
      f(2, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), table[0]));
      f(3, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), table[0]));
    } else if constexpr (BITS == 6) {  // VPERMT2W minds six
      __m512i low[2] = {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 64)};
      __m512i high = _mm512_loadu_si512(p + 128);
      const __m512i nibble = _mm512_set1_epi16(15);
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++) {
        __m512i l = _mm512_srli_epi16(low[r / 4], 4 * (r % 4));
        __m512i h = r < 2 ? _mm512_slli_epi16(high, 4 - 2 * r) : _mm512_srli_epi16(high, 2 * r - 4);
        __m512i code = _mm512_ternarylogic_epi32(nibble, l, h, 0xca);  // nibble ? l : h
        f(r, _mm512_permutex2var_epi16(table[0], code, table[1]));
      }
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < 2; r++) {
        __m512i even = wide(p + 32 * r), odd = wide(p + 32 * r + 16);
        const __m512i top = _mm512_set1_epi32(int(0xffff0000));
        f(r, _mm512_ternarylogic_epi32(top, odd, _mm512_srli_epi32(even, 16), 0xca));
      }
    }
  }

  static PTM_INLINE __m512i wide(const uint8_t* p) {
    __m512i x = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(x));
  }
};

#endif

}  // namespace PTM_NAMESPACE
