// isa: portable avx2 avx512_bf16
// GPTQ's loops over the inputs of a block, and the errors by which scales are chosen.
//
// In a block the code of an input is found after those of the inputs before it, and what it moves
// by, delta (N,), goes to the other inputs' rows (N,): row[j] -= factor[j, i] * delta[i]. The
// reference passes over all rows for each i; here a row takes all deltas so far when its turn
// comes, in the order of i, so every element sees the same operations: a tile of outputs has its
// deltas in the L1 cache and the row in registers. Each operation rounds by itself, as torch's do
// (`kept`), so the bits are the reference's (ptm/quant/gptq.py, grid.py) on every instruction set.
#include "../common/grid.h"
#include "../common/kept.h"

namespace PTM_NAMESPACE {

constexpr int64_t MOST = 128;   // inputs of a block: BLOCK of ptm/quant/gptq.py
constexpr int V = 4;            // vectors of outputs in a tile
constexpr int64_t GRAIN = 256;  // outputs of a part

// Scales and zeros of all outputs, rows by group; no zeros where the middle code is all of them.
struct Scales {
  const float *scale, *zero;
  int64_t N, size;  // inputs of a group
  float middle;

  template <class Grid, class L>
  PTM_INLINE auto at(const Grid& grid, int64_t k, int64_t n, L lanes) const {
    const int64_t i = k / size * N + n;
    return grid.with(load(scale + i, lanes), zero ? load(zero + i, lanes) : splat(middle));
  }
};

// f(grid) for the grid of so many bits.
template <class F>
int with_grid(int64_t bits, int64_t mantissa, F f) {
  if (bits == 4 || bits == 8) return f(Integers{float((1 << bits) - 1)});
  if (bits != 6 || mantissa < 2 || mantissa > 3) return PTM_BAD_SHAPE;
  return f(Floats{int(mantissa)});
}
inline float middle_of(int64_t bits) { return float(1 << (bits - 1)); }

// f(vectors, n, lanes) for all outputs, tile by tile; a tile has T vectors.
template <int T>
struct Vectors {};
template <class F>
void for_tiles(int64_t N, int64_t threads, F f) {
  parallel_for(N, GRAIN, threads, [&](int64_t n, int64_t end) {
    for (; n + V * W <= end; n += V * W) f(Vectors<V>{}, n, Whole{});
    for (; n + W <= end; n += W) f(Vectors<1>{}, n, Whole{});
    if (n < end) f(Vectors<1>{}, n, Ragged{end - n});
  });
}

// row -= factor[i] * delta[i] for i in [from, to)
template <int T>
PTM_INLINE void take(vf (&row)[T], const float* factor, const float (*delta)[T * W], int64_t from,
                     int64_t to) {
  for (int64_t i = from; i < to; i++)
    for (int v = 0; v < T; v++) row[v] = row[v] - kept(load(delta[i] + v * W) * factor[i]);
}

struct Block {
  float* rows;          // (B, N)
  const float* factor;  // (B, B)
  int64_t B, N;

  template <int T, class L>
  PTM_INLINE void get(vf (&row)[T], int64_t j, int64_t n, L lanes) const {
    for (int v = 0; v < T; v++) row[v] = load(rows + j * N + n + v * W, lanes);
  }
  template <int T, class L>
  PTM_INLINE void put(const vf (&row)[T], int64_t j, int64_t n, L lanes) const {
    for (int v = 0; v < T; v++) store(rows + j * N + n + v * W, row[v], lanes);
  }
};

template <int T, class Grid, class L>
void sweep(Vectors<T>, const Block& block, const int64_t* order, float* near, float* errors,
           const Scales& scales, const Grid& grid, int64_t n, L lanes) {
  alignas(64) float delta[MOST][T * W];
  const int64_t N = block.N;
  for (int64_t j = 0; j < block.B; j++) {
    const float* factor = block.factor + j * block.B;
    const int64_t k = order[j];
    vf row[T];
    block.get(row, j, n, lanes);
    take<T>(row, factor, delta, 0, j);
    for (int v = 0; v < T; v++) {
      const int64_t at = n + v * W;
      const vf found = kept(scales.at(grid, k, at, lanes)(row[v]));
      const vf error = (row[v] - found) / factor[j];
      store(near + k * N + at, found, lanes);
      store(errors + j * N + at, error, lanes);
      store(delta[j] + v * W, error);
    }
  }
}

// Returns whether any code moved.
template <int T, class Grid, class L>
bool descend(Vectors<T>, const Block& block, const uint8_t* dead, float* near, int64_t start,
             const Scales& scales, const Grid& grid, int64_t n, L lanes) {
  alignas(64) float delta[MOST][T * W];
  const int64_t N = block.N;
  vu moved{};
  vf row[T];
  for (int64_t j = 0; j < block.B; j++) {
    const float* factor = block.factor + j * block.B;
    block.get(row, j, n, lanes);
    take<T>(row, factor, delta, 0, j);
    block.put(row, j, n, lanes);
    for (int v = 0; v < T; v++) {
      const int64_t at = n + v * W;
      vf change = splat(0);
      if (!dead[j]) {
        const vf before = load(near + j * N + at, lanes);
        const vf lowest = row[v] / factor[j] + before;
        const vf found = kept(scales.at(grid, start + j, at, lanes)(lowest));
        change = found - before;
        moved |= (vu)(change != splat(0));
        store(near + j * N + at, found, lanes);
      }
      store(delta[j] + v * W, change);
    }
  }
  for (int64_t j = 0; j < block.B; j++) {
    block.get(row, j, n, lanes);
    take<T>(row, block.factor + j * block.B, delta, j, block.B);
    block.put(row, j, n, lanes);
  }
  for (int i = 0; i < W; i++)
    if (moved[i]) return true;
  return false;
}

constexpr int LANES = 16;  // of a sum: `_sum` of ptm/quant/grid.py

// sum of importance * (near - w)^2, in LANES sums and these by halves.
template <class Group>
float error_of(const float* w, const float* importance, int64_t count, const Group& group) {
  vf sums[LANES / W] = {};
  const auto add = [&](int64_t i, int r, auto lanes) {
    const vf x = load(w + i, lanes), gap = kept(group(x)) - x;
    sums[r] = sums[r] + kept(kept(gap * gap) * load(importance + i, lanes));
  };
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int r = 0; r < LANES / W; r++) add(i + r * W, r, Whole{});
  for (int r = 0; i < count; r++, i += W) {
    if (i + W <= count)
      add(i, r, Whole{});
    else
      add(i, r, Ragged{count - i});
  }
  float total[LANES];
  memcpy(total, sums, sizeof total);
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) total[l] += total[l + half];
  return total[0];
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// rows (B, N): weights of the inputs order (B,), less the errors of all before the block. factor
// (B, B): transpose of U of the block. near (K, N): its rows order[j] are written; errors (B, N).
// scale, zero (G, N), zero may be null; an input k is of group k / size.
PTM_EXPORT(gptq_sweep)(float* rows, const float* factor, const int64_t* order, float* near,
                       float* errors, const float* scale, const float* zero, int64_t B, int64_t N,
                       int64_t size, int64_t bits, int64_t mantissa, int64_t threads) {
  if (B > MOST) return PTM_BAD_SHAPE;
  const Block block{rows, factor, B, N};
  const Scales scales{scale, zero, N, size, middle_of(bits)};
  return with_grid(bits, mantissa, [&](const auto& grid) {
    for_tiles(N, threads, [&](auto vectors, int64_t n, auto lanes) {
      sweep(vectors, block, order, near, errors, scales, grid, n, lanes);
    });
    return PTM_OK;
  });
}

// rows (B, N): slopes of the inputs from `start` on; factor (B, B) of H; near (B, N): their weights
// on the grid; dead (B,): inputs to leave. Modifies rows, near; moved (1,): whether any did.
PTM_EXPORT(gptq_descend)(float* rows, const float* factor, const uint8_t* dead, float* near,
                         const float* scale, const float* zero, int32_t* moved, int64_t start,
                         int64_t B, int64_t N, int64_t size, int64_t bits, int64_t mantissa,
                         int64_t threads) {
  if (B > MOST) return PTM_BAD_SHAPE;
  const Block block{rows, factor, B, N};
  const Scales scales{scale, zero, N, size, middle_of(bits)};
  *moved = 0;
  return with_grid(bits, mantissa, [&](const auto& grid) {
    for_tiles(N, threads, [&](auto vectors, int64_t n, auto lanes) {
      if (descend(vectors, block, dead, near, start, scales, grid, n, lanes))
        __atomic_store_n(moved, 1, __ATOMIC_RELAXED);
    });
    return PTM_OK;
  });
}

// w (N, K), importance (K,); scale and zero of C candidates (C, N, G), zero may be null; errors
// (C, N, G): of each group of `size` inputs, the last may be shorter.
PTM_EXPORT(gptq_errors)(const float* w, const float* importance, const float* scale,
                        const float* zero, float* errors, int64_t C, int64_t N, int64_t K,
                        int64_t size, int64_t bits, int64_t mantissa, int64_t threads) {
  const int64_t G = (K + size - 1) / size;
  return with_grid(bits, mantissa, [&](const auto& grid) {
    parallel_for(N, 16, threads, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++)
        for (int64_t g = 0; g < G; g++) {
          const int64_t k = g * size, count = K - k < size ? K - k : size;
          for (int64_t c = 0; c < C; c++) {
            const int64_t at = (c * N + n) * G + g;
            const auto group =
                grid.with(splat(scale[at]), splat(zero ? zero[at] : middle_of(bits)));
            errors[at] = error_of(w + n * K + k, importance + k, count, group);
          }
        }
    });
    return PTM_OK;
  });
}
