// Localized filtering: two causal convolutions of width 2 over rows, residual and norm, bf16:
//
//   c_t = A0 n_(t-1) + A1 n_t + a      (D -> D/2)
//   s_t = B0 c_(t-1) + B1 c_t + b + n_t      z_t = RMSNorm(s_t)
//
//   forward    c = [n_(t-1) ; n_t] x A      s = [c_(t-1) ; c_t] x B, normed where its row is whole
//   backward   ds of the norm      dc = [ds_t ; ds_(t+1)] x B back
//              dn = ds + [dc_t ; dc_(t+1)] x A back      dB, dA of whole columns of ds, dc (weights.h)
//
// No row is moved for it (taps.h). Products sum in fp32; c, s, ds and dc are rounded to bf16 once.
// Nothing depends on threads. Kept for the backward: c, s and a number a row.
#include "../common/norm.h"
#include "few.h"
#include "weights.h"

namespace PTM_NAMESPACE {

// Rows of a part: what a product reads of them stays in the L2 cache
inline int64_t rows_at_a_time(int64_t width) {
  return least(512, most(64, (1 << 19) / width / kBlock * kBlock));
}

// All rows of pairs times panels; done as in rows_times
template <class Done>
inline bool all_times(const Pairs& a, const uint32_t* panels, int64_t columns, int64_t threads,
                      Done done) {
  std::atomic<bool> fits{true};
  parallel_for(a.rows.T, rows_at_a_time(a.width), threads, [&](int64_t begin, int64_t end) {
    Part part;
    if (!rows_times(a, begin, end, panels, columns, done)) fits = false;
  });
  return fits;
}

// 32 sums of a product and what is added to them, rounded
PTM_INLINE Row32 with(const float* c0, const float* c1, const float* bias, const bf16* row) {
  alignas(64) float both[32];
  for (int j = 0; j < 32; j += W) {
    vf sum = load(j < 16 ? c0 + j : c1 + j - 16);
    if (bias) sum += load(bias + j);
    if (row) sum += load(row + j);
    store(both + j, sum);
  }
  return rounded(both, both + 16);
}

struct Filter {
  int64_t T, L, D;
  const bf16 *n, *w1, *w2;
  const float* norm;
  const uint8_t* connected;
  int64_t threads;

  int64_t half() const { return D / 2; }
  Weight first() const { return {w1, half(), D}; }
  Weight second() const { return {w2, D, half()}; }

  // The same of few rows (few.h)
  int few(const float* b1, const float* b2, bf16* c, bf16* s, bf16* z, float* rstd, float eps) const {
    Room& mine = room_of_op();
    if (!mine.reset(Room::bytes<uint32_t>(T * D) + Room::bytes<bf16>(T * half()) +
                    Room::bytes<uint8_t>(T + 1)))
      return PTM_NO_MEMORY;
    uint32_t* pairs = mine.take<uint32_t>(T * D);
    uint8_t* follows = mine.take<uint8_t>(T + 1);
    if (!c) c = mine.take<bf16>(T * half());
    if (!s) s = z;
    find_neighbours(connected, T, L, follows);
    zip_pairs({T, follows}, n, D, pairs);
    few_times(pairs, T, first(), threads, [&](int64_t t, int64_t o, float sum) {
      c[t * half() + o] = to_bf16(sum + b1[o]);
    });
    zip_pairs({T, follows}, c, half(), pairs);
    few_times(pairs, T, second(), threads, [&](int64_t t, int64_t o, float sum) {
      s[t * D + o] = to_bf16(sum + b2[o] + to_float(n[t * D + o]));
    });
    return norm_rows<bf16>(s, nullptr, norm, z, nullptr, rstd, T, D, eps, threads);
  }

  int forward(const float* b1, const float* b2, bf16* c, bf16* s, bf16* z, float* rstd,
              float eps) const {
    if (T <= kFew) return few(b1, b2, c, s, z, rstd, eps);
    Room& mine = room_of_op();
    if (!mine.reset(2 * Room::bytes<uint32_t>(first().dwords()) + Room::bytes<uint8_t>(T + 1) +
                    Room::bytes<bf16>(c ? 0 : T * half())))
      return PTM_NO_MEMORY;
    uint32_t *panels1 = mine.take<uint32_t>(first().dwords()),
             *panels2 = mine.take<uint32_t>(second().dwords());
    uint8_t* follows = mine.take<uint8_t>(T + 1);
    if (!c) c = mine.take<bf16>(T * half());
    if (!s) s = z;
    find_neighbours(connected, T, L, follows);
    const Rows rows{T, follows};
    const bool fits =
        first().forward(panels1, threads) && second().forward(panels2, threads) &&
        all_times({rows, n, D, kBefore}, panels1, half(), threads,
                  [&](int64_t t, int64_t j, const float* c0, const float* c1) {
                    put(c + t * half() + j, with(c0, c1, b1 + j, nullptr));
                  }) &&
        all_times({rows, c, half(), kBefore}, panels2, D, threads,
                  [&](int64_t t, int64_t j, const float* c0, const float* c1) {
                    bf16* row = s + t * D;
                    put(row + j, with(c0, c1, b2 + j, n + t * D + j));
                    if (j + 32 == D)
                      norm_row<bf16>(row, nullptr, norm, z + t * D, nullptr, rstd + t, D, eps);
                  });
    return fits ? PTM_OK : PTM_NO_MEMORY;
  }

  int backward(const bf16* grad, const bf16* c, const bf16* s, const float* rstd, bf16* by_n,
               void* by_w1, float* by_b1, void* by_w2, float* by_b2, float* by_norm,
               Into into) const {
    const int64_t padded = up(T, kStep);
    Room& mine = room_of_op();
    if (!mine.reset(2 * Room::bytes<uint32_t>(first().dwords()) + Room::bytes<uint8_t>(T + 1) +
                    Room::bytes<bf16>(padded * D) + Room::bytes<bf16>(padded * half())))
      return PTM_NO_MEMORY;
    uint32_t *panels1 = mine.take<uint32_t>(first().dwords()),
             *panels2 = mine.take<uint32_t>(second().dwords());
    uint8_t* follows = mine.take<uint8_t>(T + 1);
    bf16 *ds = mine.take<bf16>(padded * D), *dc = mine.take<bf16>(padded * half());
    memset((void*)(ds + T * D), 0, sizeof(bf16) * (padded - T) * D);
    memset((void*)(dc + T * half()), 0, sizeof(bf16) * (padded - T) * half());
    find_neighbours(connected, T, L, follows);
    const Rows rows{T, follows};
    const int normed = norm_backward<bf16>(grad, s, norm, rstd, nullptr, ds, by_norm, T, D, threads);
    if (normed != PTM_OK) return normed;
    bool fits = first().backward(panels1, threads) && second().backward(panels2, threads) &&
                all_times({rows, ds, D, kAfter}, panels2, half(), threads,
                          [&](int64_t t, int64_t j, const float* c0, const float* c1) {
                            put(dc + t * half() + j, rounded(c0, c1));
                          }) &&
                all_times({rows, dc, half(), kAfter}, panels1, D, threads,
                          [&](int64_t t, int64_t j, const float* c0, const float* c1) {
                            const Row32 row = with(c0, c1, nullptr, ds + t * D + j);
                            put(by_n + t * D + j, row);
                          });
    if (!by_w1) return fits ? PTM_OK : PTM_NO_MEMORY;
    sum_rows(dc, T, half(), by_b1, threads);
    sum_rows(ds, T, D, by_b2, threads);
    const WeightGradient of[2] = {{rows, dc, n, half(), D, by_w1, into},
                                  {rows, ds, c, D, half(), by_w2, into}};
    std::atomic<bool> done{fits};
    parallel_for(of[0].parts() + of[1].parts(), 1, threads, [&](int64_t begin, int64_t) {
      Part part;
      const int64_t i = begin - of[0].parts();
      if (!(i < 0 ? of[0].run(begin) : of[1].run(i))) done = false;
    });
    return done ? PTM_OK : PTM_NO_MEMORY;
  }
};

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// n, z (T, D) in sequences of L; w1 (D/2, D, 2), w2 (D, D/2, 2); b1, b2, norm fp32; connected (T,)
// bytes or null; c (T, D/2) and s (T, D), or null where they are not kept; rstd (T,) fp32.
PTM_EXPORT(lfa)
(const void* n, const void* w1, const void* b1, const void* w2, const void* b2, const void* norm,
 const void* connected, void* c, void* s, void* z, void* rstd, int64_t T, int64_t L, int64_t D,
 double eps, int64_t threads) {
  if (D % 64) return PTM_BAD_SHAPE;
  const Filter filter{T, L, D, (const bf16*)n, (const bf16*)w1, (const bf16*)w2,
                      (const float*)norm, (const uint8_t*)connected, threads};
  return filter.forward((const float*)b1, (const float*)b2, (bf16*)c, (bf16*)s, (bf16*)z,
                        (float*)rstd, float(eps));
}

// by_w1, by_b1, by_w2, by_b2: null where no weight's gradient is wanted; `into` is of by_w1 and
// by_w2, by_b1, by_b2 and by_norm are fp32.
PTM_EXPORT(lfa_backward)
(const void* grad, const void* n, const void* w1, const void* w2, const void* norm,
 const void* connected, const void* c, const void* s, const void* rstd, void* by_n, void* by_w1,
 void* by_b1, void* by_w2, void* by_b2, void* by_norm, int64_t into, int64_t T, int64_t L, int64_t D,
 int64_t threads) {
  if (D % 64 || into < kRounded || into > kAdded) return PTM_BAD_SHAPE;
  const Filter filter{T, L, D, (const bf16*)n, (const bf16*)w1, (const bf16*)w2,
                      (const float*)norm, (const uint8_t*)connected, threads};
  return filter.backward((const bf16*)grad, (const bf16*)c, (const bf16*)s, (const float*)rstd,
                         (bf16*)by_n, by_w1, (float*)by_b1, by_w2, (float*)by_b2, (float*)by_norm,
                         Into(into));
}
