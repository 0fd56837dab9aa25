// Routed SwiGLU experts with packed weights for a few rows each, as cpu.cpp has them, in four
// launches whatever the routing is, and without a word to the host:
//
//   plan      rows by expert (csrc/moe_plan)
//   inner     (silu(x1) * x2) of an expert's rows, rounded to their type: a block of threads for four
//             rows and 16 of the F, for which it reads the panels of both halves of w1
//   outer     its product with w2, in fp32, by token and slot
//   combine   each token's, weighted and added up in the order of its slots
//
// A tile is up to four rows of one expert, which a block finds in the plan (csrc/moe_plan/tiles.h).
#include "../moe_plan/plan.h"
#include "../moe_plan/tiles.h"
#include "few.h"

namespace PTM_NAMESPACE {

template <class T, int BITS>
struct Inner {
  using Panel = Few<T, BITS>;
  static constexpr int THREADS = Panel::THREADS;
  Tiles<ROWS> tiles;
  Weights w;  // w1, of each expert (2 F, D)
  const T* x;
  T* inner;
  int64_t A, F;
  Inputs<T> inputs;

  PTM_BODY void operator()() const {
    const int64_t panels = (F + PANEL - 1) / PANEL, p = block_id() % panels;
    int64_t e, first;
    int count;
    if (!tiles.find(block_id() / panels, e, first, count)) return;  // all threads alike
    Panel::begin(w);
    Panel::by_count(count, [&](auto width) {
      constexpr int M = decltype(width)::N;
      const T* row[M];
#pragma unroll
      for (int m = 0; m < M; m++)
        row[m] = x + tiles.order[first + (m < count ? m : 0)] / A * inputs.count;
      // Gates of 16 columns, then the panel that their other halves begin in, and the next where 16
      // does not divide F.
      float* sums = shared_memory<float>() + Panel::SHARED;  // (3, M, 16)
      const int ahead = int(F % PANEL);
      for (int i = 0; i < (ahead ? 3 : 2); i++) {
        const int64_t panel = i ? F / PANEL + p + i - 1 : p;
        if (panel < w.panels())
          Panel::template multiply<M>(w, e * w.panels() + panel, row, inputs, sums + i * M * PANEL);
      }
      const int m = thread_id() / PANEL, n = thread_id() % PANEL;
      if (m >= count || p * PANEL + n >= F) return;
      const int other = n + ahead, at = (1 + other / PANEL) * M + m;
      const float gate = sums[m * PANEL + n], up = sums[at * PANEL + other % PANEL];
      const float value = over(gate, 1.0f + power_e(-gate)) * up;
      store<1>(inner + (first + m) * F + p * PANEL + n, &value);
    });
  }
};

template <class T, int BITS>
struct Outer {
  using Panel = Few<T, BITS>;
  static constexpr int THREADS = Panel::THREADS;
  Tiles<ROWS> tiles;
  Weights w;  // w2, of each expert (D, F)
  const T* inner;
  float* parts;  // (tokens, A, D)
  Inputs<T> inputs;

  PTM_BODY void operator()() const {
    const int64_t p = block_id() % w.panels();
    int64_t e, first;
    int count;
    if (!tiles.find(block_id() / w.panels(), e, first, count)) return;
    Panel::begin(w);
    Panel::by_count(count, [&](auto width) {
      constexpr int M = decltype(width)::N;
      const T* row[M];
#pragma unroll
      for (int m = 0; m < M; m++) row[m] = inner + (first + (m < count ? m : 0)) * inputs.count;
      float* sums = shared_memory<float>() + Panel::SHARED;
      Panel::template multiply<M>(w, e * w.panels() + p, row, inputs, sums);
      const int m = thread_id() / PANEL;
      const int64_t n = p * PANEL + thread_id() % PANEL;
      if (m < count && n < w.N) parts[tiles.order[first + m] * w.N + n] = sums[thread_id()];
    });
  }
};

struct Sizes {
  int64_t tokens, A, E, D, F;
};

template <class T, int BITS>
int moe(const Sizes& of, const T* x, const int64_t* ids, const float* weights, const Weights& w1,
        const Weights& w2, T* y, void* stream) {
  const int64_t rows = of.tokens * of.A, most = Tiles<ROWS>::most(rows, of.E);
  DeviceScratch<int64_t> order(rows, stream), starts(of.E + 1, stream);
  DeviceScratch<T> inner(rows * of.F, stream);
  DeviceScratch<float> parts(rows * of.D, stream);
  if (!order.data || !starts.data || !inner.data || !parts.data) return PTM_NO_MEMORY;
  int status = plan(ids, order.data, starts.data, rows, of.E, stream);
  if (status) return status;
  const Tiles<ROWS> tiles{order.data, starts.data, of.E};
  const int64_t shared = int64_t(sizeof(float)) * (Few<T, BITS>::SHARED + 3 * ROWS * PANEL);
  status = launch(
      Inner<T, BITS>{tiles, w1, x, inner.data, of.A, of.F, Inputs<T>(x, of.D)},
      most * divided_up(of.F, PANEL), shared, stream);
  if (status) return status;
  status = launch(
      Outer<T, BITS>{tiles, w2, inner.data, parts.data, Inputs<T>(inner.data, of.F)},
      most * w2.panels(), shared, stream);
  if (status) return status;
  return combine(parts.data, weights, y, of.tokens, of.A, of.D, stream);
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

PTM_EXPORT(wq_moe)(const void* x, const int64_t* ids, const float* weights, const uint8_t* codes1,
                   const void* scale1, const int8_t* zero1, const uint8_t* codes2,
                   const void* scale2, const int8_t* zero2, const float* values, void* y,
                   int64_t tokens, int64_t A, int64_t E, int64_t D, int64_t F, int64_t K1,
                   int64_t K2, int64_t bits, int64_t group1, int64_t group2, int64_t is_half,
                   int64_t is_bf16, void* stream) {
  const Weights w1{codes1, scale1, zero1, values, 2 * F, K1, group1, is_half != 0};
  const Weights w2{codes2, scale2, zero2, values, D, K2, group2, is_half != 0};
  const Sizes of{tokens, A, E, D, F};
  if (!w1.fits() || !w2.fits()) return PTM_BAD_SHAPE;
  if (tokens == 0) return PTM_OK;
  return by_bits(bits, [&](auto width) {
    constexpr int BITS = decltype(width)::N;
    if (is_bf16)
      return moe<bf16, BITS>(of, (const bf16*)x, ids, weights, w1, w2, (bf16*)y, stream);
    return moe<float, BITS>(of, (const float*)x, ids, weights, w1, w2, (float*)y, stream);
  });
}
