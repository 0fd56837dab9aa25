// AMX tiles: 8 registers of 16 rows x 64 bytes. C += A B with A 16 x 32 bf16 (row-major rows are
// legal as they are) and B in VNNI order: row k holds pairs (B[2k][j], B[2k+1][j]); int8 likewise,
// 16 x 64 and by fours.
#pragma once

#include "ptm.h"

#if PTM_ISA_AMX
#include <immintrin.h>

namespace PTM_NAMESPACE {

// Tiles in this thread for as long as it lives. At the entry of each part of a parallel_for, not
// once per process: oneDNN releases the tiles, and a use after that is an illegal instruction.
struct Tiles {
  // All eight registers 16 rows x 64 bytes; `rows` of tiles 0 to 3 (C) may be fewer.
  explicit Tiles(int rows = 16) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) {
      config.bytes[i] = 64;
      config.rows[i] = uint8_t(i < 4 ? rows : 16);
    }
    asm volatile("" : : "r"(&config) : "memory");  // GCC thinks that only 8 bytes are read
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Two rows of 16 bf16 (k and k+1 of B) to one VNNI row of 32.
inline __m512i interleave_rows(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// B (rows x 16 columns, row-major, `stride` in elements; rows even) to rows/2 VNNI rows of 64 bytes.
inline void pack_vnni(bf16* to, const bf16* from, int64_t rows, int64_t stride) {
  for (int64_t k = 0; k < rows; k += 2) {
    __m256i even = _mm256_loadu_si256((const __m256i*)(from + k * stride));
    __m256i odd = _mm256_loadu_si256((const __m256i*)(from + (k + 1) * stride));
    _mm512_storeu_si512(to + k * 16, interleave_rows(even, odd));
  }
}

}  // namespace PTM_NAMESPACE
#endif
