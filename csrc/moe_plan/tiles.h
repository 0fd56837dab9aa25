// Tiles of up to ROWS rows of one expert, found by a block of threads in the plan, and the sum of a
// token's rows. How many tiles there are only the device knows: blocks are launched for as many as
// there can be, and those that find none leave.
#pragma once

#include "../common/device.h"

namespace PTM_NAMESPACE {

template <int ROWS>
struct Tiles {
  const int64_t *order, *starts;  // of the plan: rows, and where an expert's begin
  int64_t E;

  static int64_t most(int64_t rows, int64_t E) {
    const int64_t used = rows < E ? rows : E;
    return (rows + used * (ROWS - 1)) / ROWS;
  }

  // Whether there is such a tile; then its expert, its first row's place and how many it has.
  PTM_BODY bool find(int64_t tile, int64_t& expert, int64_t& first, int& count) const {
    for (int64_t base = 0; base < E; base += 32) {
      const int64_t e = base + lane();
      const int here = e < E ? int((starts[e + 1] - starts[e] + ROWS - 1) / ROWS) : 0;
      const int all = warp_sum(here);
      if (tile >= all) {
        tile -= all;
        continue;
      }
      expert = base;
      for (int of = from_lane(here, 0); tile >= of; of = from_lane(here, int(expert - base))) {
        tile -= of;
        expert++;
      }
      first = starts[expert] + tile * ROWS;
      const int64_t left = starts[expert + 1] - first;
      count = int(left < ROWS ? left : ROWS);
      return true;
    }
    return false;
  }
};

// y[t] = sum over a of weight[t, a] parts[t, a], in the order of a; of parts without weights
template <class P, class T, int N>
struct Combine {
  static constexpr int THREADS = 256;
  const P* parts;
  const float* weights;
  T* y;
  int64_t tokens, A, D;

  PTM_BODY void operator()() const {
    const int64_t i = (block_id() * THREADS + thread_id()) * N, t = i / D, d = i % D;
    if (t >= tokens) return;
    float total[N] = {}, part[N];
    for (int64_t a = t * A; a < (t + 1) * A; a++) {
      const float weight = weights ? weights[a] : 1.0f;
      load<N>(parts + a * D + d, part);
#pragma unroll
      for (int j = 0; j < N; j++) total[j] += weight * part[j];
    }
    store<N>(y + i, total);
  }
};

template <class P, class T>
int combine(const P* parts, const float* weights, T* y, int64_t tokens, int64_t A, int64_t D,
            void* stream) {
  return by_width<T>(D, aligned16(parts, y), [&](auto width) {
    using Body = Combine<P, T, decltype(width)::N>;
    return launch(Body{parts, weights, y, tokens, A, D},
                  divided_up(tokens * D, Body::THREADS * width.N), 0, stream);
  });
}

}  // namespace PTM_NAMESPACE
