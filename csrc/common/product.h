// The product that moe_mlp and attention are made of: 32 rows of A times two panels of B, in fp32.
//
//   AMX        2 x 2 tiles: 4 of C stay in registers, each step of k loads 2 of A and 2 of B
//   BF16       8 rows x 2 panels of C in registers, pairs of A broadcast (vdpbf16ps)
//   else       rows in fp32, and a few of them at once x 16 columns (AVX-512: 32), widened by shifts
//              (multiply.h)
#pragma once

#include "amx.h"
#include "layout.h"
#include "multiply.h"

namespace PTM_NAMESPACE {

constexpr int64_t kDeep = 512;  // k of a product at most: its rows and columns fit in L1

// A part of a parallel_for: tiles at its begin, and at its end what was streamed is in memory.
struct Part {
#if PTM_ISA_AMX
  Tiles tiles;
#endif
  ~Part() {
#if PTM_ISA_AVX2
    _mm_sfence();
#endif
  }
};

// C of a product: [half of A][half of B][row][column]
struct alignas(64) Block {
  float c[2][2][16][16];
};

// 32 rows of A: row r of step s begins at `first` (`second` for the upper 16) + s * step + r * row
struct RowsA {
  const bf16 *first, *second;
  int64_t row, step;
};

inline RowsA rows_of(const bf16* a, int64_t stride) {
  return {a, a + kTile * stride, stride, kStep};
}

inline RowsA rows_turned(const bf16* a, int64_t k) { return {a, a + k * kTile, kStep, kBlockA}; }

// What will be wanted next, two runs of memory; each step of k asks for `lines` cache lines of both.
struct Ahead {
  const char *first, *second;
  int64_t lines;
};

#if PTM_ISA_BF16

// A of a product, as the instruction set wants it
struct Left {
  RowsA rows;
  void take(RowsA a, int64_t) { rows = a; }
};

#endif

#if PTM_ISA_AMX

template <class Between>
inline void product(const Left& left, const uint32_t* b0, const uint32_t* b1, int64_t k, bool add,
                    Block& out, Ahead ahead, Between between) {
  if (add) {
    _tile_loadd(0, out.c[0][0], 64);
    _tile_loadd(1, out.c[1][0], 64);
    _tile_loadd(2, out.c[0][1], 64);
    _tile_loadd(3, out.c[1][1], 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const RowsA& a = left.rows;
  const bf16 *a0 = a.first, *a1 = a.second;
  const int64_t row_bytes = 2 * a.row;
  for (int64_t j = 0; j < k; j += kStep) {
    _tile_loadd(4, a0, row_bytes);
    _tile_loadd(6, b0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a1, row_bytes);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    a0 += a.step;
    a1 += a.step;
    b0 += 256;
    b1 += 256;
    for (int64_t i = 0; i < ahead.lines; i++) {
      _mm_prefetch(ahead.first, _MM_HINT_T1);
      _mm_prefetch(ahead.second, _MM_HINT_T1);
      ahead.first += 64;
      ahead.second += 64;
    }
    between();
  }
  _tile_stored(0, out.c[0][0], 64);
  _tile_stored(1, out.c[1][0], 64);
  _tile_stored(2, out.c[0][1], 64);
  _tile_stored(3, out.c[1][1], 64);
}

#elif PTM_ISA_BF16

template <class Between>
inline void product(const Left& left, const uint32_t* b0, const uint32_t* b1, int64_t k, bool add,
                    Block& out, Ahead, Between) {
  const RowsA& a = left.rows;
  for (int half = 0; half < 2; half++)
    for (int r0 = 0; r0 < 16; r0 += 8) {
      float(*c0)[16] = out.c[half][0] + r0, (*c1)[16] = out.c[half][1] + r0;
      __m512 x[8], y[8];
      for (int r = 0; r < 8; r++) {
        x[r] = add ? _mm512_load_ps(c0[r]) : _mm512_setzero_ps();
        y[r] = add ? _mm512_load_ps(c1[r]) : _mm512_setzero_ps();
      }
      const bf16* rows = (half ? a.second : a.first) + r0 * a.row;
      const uint32_t *p0 = b0, *p1 = b1;
      for (int64_t j = 0; j < k; j += kStep, rows += a.step)
        for (int p = 0; p < 16; p++, p0 += 16, p1 += 16) {
          const __m512bh v0 = (__m512bh)_mm512_load_si512(p0);
          const __m512bh v1 = (__m512bh)_mm512_load_si512(p1);
          for (int r = 0; r < 8; r++) {
            int pair;
            memcpy(&pair, rows + r * a.row + 2 * p, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            x[r] = _mm512_dpbf16_ps(x[r], both, v0);
            y[r] = _mm512_dpbf16_ps(y[r], both, v1);
          }
        }
      for (int r = 0; r < 8; r++) {
        _mm512_store_ps(c0[r], x[r]);
        _mm512_store_ps(c1[r], y[r]);
      }
    }
}

#else

// In fp32, row by row; k at most kDeep
struct Left {
  alignas(64) float rows[32][kDeep + 16];

  void take(RowsA a, int64_t k) {
    for (int r = 0; r < 32; r++) {
      const bf16* from = (r < 16 ? a.first : a.second) + r % 16 * a.row;
      for (int64_t j = 0; j < k; j += kStep, from += a.step)
        for (int i = 0; i < kStep; i += W) store(rows[r] + j + i, load(from + i));
    }
  }
};

template <class Between>
inline void product(const Left& a, const uint32_t* b0, const uint32_t* b1, int64_t k, bool add,
                    Block& out, Ahead, Between) {
  for (int half = 0; half < 2; half++) {
    const float* rows = a.rows[16 * half];
    if (PTM_ISA_AVX512) {
      multiply(rows, kDeep + 16, 16, k, PairedColumns{b0, b1 - b0}, out.c[half][0][0], 16, add,
               out.c[half][1][0] - out.c[half][0][0]);
    } else {
      for (int q = 0; q < 2; q++)
        multiply(rows, kDeep + 16, 16, k, PairedColumns{q ? b1 : b0}, out.c[half][q][0], 16, add);
    }
  }
}

#endif

// The blocks of A, a(0) to a(count - 1), times `pairs` pairs of panels, k deep. done(i, pair, block,
// piece) uses a finished product, in kPieces; with AMX one product is made while the one before is
// used, for tiles and vectors are different units. Meanwhile the next block of A comes nearer, if
// it `lies` somewhere already. `sums` has room for 2 x pairs products.
constexpr int kPieces = 16;  // small ones: what a step of k cannot hide, the next has to wait for

template <class A, class Done>
inline void sweep(int64_t count, A a, bool lies, const uint32_t* b, int64_t k, int64_t pairs,
                  Block* sums, Done done) {
  const int64_t steps = pairs * (k / kStep), lines = (k * kTile * 2 / 64 + steps - 1) / steps;
  Left left;
  const Block* made = nullptr;
  int64_t made_i = 0, made_p = 0;
  int piece = kPieces;
  auto use = [&](int64_t pieces) {
    for (; piece < kPieces && pieces > 0; pieces--) done(made_i, made_p, *made, piece++);
  };
  for (int64_t i = 0; i < count; i++) {
    const RowsA rows = a(i), next = lies && i + 1 < count ? a(i + 1) : rows;
    Ahead ahead{(const char*)next.first, (const char*)next.second,
                lies && i + 1 < count ? lines : 0};
    for (int64_t j = 0; j < k; j += kDeep) {
      const int64_t deep = k - j < kDeep ? k - j : kDeep, skipped = j / kStep * rows.step;
      const RowsA part{rows.first + skipped, rows.second + skipped, rows.row, rows.step};
      left.take(part, deep);
      const int64_t each = (kPieces + deep / kStep - 1) / (deep / kStep);
      for (int64_t p = 0; p < pairs; p++) {
        Block& sum = sums[k > kDeep ? (i & 1) * pairs + p : (i * pairs + p) & 1];
        if (pairs == 1) use(kPieces);
        const uint32_t* b0 = b + 2 * p * panel(k) + panel(j);
        product(left, b0, b0 + panel(k), deep, j > 0, sum, ahead, [&] { use(each); });
        ahead.first += deep / kStep * ahead.lines * 64;
        ahead.second += deep / kStep * ahead.lines * 64;
        if (j + deep == k) {
          use(kPieces);
          made = &sum, made_i = i, made_p = p, piece = 0;
        }
      }
    }
  }
  use(kPieces);
}

}  // namespace PTM_NAMESPACE
