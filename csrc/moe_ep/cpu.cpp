// isa: portable avx2 avx512
// What the home of tokens does with their rows, of bf16, where experts of other ranks read and write
// them (ptm/kernels/moe_ep_mlp.py), each in one visit. The A rows of a token are neighbours.
//
//   combine   y_t = sum over a of w_ta rows_ta, rounded after each; rows are copied to `kept`
//   spread    rows_ta = w_ta grad_t;  by_ta = grad_t * kept_ta, whose sum is the gradient of w_ta
//   add       total_t = sum over a of rows_ta, rounded after each
//
// Products of bf16 are exact in fp32, so the bits are those of torch. avx512_bf16 is left out: its
// rounding makes numbers below 1.2e-38 zero.
#include "../common/vec.h"

namespace PTM_NAMESPACE {

constexpr int64_t kTokens = 64;  // of a part

// f(t, d, lanes) of every token and its dims
template <class F>
void for_rows(int64_t T, int64_t D, int64_t threads, F f) {
  parallel_for(T, kTokens, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for_lanes(D, [&](int64_t d, auto lanes) { f(t, d, lanes); });
  });
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

PTM_EXPORT(moe_ep_combine)
(const bf16* rows, const bf16* weights, bf16* y, bf16* kept, int64_t T, int64_t A, int64_t D,
 int64_t threads) {
  for_rows(T, D, threads, [&](int64_t t, int64_t d, auto lanes) {
    vf total = splat(0);
    for (int64_t r = t * A; r < (t + 1) * A; r++) {
      const vf row = load(rows + r * D + d, lanes);
      if (kept) store(kept + r * D + d, row, lanes);
      total = as_stored(y, total + row * splat(to_float(weights[r])));
    }
    store(y + t * D + d, total, lanes);
  });
  return PTM_OK;
}

PTM_EXPORT(moe_ep_spread)
(const bf16* grad, const bf16* weights, const bf16* kept, bf16* rows, bf16* by, int64_t T, int64_t A,
 int64_t D, int64_t threads) {
  for_rows(T, D, threads, [&](int64_t t, int64_t d, auto lanes) {
    const vf g = load(grad + t * D + d, lanes);
    for (int64_t r = t * A; r < (t + 1) * A; r++) {
      store(by + r * D + d, g * load(kept + r * D + d, lanes), lanes);
      store(rows + r * D + d, g * splat(to_float(weights[r])), lanes);
    }
  });
  return PTM_OK;
}

PTM_EXPORT(moe_ep_add)
(const bf16* rows, bf16* total, int64_t T, int64_t A, int64_t D, int64_t threads) {
  for_rows(T, D, threads, [&](int64_t t, int64_t d, auto lanes) {
    vf sum = load(rows + t * A * D + d, lanes);
    for (int64_t r = t * A + 1; r < (t + 1) * A; r++)
      sum = as_stored(total, sum + load(rows + r * D + d, lanes));
    store(total + t * D + d, sum, lanes);
  });
  return PTM_OK;
}
