// Causal softmax attention, forward and backward, bf16, a head at a time in blocks of 32 queries by
// 32 keys (FlashAttention-2, arXiv 2307.08691, without its running maximum: a row of scores of one
// block of queries is small).
//
//   forward    rows of S = Q K^T in fp32, masked    P = 2^(S - max)    O = P V / sum
//              kept: log2 of a row's sum, on the scale of S; scores are those of log2(e) / sqrt(K)
//   backward   S^T = K Q^T and dP^T = V dO^T by keys; P^T = 2^(S^T - lse), dS^T = P^T (dP^T - delta),
//              delta = <dO, O> of a query. Whole rows of both are the A of dV = P^T dO and dK = dS^T Q;
//              dS^T of all keys is kept for a chunk of queries, and turned for dQ = dS K
//
// Products sum in fp32; P and dS are rounded to bf16 once, as operands. Nothing depends on threads.
// q, k: (B, H, L, K); v, out and their gradients: (B, L, H, K). mask: (M, L, L) bytes, M 1 or B, what
// a query sees; it lies within the causal one, which holds where there is none.
#include "../common/product.h"
#include "../common/room.h"
#include "../common/row32.h"

#include <math.h>

#include <atomic>

namespace PTM_NAMESPACE {

constexpr int64_t kBlock = 32;
constexpr int64_t kChunk = 512;     // queries at a time, backward
constexpr float kHidden = -1e30f;   // of what is not seen

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of one head; those from `count` on are zeros.
struct Rows {
  bf16* first;
  int64_t stride, count, K;

  bf16* row(int64_t i) const { return first + i * stride; }
  const bf16* row_or_null(int64_t i) const { return i < count ? row(i) : nullptr; }

  // 32 of them as A of a product; `copy` has room for 32 x K
  RowsA block(int64_t from, bf16* copy) const {
    if (from + kBlock <= count) return rows_of(row(from), stride);
    memset((void*)copy, 0, 2 * kBlock * K);
    for (int64_t i = from; i < count; i++) memcpy((void*)(copy + (i - from) * K), row(i), 2 * K);
    return rows_of(copy, K);
  }

  // n of them as the columns of panels that are K deep
  void as_columns(int64_t from, int64_t n, uint32_t* to) const {
    for (int64_t i = 0; i < n; i += kTile) {
      const bf16* rows[kTile];
      for (int64_t j = 0; j < kTile; j++) rows[j] = row_or_null(from + i + j);
      columns_of(rows, K, to + i / kTile * panel(K));
    }
  }

  // n of them as the depth of K / 16 panels
  void as_depth(int64_t from, int64_t n, uint32_t* to) const {
    for (int64_t i = 0; i < n; i += 2)
      pair_rows(row_or_null(from + i), row_or_null(from + i + 1), K, to + i / 2 * kTile, panel(n));
  }
};

// out = A B, or more; B is two panels that lie `stride` dwords apart
inline void times(RowsA a, const uint32_t* b, int64_t stride, int64_t k, bool add, Block& out) {
  Left left;
  for (int64_t j = 0; j < k; j += kDeep) {
    const int64_t deep = least(kDeep, k - j), skipped = j / kStep * a.step;
    left.take({a.first + skipped, a.second + skipped, a.row, a.step}, deep);
    const uint32_t* from = b + panel(j);
    product(left, from, from + stride, deep, add || j > 0, out, {nullptr, nullptr, 0}, [] {});
  }
}

enum Sight { kNone, kSome, kAll };

struct Heads {
  int64_t B, H, L, K;
  const uint8_t* mask;
  int64_t mask_stride;  // from one of B to the next
  float scale;          // of scores, log2(e) in it

  int64_t padded() const { return up(L, kBlock); }

  Rows by_head(const void* p, int64_t b, int64_t h) const {
    return {(bf16*)p + (b * H + h) * L * K, K, L, K};
  }
  Rows by_token(const void* p, int64_t b, int64_t h) const {
    return {(bf16*)p + (b * L * H + h) * K, H * K, L, K};
  }

  // What 32 queries see of 32 keys; `see` is filled where that is some.
  Sight look(int64_t b, int64_t query, int64_t key, uint8_t (*see)[kBlock]) const {
    if (!mask) {
      if (key + kBlock - 1 <= query) return kAll;
      for (int64_t i = 0; i < kBlock; i++)
        for (int64_t j = 0; j < kBlock; j++) see[i][j] = key + j <= query + i;
      return kSome;
    }
    memset(see, 0, kBlock * kBlock);
    const int64_t rows = least(kBlock, L - query), columns = least(kBlock, L - key);
    int64_t seen = 0;
    for (int64_t i = 0; i < rows; i++) {
      memcpy(see[i], mask + b * mask_stride + (query + i) * L + key, columns);
      for (int64_t j = 0; j < kBlock; j++) seen += see[i][j];
    }
    return seen == 0 ? kNone : seen == kBlock * kBlock ? kAll : kSome;
  }
};

// Scaled scores of one block to rows that lie `stride` apart
inline void to_scores(const Block& c, Sight sight, const uint8_t (*see)[kBlock], float scale,
                      float* to, int64_t stride) {
  for (int64_t r = 0; r < kBlock; r++) {
    float* row = to + r * stride;
    for (int64_t j = 0; j < kBlock; j += W)
      store(row + j, load(c.c[r >> 4][j >> 4][r & 15] + (j & 15)) * splat(scale));
    if (sight == kSome)
      for (int64_t j = 0; j < kBlock; j++) row[j] = see[r][j] ? row[j] : kHidden;
  }
}

struct Forward {
  Heads s;
  const void *q, *k, *v;
  void* out;
  float* lse;

  bool run(int64_t b, int64_t h) const {
    const int64_t padded = s.padded(), K = s.K;
    Room& mine = room();
    if (!mine.reset(2 * Room::bytes<bf16>(padded * K) + Room::bytes<float>(kBlock * padded) +
                    Room::bytes<bf16>(kBlock * padded) + Room::bytes<bf16>(kBlock * K) +
                    int64_t(sizeof(Block))))
      return false;
    uint32_t *keys = mine.take<uint32_t>(padded * K / 2), *values = mine.take<uint32_t>(padded * K / 2);
    float* scores = mine.take<float>(kBlock * padded);
    bf16 *p = mine.take<bf16>(kBlock * padded), *copy = mine.take<bf16>(kBlock * K);
    Block& block = *mine.take<Block>(1);
    s.by_head(k, b, h).as_columns(0, padded, keys);
    s.by_token(v, b, h).as_depth(0, padded, values);
    const Rows queries = s.by_head(q, b, h), to = s.by_token(out, b, h);
    for (int64_t first = 0; first < s.L; first += kBlock) {
      const int64_t rows = least(kBlock, s.L - first), end = first + kBlock;
      const RowsA a = queries.block(first, copy);
      for (int64_t key = 0; key < end; key += kBlock) {
        alignas(64) uint8_t see[kBlock][kBlock];
        const Sight sight = s.look(b, first, key, see);
        if (sight == kNone) {
          for (int64_t r = 0; r < kBlock; r++)
            for (int64_t j = 0; j < kBlock; j += W) store(scores + r * padded + key + j, splat(kHidden));
          continue;
        }
        times(a, keys + key / kTile * panel(K), panel(K), K, false, block);
        to_scores(block, sight, see, s.scale, scores + key, padded);
      }
      alignas(64) float inverse[kBlock];
      for (int64_t r = 0; r < rows; r++) {
        const float total = softmax(scores + r * padded, p + r * padded, end,
                                    lse + (b * s.H + h) * s.L + first + r);
        inverse[r] = 1.0f / total;
      }
      for (int64_t d = 0; d < K; d += kBlock) {
        times(rows_of(p, padded), values + d / kTile * panel(padded), panel(padded), end, false, block);
        for (int64_t r = 0; r < rows; r++) {
          float *c0 = block.c[r >> 4][0][r & 15], *c1 = block.c[r >> 4][1][r & 15];
          for (int64_t j = 0; j < kTile; j += W) {
            store(c0 + j, load(c0 + j) * splat(inverse[r]));
            store(c1 + j, load(c1 + j) * splat(inverse[r]));
          }
          put(to.row(first + r) + d, rounded(c0, c1));
        }
      }
    }
    return true;
  }

  // p = 2^(scores - their maximum); gives its sum
  static float softmax(const float* scores, bf16* p, int64_t n, float* lse) {
    vf top = load(scores);
    for (int64_t j = W; j < n; j += W) top = vmax(top, load(scores + j));
    const float high = largest(top);
    vf total = splat(0);
    for (int64_t j = 0; j < n; j += W) {
      const vf score = load(scores + j);
      vf e = vexp2(score - splat(high));
      e = score == splat(kHidden) ? splat(0) : e;  // and no small number, which would be slow
      total += e;
      store(p + j, e);
    }
    const float all = sum(total);
    *lse = high + log2f(all);
    return all;
  }
};

struct Backward {
  Heads s;
  const void *grad, *q, *k, *v, *out;
  const float* lse;
  void *by_q, *by_k, *by_v;

  bool run(int64_t b, int64_t h) const {
    const int64_t padded = s.padded(), K = s.K, wide = least(kChunk, padded);
    const int64_t blocks = padded / kBlock * (K / kBlock);
    Room& mine = room();
    if (!mine.reset(Room::bytes<bf16>(padded * K) + 4 * Room::bytes<bf16>(wide * K) +
                    Room::bytes<bf16>(kBlock * wide) + Room::bytes<bf16>(padded * wide) +
                    Room::bytes<bf16>(kBlock * padded) + 2 * Room::bytes<bf16>(kBlock * K) +
                    2 * Room::bytes<float>(wide) + (2 * blocks + 2) * int64_t(sizeof(Block))))
      return false;
    uint32_t* key_depth = mine.take<uint32_t>(padded * K / 2);
    uint32_t* of_chunk[4];  // queries and gradients, as columns and as depth
    for (uint32_t*& one : of_chunk) one = mine.take<uint32_t>(wide * K / 2);
    bf16 *p = mine.take<bf16>(kBlock * wide), *ds = mine.take<bf16>(padded * wide),
         *turned_ds = mine.take<bf16>(kBlock * padded), *copy_k = mine.take<bf16>(kBlock * K),
         *copy_v = mine.take<bf16>(kBlock * K);
    float *of_lse = mine.take<float>(wide), *delta = mine.take<float>(wide);
    Block *sums_k = mine.take<Block>(blocks), *sums_v = mine.take<Block>(blocks),
          *both = mine.take<Block>(2);
    const Rows queries = s.by_head(q, b, h), keys = s.by_head(k, b, h), values = s.by_token(v, b, h),
               grads = s.by_token(grad, b, h), outs = s.by_token(out, b, h);
    keys.as_depth(0, padded, key_depth);
    for (int64_t c = 0; c < padded; c += kChunk) {
      const int64_t n = least(kChunk, padded - c);
      queries.as_columns(c, n, of_chunk[0]);
      grads.as_columns(c, n, of_chunk[1]);
      queries.as_depth(c, n, of_chunk[2]);
      grads.as_depth(c, n, of_chunk[3]);
      for (int64_t i = 0; i < n; i++) {
        const bool is_row = c + i < s.L;
        of_lse[i] = is_row ? lse[(b * s.H + h) * s.L + c + i] : -kHidden;
        delta[i] = is_row ? dot(grads.row(c + i), outs.row(c + i), K) : 0.0f;
      }
      for (int64_t key = 0; key < c + n; key += kBlock) {
        const RowsA a_k = keys.block(key, copy_k), a_v = values.block(key, copy_v);
        const int64_t from = most(key, c) - c;
        for (int64_t at = from; at < n; at += kBlock) {
          alignas(64) uint8_t see[kBlock][kBlock];
          const Sight sight = s.look(b, c + at, key, see);
          if (sight != kNone) {
            const int64_t panels = at / kTile * panel(K);
            times(a_k, of_chunk[0] + panels, panel(K), K, false, both[0]);
            times(a_v, of_chunk[1] + panels, panel(K), K, false, both[1]);
          }
          derive(both, sight, see, of_lse + at, delta + at, p + at, ds + key * wide + at, wide);
        }
        Block *to_k = sums_k + key / kBlock * (K / kBlock), *to_v = sums_v + (to_k - sums_k);
        for (int64_t d = 0; d < K; d += kBlock) {
          const int64_t panels = d / kTile * panel(n) + panel(from);
          times(rows_of(ds + key * wide + from, wide), of_chunk[2] + panels, panel(n), n - from, key < c,
                to_k[d / kBlock]);
          times(rows_of(p + from, wide), of_chunk[3] + panels, panel(n), n - from, key < c,
                to_v[d / kBlock]);
        }
      }
      const Rows to = s.by_head(by_q, b, h);
      for (int64_t at = 0; at < n; at += kBlock) {
        const int64_t deep = c + at + kBlock;
        turned(ds + at, wide, deep, turned_ds);
        for (int64_t d = 0; d < K; d += kBlock) {
          times(rows_turned(turned_ds, deep), key_depth + d / kTile * panel(padded), panel(padded), deep,
                false, both[0]);
          put_block(both[0], to, c + at, d);
        }
      }
    }
    for (int64_t key = 0; key < s.L; key += kBlock)
      for (int64_t d = 0; d < K; d += kBlock) {
        const int64_t i = key / kBlock * (K / kBlock) + d / kBlock;
        put_block(sums_k[i], s.by_head(by_k, b, h), key, d);
        put_block(sums_v[i], s.by_token(by_v, b, h), key, d);
      }
    return true;
  }

  static float dot(const bf16* a, const bf16* b, int64_t n) {
    vf total = splat(0);
    for (int64_t i = 0; i < n; i += W) total += load(a + i) * load(b + i);
    return sum(total);
  }

  static void put_block(const Block& c, const Rows& to, int64_t first, int64_t d) {
    for (int64_t r = 0; r < kBlock && first + r < to.count; r++)
      put(to.row(first + r) + d, rounded(c.c[r >> 4][0][r & 15], c.c[r >> 4][1][r & 15]));
  }

  // S^T and dP^T of 32 keys x 32 queries -> P^T and dS^T, in rows that lie `stride` apart
  void derive(const Block* both, Sight sight, const uint8_t (*see)[kBlock], const float* of_lse,
              const float* delta, bf16* p, bf16* ds, int64_t stride) const {
    const vf scale = splat(s.scale), back = splat(s.scale / LOG2E);
    for (int64_t r = 0; r < kBlock; r++, p += stride, ds += stride) {
      if (sight == kNone) {
        memset((void*)p, 0, 2 * kBlock);
        memset((void*)ds, 0, 2 * kBlock);
        continue;
      }
      alignas(64) float shown[kBlock];
      if (sight == kSome)
        for (int64_t j = 0; j < kBlock; j++) shown[j] = see[j][r] ? 0.0f : kHidden;
      for (int64_t j = 0; j < kBlock; j += W) {
        const int64_t half = j >> 4, i = j & 15;
        vf e = vexp2(load(both[0].c[r >> 4][half][r & 15] + i) * scale - load(of_lse + j));
        if (sight == kSome) e = load(shown + j) < splat(0) ? splat(0) : e;
        store(p + j, e);
        store(ds + j, e * (load(both[1].c[r >> 4][half][r & 15] + i) - load(delta + j)) * back);
      }
    }
  }
};

template <class Job>
inline int run_heads(const Job& job, int64_t threads) {
  std::atomic<int> status{PTM_OK};
  parallel_for(job.s.B * job.s.H, 1, threads, [&](int64_t begin, int64_t end) {
    Part part;
    for (int64_t i = begin; i < end; i++)
      if (!job.run(i / job.s.H, i % job.s.H)) status = PTM_NO_MEMORY;
  });
  return status;
}

inline Heads heads(const void* mask, int64_t masks, int64_t B, int64_t H, int64_t L, int64_t K) {
  return {B, H, L, K, (const uint8_t*)mask, masks > 1 ? L * L : 0, LOG2E / sqrtf(float(K))};
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

PTM_EXPORT(attention)
(const void* q, const void* k, const void* v, const void* mask, void* out, void* lse, int64_t masks,
 int64_t B, int64_t H, int64_t L, int64_t K, int64_t threads) {
  if (K % kBlock) return PTM_BAD_SHAPE;
  return run_heads(Forward{heads(mask, masks, B, H, L, K), q, k, v, out, (float*)lse}, threads);
}

PTM_EXPORT(attention_backward)
(const void* grad, const void* q, const void* k, const void* v, const void* mask, const void* out,
 const void* lse, void* by_q, void* by_k, void* by_v, int64_t masks, int64_t B, int64_t H, int64_t L,
 int64_t K, int64_t threads) {
  if (K % kBlock) return PTM_BAD_SHAPE;
  return run_heads(Backward{heads(mask, masks, B, H, L, K), grad, q, k, v, out, (const float*)lse,
                            by_q, by_k, by_v},
                   threads);
}
