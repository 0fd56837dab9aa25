// isa: portable avx2 avx512_bf16
// Weights to their nearest on a grid and back, the scales among them, as ptm/quant/grid.py has it
// without candidates: one visit to find a group's scale, one in the cache to round.
//
//   w (N, K) -> out (N, K), both fp32 or bf16; groups of `group` along K, the last may be shorter
//
// Every step is the reference's, in its order and in fp32 (a true division, ties to even, a scale
// rounded to fp16), so the bits are the same on every instruction set.
#include "../common/grid.h"

namespace PTM_NAMESPACE {

constexpr int64_t GRAIN = 1 << 15;  // weights

// Round to nearest fp16, ties to even, and back. Takes finite numbers; too large ones are infinite.
inline float as_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits & 0x80000000u;
  bits ^= sign;
  float size;
  memcpy(&size, &bits, 4);
  if (bits < 0x38800000u) {  // below 2^-14: whole multiples of 2^-24
    volatile float shifted = size + 0.5f;  // 2^-1 has a last bit of 2^-24
    size = shifted - 0.5f;
  } else {
    bits += 0x0fffu + ((bits >> 13) & 1);
    bits = bits >= 0x47800000u ? 0x7f800000u : bits & ~0x1fffu;
    memcpy(&size, &bits, 4);
  }
  return sign ? -size : size;
}

// Grids that make the scale of a group from its least and its largest weight, 0 among them.
struct OfIntegers : Integers {
  bool symmetric;

  float span(float low, float high) const {
    return symmetric ? (-low > high ? -low : high) / (most / 2) : (high - low) / most;
  }
  Group of(float scale, float low) const {
    float zero = (most + 1) / 2;
    if (!symmetric) {
      volatile float shifted = scale > 0 ? -low / scale + SHIFT : SHIFT;
      zero = shifted - SHIFT;
      zero = zero < 0 ? 0 : zero > most ? most : zero;
    }
    return with(splat(scale), splat(zero));
  }
};

struct OfFloats : Floats {
  float span(float low, float high) const { return (-low > high ? -low : high) / largest(); }
  Group of(float scale, float) const { return with(splat(scale), splat(0)); }
};

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
  const auto on = grid.of(scale, down);
  for_lanes(n, [&](int64_t i, auto lanes) { store(out + i, on(load(w + i, lanes)), lanes); });
  return true;
}

template <class T, class Grid>
void on_grid(const T* w, T* out, int64_t N, int64_t K, int64_t group, const Grid& grid,
             int32_t* is_wild, int64_t threads) {
  const int64_t size = group ? group : K, rows = GRAIN / (K ? K : 1);
  parallel_for(N, rows > 1 ? rows : 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      for (int64_t k = 0; k < K; k += size) {
        const int64_t count = K - k < size ? K - k : size;
        if (!group_on_grid(w + n * K + k, out + n * K + k, count, grid))
          __atomic_store_n(is_wild, 1, __ATOMIC_RELAXED);
      }
  });
}

template <class T>
int fake_quant(const T* w, T* out, int64_t N, int64_t K, int64_t group, int64_t bits,
               int64_t mantissa, bool symmetric, int32_t* is_wild, int64_t threads) {
  *is_wild = 0;
  if (bits == 4 || bits == 8) {
    const float most = float((1 << bits) - 1);
    on_grid(w, out, N, K, group, OfIntegers{{most}, symmetric}, is_wild, threads);
    return PTM_OK;
  }
  if (bits != 6 || mantissa < 2 || mantissa > 3 || !symmetric) return PTM_BAD_SHAPE;
  on_grid(w, out, N, K, group, OfFloats{{int(mantissa)}}, is_wild, threads);
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// is_wild: one int32, 1 where a weight is not finite or too large for its scale; then `out` has
// holes.
PTM_EXPORT(fake_quant)(const void* w, void* out, int64_t N, int64_t K, int64_t group, int64_t bits,
                       int64_t mantissa, int64_t symmetric, int32_t* is_wild, int64_t is_bf16,
                       int64_t threads) {
  if (is_bf16)
    return fake_quant((const bf16*)w, (bf16*)out, N, K, group, bits, mantissa, symmetric != 0,
                      is_wild, threads);
  return fake_quant((const float*)w, (float*)out, N, K, group, bits, mantissa, symmetric != 0,
                    is_wild, threads);
}
