// y[m, n] = sum_k x[m, k] w[n, k] for a few rows m, from weights packed as packed.h has them: a block
// of threads for a panel of 16 outputs and four rows.
#include "few.h"

namespace PTM_NAMESPACE {

template <class T, int BITS>
struct Linear {
  using Panel = Few<T, BITS>;
  static constexpr int THREADS = Panel::THREADS;
  Weights w;
  const T* x;
  T* y;
  int64_t rows;
  Inputs<T> inputs;

  PTM_BODY void operator()() const {
    const int64_t m0 = block_id() / w.panels() * ROWS, p = block_id() % w.panels();
    Panel::begin(w);
    Panel::by_count(int(rows - m0 < ROWS ? rows - m0 : ROWS), [&](auto width) {
      constexpr int M = decltype(width)::N;
      const T* row[M];
#pragma unroll
      for (int m = 0; m < M; m++) row[m] = x + (m0 + m < rows ? m0 + m : m0) * inputs.count;
      float* sums = shared_memory<float>() + Panel::SHARED;
      Panel::template multiply<M>(w, p, row, inputs, sums);
      const int64_t m = m0 + thread_id() / PANEL, n = p * PANEL + thread_id() % PANEL;
      if (thread_id() < M * PANEL && m < rows && n < w.N)
        store<1>(y + m * w.N + n, sums + thread_id());
    });
  }
};

template <class T>
int linear(const Weights& w, const T* x, T* y, int64_t M, int64_t inputs, int64_t bits,
           void* stream) {
  if (!w.fits()) return PTM_BAD_SHAPE;
  return by_bits(bits, [&](auto width) {
    using Body = Linear<T, decltype(width)::N>;
    const int64_t shared = int64_t(sizeof(float)) * (Body::Panel::SHARED + ROWS * PANEL);
    return launch(Body{w, x, y, M, Inputs<T>(x, inputs)}, divided_up(M, ROWS) * w.panels(), shared,
                  stream);
  });
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

PTM_EXPORT(wq_linear)(const void* x, const uint8_t* codes, const void* scale, const int8_t* zero,
                      const float* values, void* y, int64_t M, int64_t inputs, int64_t N, int64_t K,
                      int64_t bits, int64_t group, int64_t is_half, int64_t is_bf16, void* stream) {
  const Weights w{codes, scale, zero, values, N, K, group, is_half != 0};
  if (is_bf16) return linear(w, (const bf16*)x, (bf16*)y, M, inputs, bits, stream);
  return linear(w, (const float*)x, (float*)y, M, inputs, bits, stream);
}
