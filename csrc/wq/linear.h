// rows x weights^T with the weights of packed.h, with AVX-512 in four ways (without: wide.h):
//
//   whole    one row, and as many more as whole.h says: codes are bytes, rows are bytes three times
//   few rows (up to 2 of E3M2; any number without AMX, 8 at a time)
//            codes become bf16 in registers and meet pairs of inputs by VDPBF16PS
//   more     rows become AMX tiles, as many as half of L2 holds; 32 outputs of up to 256 inputs
//            become tiles in L1 (16 KiB), 256 rows pass over them in steps of 32, and the sums leave
//            the tiles once a group, times its scale
//   plain    fp32 rows
//
// What becomes of the sums is the caller's: take(row, first output, sums, how many: up to 32).
#pragma once

#include "../common/amx.h"
#include "../common/room.h"
#include "packed.h"
#include "whole.h"
#include "wide.h"

namespace PTM_NAMESPACE {

#if PTM_ISA_BF16

// The sum of a row's inputs in each group, for zero points.
template <class T>
void group_sums(const T* x, int64_t inputs, const Packed& w, float* to) {
  for (int64_t g = 0; g < w.groups(); g++) {
    int64_t last = (g + 1) * w.group < inputs ? (g + 1) * w.group : inputs;
    to[g] = 0;
    for (int64_t k = g * w.group; k < last; k++) to[g] += to_float(x[k]);
  }
}

template <class T, class F>
void plain_panel(const T* x, int64_t inputs, int64_t M, const float* sums, const Packed& w,
                 int64_t p, F take) {
  constexpr int64_t AT_ONCE = 4, STEP = 32;
  alignas(64) float decoded[STEP][PANEL], scale[PANEL], part[AT_ONCE][PANEL], out[AT_ONCE][PANEL];
  int64_t G = w.groups();
  for (int64_t m0 = 0; m0 < M; m0 += AT_ONCE) {
    int64_t rows = M - m0 < AT_ONCE ? M - m0 : AT_ONCE;
    memset(out, 0, sizeof out);
    for (int64_t g = 0; g < G; g++) {
      int64_t last = (g + 1) * w.group < inputs ? (g + 1) * w.group : inputs;
      memset(part, 0, sizeof part);
      for (int64_t k0 = g * w.group; k0 < last; k0 += STEP) {
        int64_t count = last - k0 < STEP ? last - k0 : STEP;
        for (int64_t k = 0; k < count; k++) decode_input(w, p, k0 + k, decoded[k]);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t k = 0; k < count; k++) {
            float one = to_float(x[(m0 + r) * inputs + k0 + k]);
            for (int64_t n = 0; n < PANEL; n += W)
              store(part[r] + n, load(part[r] + n) + load(decoded[k] + n) * one);
          }
      }
      load_scales(w, p, g, scale);
      const int8_t* zero = w.zero ? w.zero + (p * G + g) * PANEL : nullptr;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < PANEL; n++) {
          float shift = zero ? zero[n] * sums[(m0 + r) * G + g] : 0.0f;
          out[r][n] += scale[n] * (part[r][n] - shift);
        }
    }
    for (int64_t r = 0; r < rows; r++) take(m0 + r, p * PANEL, out[r], outputs_of(w, p));
  }
}

// M rows of pairs of bf16 against panel p.
template <int BITS, int M, class F>
void few_rows_panel(const uint32_t* x, const float* sums, const Packed& w,
                    const Decoder<BITS>& decoder, int64_t p, int64_t m0, F take) {
  using D = Decoder<BITS>;
  constexpr int CHAINS = M == 1 && D::ROWS >= 4 ? 4 : 2;
  __m512 total[M] = {};
  const uint8_t* codes = w.codes + p * w.panel_bytes();
  int64_t G = w.groups(), pairs = w.K / 2;
  for (int64_t g = 0, r = 0; g < G; g++) {
    int64_t last = (g + 1) * w.group / 2 < pairs ? (g + 1) * w.group / 2 : pairs;
    __m512 part[M][CHAINS] = {};
    for (; r < last; r += D::ROWS, codes += D::BYTES) {
      for (int64_t line = 0; line < D::BYTES; line += 64)
        _mm_prefetch((const char*)codes + AHEAD + line, _MM_HINT_T0);
      decoder.block(codes, [&](int i, __m512i row) {
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          __m512i pair = _mm512_set1_epi32(int(x[m * pairs + r + i]));
          part[m][i % CHAINS] =
              _mm512_dpbf16_ps(part[m][i % CHAINS], (__m512bh)row, (__m512bh)pair);
        }
      });
    }
    __m512 scale = scales_of(w, p, g);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      __m512 sum = part[m][0];
      for (int c = 1; c < CHAINS; c++) sum = _mm512_add_ps(sum, part[m][c]);
      if (w.zero) sum = _mm512_fnmadd_ps(zeros_of(w, p, g), _mm512_set1_ps(sums[m * G + g]), sum);
      total[m] = _mm512_fmadd_ps(sum, scale, total[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    alignas(64) float out[PANEL];
    _mm512_store_ps(out, total[m]);
    take(m0 + m, p * PANEL, out, outputs_of(w, p));
  }
}

template <int BITS, int M, class F>
void few_rows(const uint32_t* x, int64_t rows, const float* sums, const Packed& w,
              const Decoder<BITS>& decoder, int64_t p, int64_t m0, F take) {
  if (rows == M)
    few_rows_panel<BITS, M>(x, sums, w, decoder, p, m0, take);
  else if constexpr (M > 1)
    few_rows<BITS, M - 1>(x, rows, sums, w, decoder, p, m0, take);
}

#if PTM_ISA_AMX

constexpr int64_t FEW = 2;
constexpr int64_t WIDE = 8;                // panels of a part
constexpr int64_t IN_L2 = 1 << 20;         // bytes of rows
constexpr int64_t DEEP = 256, TALL = 256;  // inputs that stay in L1, rows whose sums lie near
constexpr int64_t TILE = 512;              // bf16 of a tile, 16 x 32

// Rows (16 a tile, padded with zeros) as A tiles, [rows / 16][K / 32].
inline void pack_tiles(const bf16* x, int64_t inputs, int64_t M, int64_t K, bf16* to) {
  for (int64_t m0 = 0; m0 < M; m0 += 16)
    for (int64_t k = 0; k < K; k += 32, to += TILE)
      for (int64_t r = 0; r < 16; r++) {
        int64_t count = m0 + r < M ? inputs - k : 0;
        __mmask32 mask = count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
        _mm512_storeu_si512(to + r * 32,
                            _mm512_maskz_loadu_epi16(mask, x + (m0 + r) * inputs + k));
      }
}

// Tiles' sums on their way: sums += (c - zero shift) scale, 32 outputs of one group. It is done a
// step late, between the tile products of the next step, which it would otherwise hold up.
struct Late {
  alignas(64) float c[4][256];  // rows 0-15 and 16-31 of the first 16 outputs, then of the others
  __m512 scale[2], zero[2];
  const float* shifts;
  float* sums;
  int rows = 0;

  template <bool SHIFTED>
  PTM_INLINE void add(int begin, int end, int64_t groups) {
    for (int r = begin; r < end; r++)
      for (int half = 0; half < 2; half++) {
        float* to = sums + r * 32 + half * 16;
        __m512 one = _mm512_load_ps(c[2 * half + r / 16] + r % 16 * 16);
        if (SHIFTED) one = _mm512_fnmadd_ps(zero[half], _mm512_set1_ps(shifts[r * groups]), one);
        _mm512_store_ps(to, _mm512_fmadd_ps(one, scale[half], _mm512_load_ps(to)));
      }
  }
};

// 16 or 32 rows of A x the 32 outputs in b, into `now`; meanwhile adds up `before`.
template <int TILES, bool SHIFTED>
PTM_INLINE void tile_step(const bf16* a, int64_t a_stride, const bf16* b, int64_t depth,
                          int64_t groups, Late& now, Late& before) {
  _tile_zero(0);
  _tile_zero(2);
  if (TILES == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  int done = 0;
  for (int64_t k = 0; k < depth; k++, a += TILE, b += TILE) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (TILES == 2) {
      _tile_loadd(5, a + a_stride, 64);
      _tile_dpbf16ps(1, 5, 6);
    }
    _tile_loadd(7, b + DEEP / 32 * TILE, 64);
    _tile_dpbf16ps(2, 4, 7);
    if (TILES == 2) _tile_dpbf16ps(3, 5, 7);
    if (done < before.rows) {
      before.add<SHIFTED>(done, done + 8, groups);
      done += 8;
    }
  }
  before.add<SHIFTED>(done, before.rows, groups);
  _tile_stored(0, now.c[0], 64);
  _tile_stored(2, now.c[2], 64);
  if (TILES == 2) {
    _tile_stored(1, now.c[1], 64);
    _tile_stored(3, now.c[3], 64);
  }
}

// Up to TALL rows as A tiles, `deep` bf16 of 16 rows, against panels p and p + 1
template <int BITS, bool SHIFTED>
void pair_sums(const bf16* a, int64_t rows, const float* shifts, const Packed& w,
               const Decoder<BITS>& decoder, int64_t p, float (*sums)[32]) {
  using D = Decoder<BITS>;
  alignas(64) bf16 b[2][DEEP / 32 * TILE];
  Late late[2];
  int64_t G = w.groups(), panels[2] = {p, p + 1 < w.panels() ? p + 1 : p}, deep = w.K / 32 * TILE;
  int turn = 0;
  memset(sums, 0, sizeof(float) * 32 * size_t((rows + 15) / 16 * 16));
  for (int64_t k0 = 0, depth; k0 < w.K; k0 += depth) {
    int64_t g = k0 / w.group, end = (g + 1) * w.group < w.K ? (g + 1) * w.group : w.K;
    depth = end - k0 < DEEP ? end - k0 : DEEP;
    __m512 scale[2], zero[2] = {};
    for (int half = 0; half < 2; half++) {
      scale[half] = scales_of(w, panels[half], g);
      const uint8_t* codes = w.codes + panels[half] * w.panel_bytes() + k0 * PANEL * BITS / 8;
      bf16* to = b[half];
      for (int64_t r = 0; r < depth / 2; r += D::ROWS, codes += D::BYTES) {
        for (int64_t line = 0; line < D::BYTES; line += 64)
          _mm_prefetch((const char*)codes + AHEAD + line, _MM_HINT_T0);
        decoder.block(codes, [&](int i, __m512i row) {
          _mm512_store_si512(to + (r + i) * 32, row);
        });
      }
      if (SHIFTED && k0 == g * w.group) zero[half] = zeros_of(w, panels[half], g);
    }
    const bf16* from = a + k0 / 32 * TILE;
    for (int64_t m = 0; m < rows; m += 32, from += 2 * deep, turn ^= 1) {
      Late& now = late[turn];
      if (rows - m > 16)
        tile_step<2, SHIFTED>(from, deep, b[0], depth / 32, G, now, late[turn ^ 1]);
      else
        tile_step<1, SHIFTED>(from, deep, b[0], depth / 32, G, now, late[turn ^ 1]);
      now.rows = rows - m > 16 ? 32 : 16;
      now.sums = sums[m];
      now.shifts = shifts + m * G + g;
      for (int half = 0; half < 2; half++) {
        now.scale[half] = scale[half];
        now.zero[half] = zero[half];
      }
    }
  }
  Late& last = late[turn ^ 1];
  last.add<SHIFTED>(0, last.rows, G);
}

// M rows as A tiles against panels [begin, end), at most WIDE. A row's sums leave together: y has a
// page for each row.
template <int BITS, class F>
void many_rows(const bf16* a, int64_t M, const float* shifts, const Packed& w,
              const Decoder<BITS>& decoder, int64_t begin, int64_t end, F take) {
  alignas(64) float sums[WIDE / 2][TALL][32];
  for (int64_t m0 = 0; m0 < M; m0 += TALL) {
    const int64_t rows = M - m0 < TALL ? M - m0 : TALL;
    for (int64_t p = begin; p < end; p += 2) {
      auto add = w.zero ? pair_sums<BITS, true> : pair_sums<BITS, false>;
      add(a + m0 * w.K, rows, shifts + m0 * w.groups(), w, decoder, p, sums[(p - begin) / 2]);
    }
    for (int64_t m = 0; m < rows; m++)
      for (int64_t p = begin; p < end; p += 2) {
        const int64_t left = w.N - p * PANEL;
        take(m0 + m, p * PANEL, sums[(p - begin) / 2][m], left < 2 * PANEL ? left : 2 * PANEL);
      }
  }
}

#else
constexpr int64_t FEW = 8;
#endif

template <int BITS, class F>
int fast_linear(const bf16* x, int64_t inputs, int64_t M, const float* sums, const Packed& w,
                int64_t threads, F take) {
  if (M > 0 && M <= MOST && is_whole(w))
    return whole_rows<BITS, MOST>(x, inputs, M, w, threads, take);
  Decoder<BITS> decoder(w.values);
#if PTM_ISA_AMX
  if (M > FEW) {
    int64_t rows = IN_L2 / (64 * w.K) * 32;
    rows = rows < 32 ? 32 : rows < M ? rows : M;
    Room& room = room_of_op();
    if (!room.reset(Room::bytes<bf16>((rows + 15) / 16 * 16 * w.K))) return PTM_NO_MEMORY;
    bf16* tiles = room.take<bf16>((rows + 15) / 16 * 16 * w.K);
    for (int64_t m0 = 0; m0 < M; m0 += rows) {
      int64_t count = M - m0 < rows ? M - m0 : rows;
      pack_tiles(x + m0 * inputs, inputs, count, w.K, tiles);
      const float* shifts = sums + m0 * w.groups();
      auto from_m0 = [&](int64_t m, int64_t n, const float* out, int64_t outputs) {
        take(m0 + m, n, out, outputs);
      };
      parallel_for(w.panels(), WIDE, threads, [&](int64_t begin, int64_t end) {
        Tiles registers;
        many_rows<BITS>(tiles, count, shifts, w, decoder, begin, end, from_m0);
      });
    }
    return PTM_OK;
  }
#endif
  Scratch<bf16> rows(M * w.K);
  if (!rows.data) return PTM_NO_MEMORY;
  memset(rows.data, 0, sizeof(bf16) * size_t(M * w.K));
  for (int64_t m = 0; m < M; m++)
    memcpy(rows.data + m * w.K, x + m * inputs, sizeof(bf16) * size_t(inputs));
  parallel_for(w.panels(), GRAIN, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      for (int64_t m = 0; m < M; m += FEW)
        few_rows<BITS, FEW>((const uint32_t*)(rows.data + m * w.K), M - m < FEW ? M - m : FEW,
                            sums + m * w.groups(), w, decoder, p, m, take);
  });
  return PTM_OK;
}

#endif

// x (M, inputs), contiguous, against all of w.
template <class T, class F>
int linear(const T* x, int64_t inputs, int64_t M, const Packed& w, int64_t threads, F take) {
#if PTM_ISA_BF16
  Scratch<float> sums(w.zero ? (M + 31) / 32 * 32 * w.groups() : 1);
  if (!sums.data) return PTM_NO_MEMORY;
  for (int64_t m = 0; w.zero && m < M; m++)
    group_sums(x + m * inputs, inputs, w, sums.data + m * w.groups());
  if constexpr (sizeof(T) == 2) {
    if (w.bits == 4) return fast_linear<4>(x, inputs, M, sums.data, w, threads, take);
    if (w.bits == 6) return fast_linear<6>(x, inputs, M, sums.data, w, threads, take);
    return fast_linear<8>(x, inputs, M, sums.data, w, threads, take);
  }
  parallel_for(w.panels(), GRAIN, threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) plain_panel(x, inputs, M, sums.data, w, p, take);
  });
  return PTM_OK;
#else
  if (w.bits == 4) return wide_linear<4>(x, inputs, M, w, threads, take);
  if (w.bits == 6) return wide_linear<6>(x, inputs, M, w, threads, take);
  return wide_linear<8>(x, inputs, M, w, threads, take);
#endif
}

}  // namespace PTM_NAMESPACE
