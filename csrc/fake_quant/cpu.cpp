// isa: portable avx2 avx512_bf16
// Weights to their nearest on a grid and back, the scales among them, as ptm/quant/grid.py has it
// without candidates: one visit to find a group's scale, one in the cache to round.
//
//   w (N, K) -> out (N, K), both fp32 or bf16; groups of `group` along K, the last may be shorter
//
// Every step is the reference's, in its order and in fp32 (grid.h; a scale is rounded to fp16), so
// the bits are the same on every instruction set.
#include "../common/grid.h"
#include "../common/vec.h"

namespace PTM_NAMESPACE {

constexpr int64_t GRAIN = 1 << 15;  // weights

// Returns whether all weights are finite and their scales too.
template <class T, class Grid>
bool group_on_grid(const T* w, T* out, int64_t n, const Grid& grid) {
  vf low = splat(0), high = splat(0);
  vu wild{};
  for_lanes(n, [&](int64_t i, auto lanes) {
    vf x = load(w + i, lanes);
    wild |= (vu)(((vu)x & 0x7f800000u) == vu{} + 0x7f800000u);
    low = vmin(low, x);
    high = vmax(high, x);
  });
  for (int i = 0; i < W; i++)
    if (wild[i]) return false;
  const float down = least(low), up = largest(high);
  const float scale = as_half(grid.span(down, up));
  if (!(scale < __builtin_inff())) return false;
  const auto on = grid.template of<vf>(scale, down);
  for_lanes(n, [&](int64_t i, auto lanes) { store(out + i, on(load(w + i, lanes)), lanes); });
  return true;
}

template <class T, class Grid>
int on_grid(const T* w, T* out, int64_t N, int64_t K, int64_t group, const Grid& grid,
            int32_t* is_wild, int64_t threads) {
  const int64_t size = group ? group : K, rows = GRAIN / (K ? K : 1);
  *is_wild = 0;
  parallel_for(N, rows > 1 ? rows : 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      for (int64_t k = 0; k < K; k += size) {
        const int64_t count = K - k < size ? K - k : size;
        if (!group_on_grid(w + n * K + k, out + n * K + k, count, grid))
          __atomic_store_n(is_wild, 1, __ATOMIC_RELAXED);
      }
  });
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// is_wild: one int32, 1 where a weight is not finite or too large for its scale; then `out` has
// holes.
PTM_EXPORT(fake_quant)(const void* w, void* out, int64_t N, int64_t K, int64_t group, int64_t bits,
                       int64_t mantissa, int64_t symmetric, int32_t* is_wild, int64_t is_bf16,
                       int64_t threads) {
  return with_scaled_grid(bits, mantissa, symmetric != 0, [&](const auto& grid) {
    if (is_bf16)
      return on_grid((const bf16*)w, (bf16*)out, N, K, group, grid, is_wild, threads);
    return on_grid((const float*)w, (float*)out, N, K, group, grid, is_wild, threads);
  });
}
