// Rotary positions as cpu.cpp has them: a block for a token, its threads over the pieces of sixteen
// bytes of the token's 2H slices. A piece of the turned part has two ends, (i, i + half).
#include "../common/device.h"

namespace PTM_NAMESPACE {

template <class T, int N>
struct Turn {
  static constexpr int THREADS = 256;
  T *q_rows, *k_rows, *q, *k;
  const float *cos, *sin;
  int64_t L, H, K, half, angle_batches;
  bool is_backward, heads_inside;

  PTM_BODY void operator()() const {
    const int64_t t = block_id(), b = t / L, l = t % L;
    const int64_t angle = (angle_batches == 1 ? l : t) * half;
    const int turned = int(half / N), pieces = turned + int((K - 2 * half) / N);
    for (int i = thread_id(); i < 2 * int(H) * pieces; i += THREADS) {
      const int slice = i / pieces, piece = i % pieces, h = slice / 2;
      T* row = slice < H ? q_rows + (t * H + slice) * K : k_rows + (t * H + slice - H) * K;
      T* head = (slice % 2 ? k : q) + (heads_inside ? t * H + h : (b * H + h) * L + l) * K;
      const T* from = is_backward ? head : row;
      T* to = is_backward ? row : head;
      if (piece < turned)
        turn(from + piece * N, to + piece * N, angle + piece * N);
      else
        copy(from + half + piece * N, to + half + piece * N);
    }
  }

  PTM_BODY void turn(const T* from, T* to, int64_t angle) const {
    float x[N], y[N], c[N], s[N];
    load<N>(from, x);
    load<N>(from + half, y);
    load<N>(cos + angle, c);
    load<N>(sin + angle, s);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float a = x[j], other = is_backward ? -s[j] : s[j];
      x[j] = a * c[j] - y[j] * other;
      y[j] = y[j] * c[j] + a * other;
    }
    store<N>(to, x);
    store<N>(to + half, y);
  }

  PTM_BODY void copy(const T* from, T* to) const {
    if constexpr (N == 1)
      *to = *from;
    else
      put_whole(to, *(const Bytes16*)from);
  }
};

template <class T>
int rope(T* q_rows, T* k_rows, T* q, T* k, const float* cos, const float* sin, int64_t B, int64_t L,
         int64_t H, int64_t K, int64_t half, int64_t angle_batches, bool is_backward,
         bool heads_inside, void* stream) {
  if (2 * half > K || 2 * H * K > INT32_MAX) return PTM_BAD_SHAPE;
  constexpr int N = 16 / int(sizeof(T));
  const bool is_aligned = aligned16(q_rows, k_rows, q, k, cos, sin) && K % N == 0;
  return by_width<T>(half, is_aligned, [&](auto width) {
    return launch(Turn<T, width.N>{q_rows, k_rows, q, k, cos, sin, L, H, K, half, angle_batches,
                                   is_backward, heads_inside},
                  B * L, 0, stream);
  });
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

PTM_EXPORT(rope_qk)(void* q_rows, void* k_rows, void* q, void* k, const float* cos,
                    const float* sin, int64_t B, int64_t L, int64_t H, int64_t K, int64_t half,
                    int64_t angle_batches, int64_t is_backward, int64_t heads_inside,
                    int64_t is_bf16, void* stream) {
  if (is_bf16)
    return rope((bf16*)q_rows, (bf16*)k_rows, (bf16*)q, (bf16*)k, cos, sin, B, L, H, K, half,
                angle_batches, is_backward != 0, heads_inside != 0, stream);
  return rope((float*)q_rows, (float*)k_rows, (float*)q, (float*)k, cos, sin, B, L, H, K, half,
              angle_batches, is_backward != 0, heads_inside != 0, stream);
}
