// isa: amx
// sum += A^T B of rows in bf16, in fp32: what a Hessian is made of. torch rounds such a product to
// bf16; where there are no tiles its products in fp32, the reference, are faster than these.
//
// Rows come DEEP at a time. They are packed once, columns of A as rows of a product and those of B
// as its panels; then HIGH blocks of 32 x 32 are made at once, whose part of B, kPiece deep, is in
// the L1 cache, and what is in `sum` moves once.
#include "../common/product.h"
#include "../common/room.h"

namespace PTM_NAMESPACE {

constexpr int64_t DEEP = 1024;
constexpr int64_t HIGH = 8;
constexpr int64_t kPiece = 256;

// One piece of both: A as blocks [M / 32][2][depth / 32][16][32], B as panels.
struct Packed {
  bf16* a;
  uint32_t* b;
  int64_t depth;

  bf16* block(int64_t i) const { return a + i * kStep * depth; }
  uint32_t* columns(int64_t j) const { return b + 2 * j * panel(depth); }
};

// Blocks [i, i + high) of rows times the 32 columns j
void add(const Packed& packed, int64_t i, int64_t high, int64_t j, float* sum, int64_t N) {
  Block blocks[HIGH];
  Left left;
  for (int64_t k = 0; k < packed.depth; k += kPiece) {
    const int64_t deep = packed.depth - k < kPiece ? packed.depth - k : kPiece;
    const uint32_t* b = packed.columns(j) + panel(k);
    for (int64_t h = 0; h < high; h++) {
      left.take(rows_turned(packed.block(i + h) + k * kTile, packed.depth), deep);
      product(left, b, b + panel(packed.depth), deep, k > 0, blocks[h], Ahead{}, [] {});
    }
  }
  for (int64_t h = 0; h < high; h++)
    for (int64_t r = 0; r < kStep; r++) {
      float* to = sum + ((i + h) * kStep + r) * N + j * kStep;
      for (int64_t half = 0; half < 2; half++)
        store(to + half * kTile, load(to + half * kTile) + load(blocks[h].c[r / kTile][half][r % kTile]));
    }
}

// Rows [0, count) of a matrix, `width` wide; the last are copied with rows of zeros behind them
// where they are no multiple of kStep.
const bf16* whole(const bf16* rows, int64_t width, int64_t count, bf16* copy) {
  if (count % kStep == 0) return rows;
  memcpy(copy, rows, sizeof(bf16) * count * width);
  memset(copy + count * width, 0, sizeof(bf16) * (up(count, kStep) - count) * width);
  return copy;
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// a (T, M), b (T, N) in bf16, M and N multiples of 32; sum (M, N) fp32. upper: a is b, and sums
// below the diagonal are of no use; some of them are added to all the same.
PTM_EXPORT(gptq_products)(const bf16* a, const bf16* b, float* sum, int64_t T, int64_t M, int64_t N,
                          int64_t upper, int64_t threads) {
  if (M % kStep || N % kStep) return PTM_BAD_SHAPE;
  const int64_t most = up(T < DEEP ? T : DEEP, kStep), ragged = T % kStep ? most : 0;
  Room& mine = room();
  if (!mine.reset(Room::bytes<bf16>(M * most) + Room::bytes<bf16>(N * most) +
                  Room::bytes<bf16>(M * ragged) + Room::bytes<bf16>(N * ragged)))
    return PTM_NO_MEMORY;
  Packed packed{mine.take<bf16>(M * most), mine.take<uint32_t>(N * most / 2), 0};
  bf16 *copy_a = mine.take<bf16>(M * ragged), *copy_b = mine.take<bf16>(N * ragged);
  for (int64_t t = 0; t < T; t += DEEP) {
    const int64_t count = T - t < DEEP ? T - t : DEEP;
    const bf16* rows_a = whole(a + t * M, M, count, copy_a);
    const bf16* rows_b = a == b ? rows_a : whole(b + t * N, N, count, copy_b);
    packed.depth = up(count, kStep);
    parallel_for(M / kStep, HIGH, threads, [&](int64_t i, int64_t end) {
      for (; i < end; i++) turned(rows_a + i * kStep, M, packed.depth, packed.block(i));
    });
    parallel_for(N / kStep, HIGH, threads, [&](int64_t j, int64_t end) {
      for (; j < end; j++)
        for (int64_t k = 0; k < packed.depth; k += 2) {
          const bf16* pair = rows_b + k * N + j * kStep;
          pair_rows(pair, pair + N, kStep, packed.columns(j) + panel(k), panel(packed.depth));
        }
    });
    parallel_for(M / kStep, HIGH, threads, [&](int64_t i, int64_t end) {
      Part part;
      for (int64_t j = upper ? i : 0; j < N / kStep; j++) add(packed, i, end - i, j, sum, N);
    });
  }
  return PTM_OK;
}
