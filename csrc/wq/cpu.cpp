// isa: portable avx2 avx512_bf16 amx
// Products with quantized weights: a linear, and SwiGLU experts over routed rows.
//
//   wq_linear   y[m, n] = sum_k x[m, k] w[n, k]
//   wq_moe      y[t] = sum over a of weight[t, a] * (silu(x1) * x2) w2[e]^T,  (x1, x2) = x[t] w1[e]^T,
//               e = ids[t, a]
//
// Sums are fp32 and rounded once, to the rows' type; between the two linears of an expert, too, as
// the second wants bf16. packed.h has the layout, linear.h the ways.
#include "linear.h"

#include <initializer_list>

namespace PTM_NAMESPACE {

constexpr int64_t ROWS_AT_ONCE = 512;  // of an expert: bounds what its inner rows take

PTM_INLINE void put(float* to, float x) { *to = x; }
PTM_INLINE void put(bf16* to, float x) { *to = to_bf16(x); }

// Up to 32 sums of a row
template <class T>
PTM_INLINE void put_sums(T* to, const float* sums, int64_t count) {
  int64_t n = 0;
  for (; n + PANEL <= count; n += PANEL)
    for (int64_t i = n; i < n + PANEL; i += W) store(to + i, load(sums + i));
  for (; n < count; n++) put(to + n, sums[n]);
}

template <class T>
int whole_linear(const T* x, const Packed& w, T* y, int64_t M, int64_t inputs, int64_t threads) {
  return linear(x, inputs, M, w, threads,
                [=, N = w.N](int64_t m, int64_t n, const float* sums, int64_t count) {
                  put_sums(y + m * N + n, sums, count);
                });
}

// The rows of one expert: gather, first linear, SwiGLU, second linear, add into fp32 sums.
template <class T>
int expert(const T* x, const int64_t* routes, int64_t R, int64_t A, const float* weights,
           const Packed& w1, const Packed& w2, float* sums, int64_t threads) {
  int64_t D = w2.N, F = w1.N / 2;
  Scratch<T> rows(R * D), inner(R * F);
  Scratch<float> both(R * 2 * F);
  if (!rows.data || !inner.data || !both.data) return PTM_NO_MEMORY;
  for (int64_t r = 0; r < R; r++)
    memcpy(rows.data + r * D, x + routes[r] / A * D, sizeof(T) * size_t(D));
  float* wide = both.data;
  int status = linear(rows.data, D, R, w1, threads,
                      [=](int64_t m, int64_t n, const float* values, int64_t count) {
                        memcpy(wide + m * 2 * F + n, values, sizeof(float) * size_t(count));
                      });
  if (status) return status;
  parallel_for(R, 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float *gate = wide + r * 2 * F, *up = gate + F;
      for_lanes(F, [&](int64_t i, auto lanes) {
        vf g = load(gate + i, lanes);
        store(inner.data + r * F + i, g / (1.0f + vexp(-g)) * load(up + i, lanes), lanes);
      });
    }
  });
  return linear(inner.data, F, R, w2, threads,
                [=](int64_t m, int64_t n, const float* values, int64_t count) {
                  float* to = sums + routes[m] / A * D + n;
                  for (int64_t i = 0; i < count; i++) to[i] += weights[routes[m]] * values[i];
                });
}

template <class T>
int moe(const T* x, const int64_t* ids, const float* weights, Packed w1, Packed w2, T* y, int64_t Tk,
        int64_t A, int64_t E, int64_t threads) {
  int64_t D = w2.N;
  Scratch<float> sums(Tk * D);
  Scratch<int64_t> order(Tk * A), begins(E + 1);
  if (!sums.data || !order.data || !begins.data) return PTM_NO_MEMORY;
  memset(sums.data, 0, sizeof(float) * size_t(Tk * D));
  memset(begins.data, 0, sizeof(int64_t) * size_t(E + 1));
  for (int64_t i = 0; i < Tk * A; i++) {
    if (ids[i] < 0 || ids[i] >= E) return PTM_BAD_SHAPE;
    begins.data[ids[i] + 1]++;
  }
  for (int64_t e = 0; e < E; e++) begins.data[e + 1] += begins.data[e];
  for (int64_t i = 0; i < Tk * A; i++) order.data[begins.data[ids[i]]++] = i;
  // begins[e] is now the end of e
  for (int64_t e = 0, r = 0; e < E; e++) {
    for (int64_t end = begins.data[e]; r < end;) {
      int64_t R = end - r < ROWS_AT_ONCE ? end - r : ROWS_AT_ONCE;
      int status = expert(x, order.data + r, R, A, weights, w1, w2, sums.data, threads);
      if (status) return status;
      r += R;
    }
    for (Packed* w : {&w1, &w2}) {
      w->codes += w->panels() * w->panel_bytes();
      w->scale = (const uint8_t*)w->scale + w->scale_bytes();
      if (w->zero) w->zero += w->panels() * w->groups() * PANEL;
    }
  }
  parallel_for(Tk, 16, threads, [&](int64_t begin, int64_t end) {
    for_lanes((end - begin) * D, [&](int64_t i, auto lanes) {
      store(y + begin * D + i, load(sums.data + begin * D + i, lanes), lanes);
    });
  });
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// x (M, inputs), y (M, N): bf16 if is_bf16, else fp32; the weights as in packed.h.
PTM_EXPORT(wq_linear)(const void* x, const uint8_t* codes, const void* scale, const int8_t* zero,
                      const float* values, void* y, int64_t M, int64_t inputs, int64_t N, int64_t K,
                      int64_t bits, int64_t group, int64_t is_half, int64_t is_bf16,
                      int64_t threads) {
  Packed w{codes, scale, zero, values, bits, is_half, N, K, group};
  if (is_bf16) return whole_linear((const bf16*)x, w, (bf16*)y, M, inputs, threads);
  return whole_linear((const float*)x, w, (float*)y, M, inputs, threads);
}

// x, y (T, D); ids int64, weights fp32 (T, A); w1 E times (2 F, D), w2 E times (D, F).
PTM_EXPORT(wq_moe)(const void* x, const int64_t* ids, const float* weights, const uint8_t* codes1,
                   const void* scale1, const int8_t* zero1, const uint8_t* codes2,
                   const void* scale2, const int8_t* zero2, const float* values, void* y,
                   int64_t tokens, int64_t A, int64_t E, int64_t D, int64_t F, int64_t K1,
                   int64_t K2, int64_t bits, int64_t group1, int64_t group2, int64_t is_half,
                   int64_t is_bf16, int64_t threads) {
  Packed w1{codes1, scale1, zero1, values, bits, is_half, 2 * F, K1, group1};
  Packed w2{codes2, scale2, zero2, values, bits, is_half, D, K2, group2};
  if (is_bf16)
    return moe((const bf16*)x, ids, weights, w1, w2, (bf16*)y, tokens, A, E, threads);
  return moe((const float*)x, ids, weights, w1, w2, (float*)y, tokens, A, E, threads);
}
