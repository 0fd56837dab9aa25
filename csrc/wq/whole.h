// Up to MOST rows in bf16 against packed weights by VPDPBUSD, which multiplies bytes: four inputs of
// 16 outputs at a time, and decoding is an AND.
//
// A code is a byte as it is (of FP6 E2M3: eight times its number, from a table of 64). The inputs of
// a piece, a group or 512 of it, are whole numbers of 22 bits and a sign times a power of two, in
// three digits of 8 bits with signs: what is rounded is less than 2^-22 of the largest of them.
// Sums of digits times codes are exact, in int32; they begin with minus the digits' sum times what
// a code is too large by.
#pragma once

#include "packed.h"

#if PTM_ISA_BF16

namespace PTM_NAMESPACE {

constexpr int64_t PIECE = 512;
constexpr int DIGITS = 3;
// From 3 rows on VDPBF16PS is faster where it is what it should be; where there are tiles it is slow.
constexpr int MOST = PTM_ISA_AMX ? 4 : 2;

// Whether codes are bytes times one number: integers are, and E2M3, whose least number is 1/8.
inline bool is_whole(const Packed& w) {
  if (w.group > PIECE && w.group % PIECE && w.group < w.K) return false;
  if (w.bits != 6) return true;
  for (int i = 0; i < 64; i++) {
    const float eight = 8 * w.values[i];
    if (eight != float(int(eight)) || eight < -64 || eight > 63) return false;
  }
  return true;
}

template <int BITS>
struct Bytes {
  static constexpr int INPUTS = BITS == 4 ? 8 : BITS == 6 ? 16 : 4;  // of a block
  static constexpr int64_t BYTES = BITS == 6 ? 192 : 64;
  static constexpr int MIDDLE = BITS == 4 ? 8 : BITS == 6 ? 64 : 128;
  static constexpr float UNIT = BITS == 6 ? 0.125f : 1.0f;
  __m512i table, first, second;

  explicit Bytes(const float* values) {
    alignas(64) uint8_t bytes[64], at[2][64];
    for (int i = 0; i < 64; i++) {
      if constexpr (BITS == 8) {
        bytes[i] = uint8_t(i % 4 * PANEL + i / 4);  // byte 4n+k of a block's 16k+n
      } else if constexpr (BITS == 6) {
        bytes[i] = uint8_t(MIDDLE + int(8 * values[i]));
        // Two bits of an input (word h of an output, bits 2j) to the bits above its low four:
        // bytes of an output are h = 0, j = 0, 2, h = 1, j = 0, 2
        for (int odd = 0; odd < 2; odd++)
          at[odd][i] = uint8_t((32 * (i / 4 % 2) + 16 * (i / 2 % 2) + 4 * (i % 2) + 2 * odd - 4) & 63);
      }
    }
    table = _mm512_load_si512(bytes);
    first = _mm512_load_si512(at[0]);
    second = _mm512_load_si512(at[1]);
  }

  // f(i, bytes): four inputs of 16 outputs, in the order of `order`
  template <class F>
  PTM_INLINE void block(const uint8_t* p, F f) const {
    const __m512i nibble = _mm512_set1_epi8(15);
    if constexpr (BITS == 4) {
      const __m512i w = _mm512_loadu_si512(p);
      f(0, _mm512_and_si512(w, nibble));
      f(1, _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble));
    } else if constexpr (BITS == 6) {
      const __m512i high = _mm512_loadu_si512(p + 128);
#pragma GCC unroll 2
      for (int b = 0; b < 2; b++) {
        const __m512i low = _mm512_loadu_si512(p + 64 * b);
        const __m512i of_b = _mm512_set1_epi8(char(8 * b));
        auto number = [&](__m512i four, __m512i at) {
          const __m512i two = _mm512_multishift_epi64_epi8(_mm512_add_epi8(at, of_b), high);
          return _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(nibble, four, two, 0xca), table);
        };
        f(2 * b, number(low, first));
        f(2 * b + 1, number(_mm512_srli_epi16(low, 4), second));
      }
    } else {
      const __m512i w = _mm512_permutexvar_epi8(table, _mm512_loadu_si512(p));
      f(0, _mm512_xor_si512(w, _mm512_set1_epi8(-128)));
    }
  }

  // Which of 8 inputs each byte of two dwords belongs to
  static __m128i order() {
    if (BITS == 8) return _mm_set_epi64x(0x0f0e0d0c0b0a0908, 0x0706050403020100);
    return _mm_set_epi64x(0x0f0b0e0a0d090c08, 0x0703060205010400);
  }
};

// Rows as digits: bytes [m][digit][K]; of each piece the sums of its digits and its unit.
struct Digits {
  int8_t* bytes;
  int32_t* sums;  // [m][piece][DIGITS]
  float* unit;    // [m][piece]
};

inline int64_t pieces_of(const Packed& w) {
  const int64_t piece = w.group < PIECE ? w.group : PIECE;
  return (w.K + piece - 1) / piece;
}

template <int BITS>
void to_digits(const bf16* x, int64_t inputs, const Packed& w, int8_t* bytes, int32_t* sums,
               float* unit) {
  const __m128i order = Bytes<BITS>::order();
  const int64_t piece = w.group < PIECE ? w.group : PIECE;
  auto sixteen = [&](int64_t k) {
    const int64_t left = inputs - k;
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, x + k);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  for (int64_t k0 = 0; k0 < w.K; k0 += piece, sums += DIGITS, unit++) {
    const int64_t end = k0 + piece < w.K ? k0 + piece : w.K;
    __m512i most = {};  // of |x|, as the bits of a float are in their order
    for (int64_t k = k0; k < end; k += 16)
      most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(sixteen(k)),
                                                     _mm512_set1_epi32(0x7fffffff)));
    const int exponent = (_mm512_reduce_max_epi32(most) >> 23) - 127;
    const int power = exponent < -100 ? 121 : 21 - exponent;
    // Beyond all numbers: NaN, as its outputs are
    *unit = exponent == 128 ? __builtin_nanf("") : __builtin_ldexpf(Bytes<BITS>::UNIT, -power);
    const __m512 factor = _mm512_set1_ps(__builtin_ldexpf(1, power));
    __m512i total[DIGITS] = {};
    for (int64_t k = k0; k < end; k += 16) {
      __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(sixteen(k), factor));
#pragma GCC unroll 3
      for (int d = 0; d < DIGITS; d++) {
        const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(left, 24), 24);
        left = _mm512_srai_epi32(_mm512_sub_epi32(left, digit), 8);
        total[d] = _mm512_add_epi32(total[d], digit);
        _mm_storeu_si128((__m128i*)(bytes + d * w.K + k),
                         _mm_shuffle_epi8(_mm512_cvtepi32_epi8(digit), order));
      }
    }
    for (int d = 0; d < DIGITS; d++) sums[d] = _mm512_reduce_add_epi32(total[d]);
  }
}

// M rows against P panels, which are read side by side: memory gives more to several streams.
// sums (P, M, 16)
template <int BITS, int M, int P>
void whole_panels(const Digits& x, const Packed& w, const Bytes<BITS>& decoder, int64_t p,
                  float* sums) {
  using B = Bytes<BITS>;
  const int64_t piece = w.group < PIECE ? w.group : PIECE, pieces = pieces_of(w);
  const uint8_t* codes = w.codes + p * w.panel_bytes();
  __m512 total[P][M] = {};
  for (int64_t i = 0, k = 0; k < w.K; i++) {
    const int64_t end = k + piece < w.K ? k + piece : w.K, g = k / w.group;
    __m512i sum[P][M][DIGITS];
#pragma GCC unroll 4
    for (int q = 0; q < P; q++) {
      __m512i shift = _mm512_set1_epi32(-B::MIDDLE);
      if (w.zero) {
        const int8_t* zero = w.zero + ((p + q) * w.groups() + g) * PANEL;
        shift = _mm512_sub_epi32(shift, _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)zero)));
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; d++)
          sum[q][m][d] = _mm512_mullo_epi32(
              shift, _mm512_set1_epi32(x.sums[(m * pieces + i) * DIGITS + d]));
    }
    for (; k < end; k += B::INPUTS, codes += B::BYTES) {
#pragma GCC unroll 4
      for (int q = 0; q < P; q++) {
        const uint8_t* from = codes + q * w.panel_bytes();
#pragma GCC unroll 3
        for (int64_t line = 0; line < B::BYTES; line += 64)
          _mm_prefetch((const char*)from + AHEAD + line, _MM_HINT_T0);
        decoder.block(from, [&](int four, __m512i bytes) {
#pragma GCC unroll 4
          for (int m = 0; m < M; m++)
#pragma GCC unroll 3
            for (int d = 0; d < DIGITS; d++) {
              int32_t inputs;
              memcpy(&inputs, x.bytes + (m * DIGITS + d) * w.K + k + 4 * four, 4);
              sum[q][m][d] =
                  _mm512_dpbusd_epi32(sum[q][m][d], bytes, _mm512_set1_epi32(inputs));
            }
        });
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < P; q++) {
      const __m512 scale = scales_of(w, p + q, g);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        __m512 all = _mm512_cvtepi32_ps(sum[q][m][DIGITS - 1]);
#pragma GCC unroll 2
        for (int d = DIGITS - 2; d >= 0; d--)
          all = _mm512_fmadd_ps(all, _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum[q][m][d]));
        all = _mm512_mul_ps(all, _mm512_set1_ps(x.unit[m * pieces + i]));
        total[q][m] = _mm512_fmadd_ps(all, scale, total[q][m]);
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < P; q++)
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) _mm512_storeu_ps(sums + (q * M + m) * PANEL, total[q][m]);
}

template <int BITS, int M, class F>
int whole_rows(const bf16* x, int64_t inputs, int64_t rows, const Packed& w, int64_t threads,
               F take) {
  if constexpr (M > 1)
    if (rows < M) return whole_rows<BITS, M - 1>(x, inputs, rows, w, threads, take);
  constexpr int P = M == 1 ? 4 : M < 4 ? 2 : 1;  // as many as there are registers for
  static_assert(GRAIN % P == 0);
  const int64_t pieces = pieces_of(w);
  Scratch<int8_t> bytes(M * DIGITS * w.K);
  Scratch<int32_t> sums(M * pieces * DIGITS);
  Scratch<float> unit(M * pieces);
  if (!bytes.data || !sums.data || !unit.data) return PTM_NO_MEMORY;
  for (int64_t m = 0; m < M; m++)
    to_digits<BITS>(x + m * inputs, inputs, w, bytes.data + m * DIGITS * w.K,
                    sums.data + m * pieces * DIGITS, unit.data + m * pieces);
  const Digits digits{bytes.data, sums.data, unit.data};
  const Bytes<BITS> decoder(w.values);
  parallel_for(w.panels(), GRAIN, threads, [&](int64_t begin, int64_t end) {
    float found[P * M * PANEL];
    for (int64_t p = begin; p < end;) {
      const int count = end - p < P ? 1 : P;
      if (count == P)
        whole_panels<BITS, M, P>(digits, w, decoder, p, found);
      else
        whole_panels<BITS, M, 1>(digits, w, decoder, p, found);
      for (int q = 0; q < count; q++, p++)
        for (int m = 0; m < M; m++)
          take(m, p * PANEL, found + (q * M + m) * PANEL, outputs_of(w, p));
    }
  });
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE
#endif
