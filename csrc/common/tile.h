// 128 x 128 numbers of a product on tensor cores, by a block of 256 threads on a GPU:
//
//   sums[m, n] = sum over k of a[m, k] b[n, k]        bf16, sums in fp32, k in order
//
// 32 of k at a time come to shared memory, whose stages take turns: two are under way while a third
// is multiplied. A warp has 64 x 32 of the sums. Rows of an operand in memory are numbers m (n) and
// have all k (Flat), or are numbers k and have all m (n) (Turned). In shared memory they lie as they
// came, 16 bytes longer than a power of two, so that eight of them begin in eight groups of banks.
//
// A type knows the rows: `at(i)` is where row i begins, nullptr for one of zeros, `base` an address.
// They begin at multiples of 16, and their length is a multiple of 32.
#pragma once

#include "device.h"

namespace PTM_NAMESPACE {

constexpr int TILE = 128, STEP = 32, STAGES = 3, TILE_THREADS = 256;

template <class Rows>
struct Flat {
  static constexpr int STRIDE = STEP + 8, SIZE = TILE * STRIDE, AT_ONCE = TILE_THREADS / 4;
  const bf16* from[2];
  bool is_there[2];

  PTM_BODY Flat(const Rows& rows, int first) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const bf16* row = rows.at(first + thread_id() / 4 + i * AT_ONCE);
      is_there[i] = row != nullptr;
      from[i] = row ? row + column() : rows.base;
    }
  }
  PTM_BODY void copy(bf16* to, int k) const {
#pragma unroll
    for (int i = 0; i < 2; i++)
      copy_async(to + (thread_id() / 4 + i * AT_ONCE) * STRIDE + column(), from[i] + k,
                 is_there[i]);
  }
  static PTM_BODY int column() { return thread_id() % 4 * 8; }
  // 16 x 16 from m (n) and k on: (0, 0), (8, 0), (0, 8), (8, 8)
  static PTM_BODY void load(const bf16* from, int m, int k, uint32_t (&to)[4]) {
    load_matrices<false>(to, from + (m + lane() % 16) * STRIDE + k + lane() / 16 * 8);
  }
};

template <class Rows>
struct Turned {
  static constexpr int STRIDE = TILE + 8, SIZE = STEP * STRIDE, AT_ONCE = TILE_THREADS / 16;
  Rows rows;
  int first;
  bool has_column;

  PTM_BODY Turned(const Rows& of, int begin, int width)
      : rows(of), first(begin + column()), has_column(first < width) {}
  PTM_BODY void copy(bf16* to, int k) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int j = thread_id() / 16 + i * AT_ONCE;
      const bf16* row = has_column ? rows.at(k + j) : nullptr;
      copy_async(to + j * STRIDE + column(), row ? row + first : rows.base, row != nullptr);
    }
  }
  static PTM_BODY int column() { return thread_id() % 16 * 8; }
  static PTM_BODY void load(const bf16* from, int m, int k, uint32_t (&to)[4]) {
    load_matrices<true>(to, from + (k + lane() % 8 + lane() / 16 * 8) * STRIDE + m +
                                lane() / 8 % 2 * 8);
  }
};

template <class A, class B>
constexpr int64_t tile_bytes() {
  return int64_t(sizeof(bf16)) * STAGES * (A::SIZE + B::SIZE);
}

// A thread's sums: of 16 rows each, of 8 columns each, rows lane() / 4 and that + 8, two columns.
struct Sums {
  float of[4][4][4];

  PTM_BODY static int row() { return warp_id() % 2 * 64; }
  PTM_BODY static int row_of(int i) { return row() + i / 2 * 16 + i % 2 * 8 + lane() / 4; }
  PTM_BODY static int column() { return warp_id() / 2 * 32; }

  // f(i, m, pairs) for each of the thread's 8 rows m, and pairs(g) is g(n, first, second) for each
  // pair of its columns n, n + 1.
  template <class F>
  PTM_BODY void each_row(F f) const {
#pragma unroll
    for (int i = 0; i < 8; i++)
      f(i, row_of(i), [&](auto g) {
#pragma unroll
        for (int j = 0; j < 4; j++)
          g(column() + 8 * j + lane() % 4 * 2, of[i / 2][j][i % 2 * 2],
            of[i / 2][j][i % 2 * 2 + 1]);
      });
  }
};

template <class A, class B>
PTM_BODY void multiply_stage(const bf16* a, const bf16* b, Sums& sums) {
#pragma unroll
  for (int k = 0; k < STEP; k += 16) {
    uint32_t left[4][4], right[4][2];
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t two[4];
      B::load(b, Sums::column() + 8 * j, k, two);
      right[j][0] = two[0], right[j][1] = two[2];
      right[j + 1][0] = two[1], right[j + 1][1] = two[3];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) A::load(a, Sums::row() + 16 * i, k, left[i]);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) multiply_16x8x16(sums.of[i][j], left[i], right[j]);
  }
}

// K numbers k; of the tile `height` rows and `width` columns are wanted.
template <class A, class B>
PTM_BODY void multiply(const A& a, const B& b, int K, int height, int width, Sums& sums) {
  bf16 *of_a = shared_memory<bf16>(), *of_b = of_a + STAGES * A::SIZE;
  const bool is_wanted = Sums::row() < height && Sums::column() < width;
  const int steps = (K + STEP - 1) / STEP;
  auto copy = [&](int step, int stage) {
    if (step < steps) {
      a.copy(of_a + stage * A::SIZE, step * STEP);
      b.copy(of_b + stage * B::SIZE, step * STEP);
    }
    commit_copies();  // also of nothing: groups are counted
  };
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int l = 0; l < 4; l++) sums.of[i][j][l] = 0;
#pragma unroll
  for (int step = 0; step < STAGES - 1; step++) copy(step, step);
  for (int step = 0, stage = 0; step < steps; step++, stage = stage + 1 < STAGES ? stage + 1 : 0) {
    wait_copies<STAGES - 2>();
    sync_block();  // all copies of this step are there, and the stage before it is read
    copy(step + STAGES - 1, stage ? stage - 1 : STAGES - 1);
    if (is_wanted) multiply_stage<A, B>(of_a + stage * A::SIZE, of_b + stage * B::SIZE, sums);
  }
}

}  // namespace PTM_NAMESPACE
