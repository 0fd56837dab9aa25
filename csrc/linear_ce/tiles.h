// Products of matrices that lie in AMX tiles, and how rows become tiles.
//
//   A tiles   [rows / 16][depth / 32]: 16 rows x 32 along the sum
//   B tiles   [columns / 16][depth / 32]: 16 pairs along the sum x 16 columns
//
// A tile is 1 KiB in one piece: rows 4 KiB apart, as they are in a matrix 2048 wide, would share a
// set of the L1 cache.
#pragma once

#include "../common/amx.h"
#include "../common/vec.h"

namespace PTM_NAMESPACE {

constexpr int64_t TILE = 512;           // bf16 of a tile
constexpr int64_t IN_L2 = 1 << 20;      // bytes of B that stay there while A passes

PTM_INLINE __m512i row_of(const bf16* from, int64_t count) {  // 32, zeros behind the count
  __mmask32 mask = count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
  return _mm512_maskz_loadu_epi16(mask, from);
}

PTM_INLINE void transpose(__m512i r[16]) {  // of 16 x 16 words of 32 bits
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 16; j += 8) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// 16 rows x 32 columns from (row, column) of a matrix rows x columns; zeros outside.
struct Rows {
  const bf16* data;
  int64_t rows, columns;
  PTM_INLINE __m512i at(int64_t row, int64_t column) const {
    return row < rows ? row_of(data + row * columns + column, columns - column)
                      : _mm512_setzero_si512();
  }
};

// The sum runs along the columns; rows of the matrix are rows of A.
inline void a_tile(const Rows& from, int64_t row, int64_t column, bf16* to) {
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, from.at(row + i, column));
}
// The sum runs along the columns; rows of the matrix are columns of B.
inline void b_tile(const Rows& from, int64_t row, int64_t column, bf16* to) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = from.at(row + i, column);
  transpose(r);
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, r[i]);
}
PTM_INLINE __m512i low_pairs(__m512i even, __m512i odd) {
  return interleave_rows(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd));
}
PTM_INLINE __m512i high_pairs(__m512i even, __m512i odd) {
  return interleave_rows(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1));
}
// The sum runs along the rows: 32 rows x 32 columns to two B tiles, of 16 columns each.
inline void b_tiles_down(const Rows& from, int64_t row, int64_t column, bf16* first, bf16* second) {
  for (int i = 0; i < 16; i++) {
    __m512i even = from.at(row + 2 * i, column), odd = from.at(row + 2 * i + 1, column);
    _mm512_store_si512(first + 32 * i, low_pairs(even, odd));
    _mm512_store_si512(second + 32 * i, high_pairs(even, odd));
  }
}
// The sum runs along the rows: 32 rows x 32 columns to two A tiles, of 16 columns each as rows.
inline void a_tiles_down(const Rows& from, int64_t row, int64_t column, bf16* first, bf16* second) {
  __m512i low[16], high[16];
  for (int i = 0; i < 16; i++) {
    __m512i even = from.at(row + 2 * i, column), odd = from.at(row + 2 * i + 1, column);
    low[i] = low_pairs(even, odd);
    high[i] = high_pairs(even, odd);
  }
  transpose(low);
  transpose(high);
  for (int i = 0; i < 16; i++) {
    _mm512_store_si512(first + 32 * i, low[i]);
    _mm512_store_si512(second + 32 * i, high[i]);
  }
}

// A (M x depth) x B (depth x N), all multiples of 32, in steps of 32 x 32:
// take(row, column, c) with c[0] the first 16 rows and columns, c[1] the other rows, c[2] the other
// columns, c[3] both. A thread has whole columns; rows come in order.
template <class F>
void product(const bf16* a, const bf16* b, int64_t M, int64_t N, int64_t depth, int64_t threads,
             F take) {
  int64_t deep = depth / 32 * TILE, grain = IN_L2 / (64 * (depth ? depth : 1));
  if (grain < 1) grain = 1;
  parallel_for(N / 32, grain, threads, [&](int64_t begin, int64_t end) {
    Tiles registers;
    alignas(64) float c[4][256];
    for (int64_t m = 0; m < M; m += 32)
      for (int64_t n = begin * 32; n < end * 32; n += 32) {
        const bf16 *a0 = a + m / 16 * deep, *a1 = a0 + deep, *b0 = b + n / 16 * deep, *b1 = b0 + deep;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < deep; k += TILE) {
          _tile_loadd(4, a0 + k, 64);
          _tile_loadd(6, b0 + k, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(5, a1 + k, 64);
          _tile_dpbf16ps(1, 5, 6);
          _tile_loadd(7, b1 + k, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c[0], 64);
        _tile_stored(1, c[1], 64);
        _tile_stored(2, c[2], 64);
        _tile_stored(3, c[3], 64);
        take(m, n, c);
      }
  });
}

}  // namespace PTM_NAMESPACE
