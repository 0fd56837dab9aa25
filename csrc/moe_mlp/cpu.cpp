// A mixture of SwiGLU experts over rows that each name A of them, forward and backward, bf16:
//
//   y_t = sum over a of weight_ta (silu(x_t G_e^T) * (x_t U_e^T)) W2_e^T,   e = ids_ta, W1 = [G ; U]
//
// Forward, for up to `kRows` rows of one expert (weights are A as they lie in memory):
//
//   x gathered -> columns     G, U (16 rows each) x columns -> silu(g) u, left as columns
//                             W2 (32 rows)        x columns -> rows, turned back, each to its place
//
// Pairs (g, u) are kept, in bf16, for the backward: 16 rows x 16 features are one run of memory, or
// stores past the caches would each open a page of it anew. Backward, for one expert (rows are A):
//
//   dy rows x W2 paired   -> dh; with g, u: rows of dg and du, pairs of w h, and <dh, h> = dweight
//   dg, du rows x W1      -> dx rows, each to its place
//   (dg, du) turned x x paired -> dW1;   dy turned x (w h) paired -> dW2
//
// So what an expert returned is never needed again, nor kept. Rows of a token are added up in the
// order of its experts, each sum of a product goes over k in order: no result depends on threads.
#include "../common/room.h"
#include "swiglu.h"

#include <atomic>

namespace PTM_NAMESPACE {

constexpr int64_t kCache = 1 << 18;   // bytes of weights in pairs at a time
constexpr int64_t kRows = 512;        // rows of one expert at a time, forward
constexpr int kHalf = kPieces / 2, kRowsOfPiece = 32 / kPieces;
static_assert(kRowsOfPiece == 2, "a piece of dh is one pair of rows");

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Shape {
  int64_t T, A, D, F, E;
};

// Rows of expert e are order[starts[e]] ... order[starts[e + 1] - 1], each the number t * A + a.
struct Plan {
  const int64_t *order, *starts;
};

// From row to row of A that we lay out: at a power of two they would share a few sets of the L1
inline int64_t stride(int64_t k) { return k + kStep; }

// Rows k of a weight, columns [from, from + n) -> panels
inline void paired(const bf16* w, int64_t k, int64_t row_size, int64_t from, int64_t n, uint32_t* to) {
  for (int64_t j = 0; j < k; j += 2) {
    const bf16* row = w + j * row_size + from;
    for (int64_t i = 0; i < n; i += 32) {
      prefetch(row + 8 * row_size + i);
      prefetch(row + 9 * row_size + i);
    }
    pair_rows(row, row + row_size, n, to + j / 2 * kTile, panel(k));
  }
}

// y_t = sum of w_ta rows_ta; without weights, of rows
inline void add_up(const bf16* rows, const float* weights, bf16* to, const Shape& s,
                   int64_t threads) {
  parallel_for(s.T, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for_lanes(s.D, [&](int64_t d, auto lanes) {
        vf total = splat(0);
        for (int64_t a = t * s.A; a < (t + 1) * s.A; a++) {
          const vf row = load(rows + a * s.D + d, lanes);
          total += weights ? row * splat(weights[a]) : row;
        }
        store(to + t * s.D + d, total, lanes);
      });
  });
}

// Ids of rows in windows, one after another, of `size` ids each; the first used[w] are of window w.
struct Ids {
  const int64_t *ids, *used;
  int64_t windows, size;
};

// Rows of experts [first, first + E) of `all`, by expert, in their order within one: counting them,
// then placing them
inline bool sort_rows(const Ids& in, int64_t first, int64_t E, int64_t all, int64_t* order,
                      int64_t* starts) {
  auto each = [&](auto take) {
    for (int64_t w = 0; w < in.windows; w++)
      for (int64_t i = w * in.size; i < w * in.size + in.used[w]; i++) {
        const int64_t e = in.ids[i];
        if (e < 0 || e >= all) return false;
        if (e >= first && e < first + E) take(i, e - first);
      }
    return true;
  };
  memset(starts, 0, sizeof(int64_t) * (E + 1));
  if (!each([&](int64_t, int64_t e) { starts[e + 1]++; })) return false;
  for (int64_t e = 0; e < E; e++) starts[e + 1] += starts[e];
  each([&](int64_t i, int64_t e) { order[starts[e]++] = i; });
  for (int64_t e = E; e > 0; e--) starts[e] = starts[e - 1];
  starts[0] = 0;
  return true;
}

// Block f of the pairs that are kept of 16 rows from `row` on (fewer at the end), of n rows of one
// expert that begin at `from`.
inline bf16* kept(bf16* hidden, const Shape& s, int64_t from, int64_t n, int64_t row, int64_t f) {
  return hidden + (from + row) * 2 * s.F + f * 32 * least(kTile, n - row);
}

struct Forward {
  Shape s;
  Plan plan;
  const bf16 *x, *w1, *w2;
  bf16 *rows, *hidden;

  // Rows [from, from + n) of the order, all of expert e
  bool run(int64_t e, int64_t from, int64_t n) const {
    const int64_t padded = up(n, 32), pairs = padded / 32;
    Room& mine = room();
    if (!mine.reset(padded * (2 * s.D + 2 * s.F) + 2 * pairs * int64_t(sizeof(Block)))) return false;
    uint32_t *columns = mine.take<uint32_t>(padded / 16 * panel(s.D)),
             *h = mine.take<uint32_t>(padded / 16 * panel(s.F));
    Block* sums = mine.take<Block>(2 * pairs);
    const int64_t* order = plan.order + from;
    for (int64_t i = 0; i < padded; i += kTile) {
      const bf16* row[kTile];
      for (int64_t j = 0; j < kTile; j++)
        row[j] = i + j < n ? x + order[i + j] / s.A * s.D : nullptr;
      columns_of(row, s.D, columns + i / kTile * panel(s.D));
    }
    const bf16 *gate = w1 + e * 2 * s.F * s.D, *value = gate + s.F * s.D;
    sweep(
        s.F / kTile,
        [&](int64_t i) {
          return RowsA{gate + i * kTile * s.D, value + i * kTile * s.D, s.D, kStep};
        },
        true, columns, s.D, pairs, sums, [&](int64_t i, int64_t p, const Block& c, int piece) {
          const int64_t q = piece / kHalf, part = piece % kHalf, row = 32 * p + kTile * q;
          if (part < 4)
            swiglu(c, q, 4 * part, h + row / kTile * panel(s.F) + i * kTile / 2 * kTile);
          else if (part == 4 && hidden)
            keep(c, q, kept(hidden, s, from, n, row, i), least(kTile, n - row));
        });
    const bf16* w = w2 + e * s.D * s.F;
    sweep(
        s.D / 32, [&](int64_t d) { return rows_of(w + d * 32 * s.F, s.F); }, true, h, s.F,
        pairs, sums, [&](int64_t block, int64_t p, const Block& c, int piece) {
          if (piece % kHalf) return;
          const int64_t q = piece / kHalf, i = 32 * p + kTile * q;
          turn_back([&](int64_t f) { return c.c[f >> 4][q][f & 15]; },
                    [&](int64_t j, const Row32& row) {
                      if (i + j < n) put(rows + order[i + j] * s.D + block * 32, row);
                    });
        });
    return true;
  }
};

struct Backward {
  Shape s;
  Plan plan;
  const bf16 *grad, *x;
  const float* weights;
  const bf16 *w1, *w2;
  bf16 *hidden, *rows;
  float* by_weights;
  char *by_w1, *by_w2;
  Into into;
  int64_t grad_A;  // rows of the order to a row of grad: A, or 1 where it is weighted already

  bool run(int64_t e) const {
    const int64_t from = plan.starts[e], n = plan.starts[e + 1] - from, padded = up(n, 32);
    const int64_t size = s.F * s.D * (into == kRounded ? 2 : 4);
    char *to_w1 = by_w1 ? by_w1 + e * 2 * size : nullptr, *to_w2 = by_w2 ? by_w2 + e * size : nullptr;
    if (n == 0) {
      if (!by_w1 || into == kAdded) return true;
      memset(to_w1, 0, 2 * size);
      memset(to_w2, 0, size);
      return true;
    }
    const int64_t* order = plan.order + from;
    Room& mine = room();
    const int64_t blocks_needed = most(s.D, s.F) / 16;
    const int64_t weight_dwords = kCache / 4 + 16 * most(s.D, 2 * s.F);
    if (!mine.reset(padded * (6 * s.D + 6 * s.F + 4 * kStep + 64 + 4 + 64) + 4 * weight_dwords +
                    blocks_needed * int64_t(sizeof(Block)) + 1024))
      return false;
    bf16 *dy = mine.take<bf16>(padded * stride(s.D)),
         *by_hidden = mine.take<bf16>(padded * stride(2 * s.F)), *block = mine.take<bf16>(32 * padded);
    uint32_t *h = mine.take<uint32_t>(s.F / 16 * panel(padded)),
             *other = mine.take<uint32_t>(s.D / 16 * panel(padded)),
             *weight = mine.take<uint32_t>(weight_dwords);
    float *sums = mine.take<float>(padded * 16), *scale = mine.take<float>(padded);
    Block* blocks = mine.take<Block>(blocks_needed);
    memset(sums, 0, sizeof(float) * padded * 16);
    for (int64_t i = 0; i < padded; i++) {
      scale[i] = i >= n ? 0.0f : weights ? weights[order[i]] : 1.0f;
      if (i < n)
        memcpy((void*)(dy + i * stride(s.D)), grad + order[i] / grad_A * s.D, 2 * s.D);
      else
        memset((void*)(dy + i * stride(s.D)), 0, 2 * s.D);
    }
    by_product(e, from, n, padded, dy, weight, by_hidden, h, sums,
               scale, blocks);
    if (by_weights)
      for (int64_t i = 0; i < n; i++) {
        float total = 0;
        for (int64_t j = 0; j < 16; j++) total += sums[16 * i + j];
        by_weights[order[i]] = total;
      }
    by_rows(e, n, padded, order, by_hidden, weight, blocks);
    if (!by_w1) return true;
    for (int64_t i = 0; i < padded; i += 2) {
      const bf16* a = i < n ? x + order[i] / s.A * s.D : nullptr;
      const bf16* b = i + 1 < n ? x + order[i + 1] / s.A * s.D : nullptr;
      pair_rows(a, b, s.D, other + i / 2 * kTile, panel(padded));
    }
    by_weight(by_hidden, 2 * s.F, other, s.D, padded, block, blocks, to_w1);
    by_weight(dy, s.D, h, s.F, padded, block, blocks, to_w2);
    return true;
  }

  // dh = dy W2, and what follows from it row by row
  void by_product(int64_t e, int64_t from, int64_t n, int64_t padded, const bf16* dy,
                  uint32_t* weight, bf16* by_hidden, uint32_t* h, float* sums, const float* scale,
                  Block* blocks) const {
    const int64_t width = most(32, kCache / (2 * s.D) / 32 * 32);
    for (int64_t f0 = 0; f0 < s.F; f0 += width) {
      const int64_t wide = least(width, s.F - f0);
      paired(w2 + e * s.D * s.F, s.D, s.F, f0, wide, weight);
      sweep(
          padded / 32,
          [&](int64_t i) { return rows_of(dy + 32 * i * stride(s.D), stride(s.D)); }, false, weight,
          s.D, wide / 32, blocks, [&](int64_t i, int64_t p, const Block& c, int piece) {
            const int64_t column = f0 + 32 * p;
            const int64_t j = kRowsOfPiece * piece, r = 32 * i + j;
            const int64_t first = least(r, n - 1), second = least(r + 1, n - 1);
            const int64_t q = first / kTile * kTile;
            const bf16* block = kept(hidden, s, from, n, q, column / kTile);
            const bf16* two[2] = {block + 32 * (first - q), block + 32 * (second - q)};
            swiglu_backward(c, j, two, 32 * least(kTile, n - q), s.F, scale + r, sums + 16 * r,
                            by_hidden + r * stride(2 * s.F) + column, stride(2 * s.F),
                            h + column / 16 * panel(padded) + r / 2 * kTile, panel(padded));
          });
    }
  }

  // dx = (dg, du) W1
  void by_rows(int64_t e, int64_t n, int64_t padded, const int64_t* order, const bf16* by_hidden,
               uint32_t* weight, Block* blocks) const {
    const int64_t k = 2 * s.F, width = most(32, kCache / (2 * k) / 32 * 32);
    for (int64_t d0 = 0; d0 < s.D; d0 += width) {
      const int64_t wide = least(width, s.D - d0);
      paired(w1 + e * k * s.D, k, s.D, d0, wide, weight);
      sweep(
          padded / 32,
          [&](int64_t i) { return rows_of(by_hidden + 32 * i * stride(k), stride(k)); }, false,
          weight, k, wide / 32, blocks, [&](int64_t i, int64_t p, const Block& c, int piece) {
            for (int64_t r = kRowsOfPiece * piece; r < kRowsOfPiece * (piece + 1) && 32 * i + r < n; r++)
              put(rows + order[32 * i + r] * s.D + d0 + 32 * p,
                  rounded(c.c[r >> 4][0][r & 15], c.c[r >> 4][1][r & 15]));
          });
    }
  }

  // (m, n) = a^T b over the rows of an expert
  void by_weight(const bf16* a, int64_t m, const uint32_t* b, int64_t n, int64_t padded, bf16* block,
                 Block* blocks, char* to) const {
    switch (into) {
      case kRounded: return by_weight_to(a, m, b, n, padded, block, blocks, [&](int64_t at, const float* c0, const float* c1) {
        stream((bf16*)to + at, rounded(c0, c1));
      });
      case kExact: return by_weight_to(a, m, b, n, padded, block, blocks, [&](int64_t at, const float* c0, const float* c1) {
        stream((float*)to + at, c0);
        stream((float*)to + at + 16, c1);
      });
      case kAdded: return by_weight_to(a, m, b, n, padded, block, blocks, [&](int64_t at, const float* c0, const float* c1) {
        for (int64_t next = 32; next < 64; next += 16)  // of the block to come: it is far away
          __builtin_prefetch((float*)to + at + next, 1);
        add((float*)to + at, c0);
        add((float*)to + at + 16, c1);
      });
    }
  }

  template <class To>
  void by_weight_to(const bf16* a, int64_t m, const uint32_t* b, int64_t n, int64_t padded, bf16* block,
                    Block* blocks, To to) const {
    sweep(
        m / 32,
        [&](int64_t i) {
          turned(a + 32 * i, stride(m), padded, block);
          return rows_turned(block, padded);
        },
        false, b, padded, n / 32, blocks, [&](int64_t i, int64_t p, const Block& c, int piece) {
          for (int64_t r = kRowsOfPiece * piece; r < kRowsOfPiece * (piece + 1); r++)
            to((32 * i + r) * n + 32 * p, c.c[r >> 4][0][r & 15], c.c[r >> 4][1][r & 15]);
        });
  }
};

inline bool fits(const Shape& s) { return s.D % 32 == 0 && s.F % 32 == 0 && s.A > 0; }

// A multiple of 16, so that blocks of kept rows are the same for an expert as a whole
inline int64_t rows_at_a_time(const Shape& s) {
  return least(kRows, most(64, (5 << 18) / (2 * (s.D + s.F)) / 32 * 32));
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

#if PTM_ISA_PORTABLE
PTM_EXPORT(moe_plan)
(const void* ids, void* order, void* starts, int64_t count, int64_t E, int64_t) {
  const Ids all{(const int64_t*)ids, &count, 1, count};
  const bool known = sort_rows(all, 0, E, E, (int64_t*)order, (int64_t*)starts);
  return known ? PTM_OK : PTM_BAD_SHAPE;
}

// The same of experts [first, first + E) of `all`, over windows of `size` ids, used[w] of them rows.
PTM_EXPORT(moe_plan_windows)
(const void* ids, const void* used, void* order, void* starts, int64_t windows, int64_t size,
 int64_t first, int64_t E, int64_t all, int64_t) {
  const Ids in{(const int64_t*)ids, (const int64_t*)used, windows, size};
  const bool known = sort_rows(in, first, E, all, (int64_t*)order, (int64_t*)starts);
  return known ? PTM_OK : PTM_BAD_SHAPE;
}
#endif

PTM_EXPORT(moe_mlp)
(const void* x, const void* weights, const void* w1, const void* w2, const void* order,
 const void* starts, void* rows, void* y, void* hidden, int64_t T, int64_t A, int64_t D, int64_t F,
 int64_t E, int64_t threads) {
  const Shape s{T, A, D, F, E};
  if (!fits(s)) return PTM_BAD_SHAPE;
  const Plan plan{(const int64_t*)order, (const int64_t*)starts};
  const Forward forward{s, plan, (const bf16*)x, (const bf16*)w1, (const bf16*)w2,
                        (bf16*)(rows ? rows : y), (bf16*)hidden};
  const int64_t size = rows_at_a_time(s);
  Scratch<int64_t> first(E + 1);  // number of the first piece of each expert
  if (!first.data) return PTM_NO_MEMORY;
  first.data[0] = 0;
  for (int64_t e = 0; e < E; e++)
    first.data[e + 1] = first.data[e] + (plan.starts[e + 1] - plan.starts[e] + size - 1) / size;
  std::atomic<int> status{PTM_OK};
  parallel_for(first.data[E], 1, threads, [&](int64_t begin, int64_t end) {
    Part part;
    int64_t e = 0;
    for (int64_t i = begin; i < end; i++) {
      while (first.data[e + 1] <= i) e++;
      const int64_t from = plan.starts[e] + (i - first.data[e]) * size;
      if (!forward.run(e, from, least(size, plan.starts[e + 1] - from))) status = PTM_NO_MEMORY;
    }
  });
  if (rows && status == PTM_OK)
    add_up((const bf16*)rows, (const float*)weights, (bf16*)y, s, threads);
  return status;
}

PTM_EXPORT(moe_mlp_backward)
(const void* grad, const void* x, const void* weights, const void* w1, const void* w2,
 const void* order, const void* starts, const void* hidden, void* rows, void* by_x,
 void* by_weights, void* by_w1, void* by_w2, int64_t into, int64_t T, int64_t A, int64_t D,
 int64_t F, int64_t E, int64_t grad_A, int64_t threads) {
  const Shape s{T, A, D, F, E};
  if (!fits(s) || grad_A < 1 || into < kRounded || into > kAdded) return PTM_BAD_SHAPE;
  const Backward backward{s,
                          {(const int64_t*)order, (const int64_t*)starts},
                          (const bf16*)grad,
                          (const bf16*)x,
                          (const float*)weights,
                          (const bf16*)w1,
                          (const bf16*)w2,
                          (bf16*)hidden,
                          (bf16*)(rows ? rows : by_x),
                          (float*)by_weights,
                          (char*)by_w1,
                          (char*)by_w2,
                          Into(into),
                          grad_A};
  std::atomic<int> status{PTM_OK};
  parallel_for(E, 1, threads, [&](int64_t begin, int64_t end) {
    Part part;
    for (int64_t e = begin; e < end; e++)
      if (!backward.run(e)) status = PTM_NO_MEMORY;
  });
  if (rows && status == PTM_OK) add_up((const bf16*)rows, nullptr, (bf16*)by_x, s, threads);
  return status;
}
