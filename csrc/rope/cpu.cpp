// isa: portable avx2 avx512_bf16
// Rotary positions of queries and keys, from the rows of the two projections to heads in front of
// positions, in one visit. Yuan's checkpoints lay [q | k] of a token out as H heads x (q, k) x K:
// of the 2H slices of K numbers, head h has slice 2h as its query and 2h + 1 as its key.
//
//   q_rows, k_rows (B, L, H*K)  <->  q, k (B, H, L, K);   cos, sin (B or 1, L, half) fp32
//
// Gradients of heads may come as (B, L, H, K), as torch's attention makes them.
#include "../common/vec.h"

namespace PTM_NAMESPACE {

constexpr int64_t GRAIN = 16;  // tokens

// Pairs (i, i + half) turn by the angle; the rest of the head is copied.
template <class T>
void turn(const T* from, T* to, const float* cos, const float* sin, int64_t half, int64_t K,
          float sign) {
  for_lanes(half, [&](int64_t i, auto lanes) {
    vf a = load(from + i, lanes), b = load(from + half + i, lanes);
    vf c = load(cos + i, lanes), s = load(sin + i, lanes) * sign;
    store(to + i, a * c - b * s, lanes);
    store(to + half + i, b * c + a * s, lanes);
  });
  memcpy(to + 2 * half, from + 2 * half, sizeof(T) * size_t(K - 2 * half));
}

template <class T>
int rope(T* q_rows, T* k_rows, T* q, T* k, const float* cos, const float* sin, int64_t B, int64_t L,
         int64_t H, int64_t K, int64_t half, int64_t angle_batches, bool is_backward,
         bool heads_inside, int64_t threads) {
  if (2 * half > K) return PTM_BAD_SHAPE;
  parallel_for(B * L, GRAIN, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      int64_t b = t / L, l = t % L, angle = (angle_batches == 1 ? l : t) * half;
      for (int64_t slice = 0; slice < 2 * H; slice++) {
        T* row = slice < H ? q_rows + (t * H + slice) * K : k_rows + (t * H + slice - H) * K;
        int64_t h = slice / 2, place = heads_inside ? t * H + h : (b * H + h) * L + l;
        T* head = (slice % 2 ? k : q) + place * K;
        if (is_backward)
          turn(head, row, cos + angle, sin + angle, half, K, -1.0f);
        else
          turn(row, head, cos + angle, sin + angle, half, K, 1.0f);
      }
    }
  });
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// Forward reads the rows and writes the heads; backward reads the heads' gradients, turns them
// back and writes the rows'.
PTM_EXPORT(rope_qk)(void* q_rows, void* k_rows, void* q, void* k, const float* cos,
                    const float* sin, int64_t B, int64_t L, int64_t H, int64_t K, int64_t half,
                    int64_t angle_batches, int64_t is_backward, int64_t heads_inside,
                    int64_t is_bf16, int64_t threads) {
  if (is_bf16)
    return rope((bf16*)q_rows, (bf16*)k_rows, (bf16*)q, (bf16*)k, cos, sin, B, L, H, K, half,
                angle_batches, is_backward != 0, heads_inside != 0, threads);
  return rope((float*)q_rows, (float*)k_rows, (float*)q, (float*)k, cos, sin, B, L, H, K, half,
              angle_batches, is_backward != 0, heads_inside != 0, threads);
}
