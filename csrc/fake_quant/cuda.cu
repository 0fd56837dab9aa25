// Weights to their nearest on a grid and back, as cpu.cpp has it, with the same bits. Up to 32
// neighbouring lanes have a group, sixteen bytes each at a time; what a lane reads first stays in its
// registers, so a group that fits there is read once, and the rest of a longer one is read again.
#include "../common/device.h"
#include "../common/grid.h"

namespace PTM_NAMESPACE {

template <class T, int N, class Grid>
struct OnGrid {
  static constexpr int THREADS = 256;
  const T* w;
  T* out;
  int32_t* is_wild;
  int64_t groups, per_row, K, size;
  int lanes;  // of a group, a power of two
  Grid grid;

  // The extremes of a group, 0 among them.
  struct Seen {
    float low = 0, high = 0;
    uint32_t wild = 0;

    PTM_BODY void add(const float* x) {
#pragma unroll
      for (int j = 0; j < N; j++) {
        wild |= (bits_of(x[j]) & 0x7f800000u) == 0x7f800000u;
        low = smaller(x[j], low);
        high = larger(x[j], high);
      }
    }
  };

  PTM_BODY void operator()() const {
    const int64_t g = block_id() * (THREADS / lanes) + thread_id() / lanes;
    const int64_t row = per_row == 1 ? g : g / per_row, k = (g - row * per_row) * size;
    const int64_t count = g >= groups ? 0 : K - k < size ? K - k : size;
    const int64_t first = (thread_id() & (lanes - 1)) * N, step = int64_t(lanes) * N;
    const T* from = w + row * K + k;
    T* to = out + row * K + k;
    float kept[N] = {}, x[N];
    Seen seen;
    if (first < count) {
      load<N>(from + first, kept);
      seen.add(kept);
    }
    for (int64_t i = first + step; i < count; i += step) {
      load<N>(from + i, x);
      seen.add(x);
    }
    const float low = part_fold(lanes, seen.low, [](float a, float b) { return smaller(a, b); });
    const float high = part_fold(lanes, seen.high, [](float a, float b) { return larger(a, b); });
    const float scale = as_half(grid.span(low, high));
    uint32_t wild = part_fold(lanes, seen.wild, [](uint32_t a, uint32_t b) { return a | b; });
    wild |= !(scale < float_of(0x7f800000u));
    if (wild && count && is_wild) *is_wild = 1;
    const auto on = grid.template of<float>(scale, low);
    if (first < count) put(to + first, kept, on, wild != 0);
    for (int64_t i = first + step; i < count; i += step) {
      load<N>(from + i, x);
      put(to + i, x, on, wild != 0);
    }
  }

  template <class On>
  static PTM_BODY void put(T* to, float* x, const On& on, bool is_wild) {
#pragma unroll
    for (int j = 0; j < N; j++) x[j] = is_wild ? float_of(0x7fc00000u) : on(x[j]);
    store<N>(to, x);
  }
};

template <class T, class Grid>
int on_grid(const T* w, T* out, int64_t N, int64_t K, int64_t group, const Grid& grid,
            int32_t* is_wild, void* stream) {
  if (N * K == 0) return PTM_OK;
  const int64_t size = group && group < K ? group : K, per_row = divided_up(K, size);
  const bool is_aligned = aligned16(w, out) && K % (16 / int64_t(sizeof(T))) == 0;
  return by_width<T>(size, is_aligned, [&](auto width) {
    int lanes = 1;
    while (lanes < 32 && lanes * width.N < size) lanes *= 2;
    using Body = OnGrid<T, decltype(width)::N, Grid>;
    const Body body{w, out, is_wild, N * per_row, per_row, K, size, lanes, grid};
    return launch(body, divided_up(N * per_row, Body::THREADS / lanes), 0, stream);
  });
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// As cpu.cpp's, but is_wild may be null and is not made 0; a group with a weight that is not finite,
// or without a scale, becomes NaN.
PTM_EXPORT(fake_quant)(const void* w, void* out, int64_t N, int64_t K, int64_t group, int64_t bits,
                       int64_t mantissa, int64_t symmetric, int32_t* is_wild, int64_t is_bf16,
                       void* stream) {
  return with_scaled_grid(bits, mantissa, symmetric != 0, [&](const auto& grid) {
    if (is_bf16) return on_grid((const bf16*)w, (bf16*)out, N, K, group, grid, is_wild, stream);
    return on_grid((const float*)w, (float*)out, N, K, group, grid, is_wild, stream);
  });
}
