// Residual add and RMSNorm of rows, and its backward, in one visit of memory each.
//
//   s = x + residual (rounded to T)    y = round(s * rstd) * weight    rstd = (mean(s^2) + eps)^-1/2
//   ds = rstd (g w - u mean(g w u)) + dsum,   u = s rstd,   dweight = sum over rows of g u
//
// The order of roundings is the published model's (ptm/kernels/rmsnorm.py).
#pragma once

#include "vec.h"

namespace PTM_NAMESPACE {

constexpr int64_t kNormGrain = 32;  // rows of a part of the forward
constexpr int64_t kNormParts = 64;  // of the backward; each keeps a row of fp32 sums

template <class T>
void norm_row(const T* x, const T* residual, const float* weight, T* y, T* s, float* rstd, int64_t D,
              float eps) {
  vf squares = {};
  if (residual) {
    for_lanes(D, [&](int64_t i, auto lanes) {
      vf both = as_stored(x, load(x + i, lanes) + load(residual + i, lanes));
      store(s + i, both, lanes);
      squares += both * both;
    });
    x = s;
  } else {
    for_lanes(D, [&](int64_t i, auto lanes) {
      vf one = load(x + i, lanes);
      squares += one * one;
    });
  }
  float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(D) + eps);
  *rstd = scale;
  for_lanes(D, [&](int64_t i, auto lanes) {
    store(y + i, as_stored(x, load(x + i, lanes) * scale) * load(weight + i, lanes), lanes);
  });
}

template <class T>
void norm_backward_row(const T* g, const T* s, const float* weight, const T* dsum, T* ds,
                       float* dweight, float rstd, int64_t D) {
  vf along = {};
  for_lanes(D, [&](int64_t i, auto lanes) {
    vf by_weight = load(g + i, lanes) * (load(s + i, lanes) * rstd);
    store(dweight + i, load(dweight + i, lanes) + by_weight, lanes);
    along += by_weight * load(weight + i, lanes);
  });
  float mean = sum(along) / float(D);
  for_lanes(D, [&](int64_t i, auto lanes) {
    vf unit = load(s + i, lanes) * rstd;
    vf d = (load(g + i, lanes) * load(weight + i, lanes) - unit * mean) * rstd;
    if (dsum) d += load(dsum + i, lanes);
    store(ds + i, d, lanes);
  });
}

template <class T>
int norm_rows(const T* x, const T* residual, const float* weight, T* y, T* s, float* rstd,
              int64_t rows, int64_t D, double eps, int64_t threads) {
  parallel_for(rows, kNormGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      norm_row(x + r * D, residual ? residual + r * D : nullptr, weight, y + r * D,
               residual ? s + r * D : nullptr, rstd + r, D, float(eps));
  });
  return PTM_OK;
}

template <class T>
int norm_backward(const T* g, const T* s, const float* weight, const float* rstd, const T* dsum,
                  T* ds, float* dweight, int64_t rows, int64_t D, int64_t threads) {
  int64_t grain = (rows + kNormParts - 1) / kNormParts;
  if (grain < kNormGrain) grain = kNormGrain;
  int64_t parts = (rows + grain - 1) / grain;
  Scratch<float> sums(parts * D);
  if (!sums.data) return PTM_NO_MEMORY;
  parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
    float* mine = sums.data + begin / grain * D;
    memset(mine, 0, sizeof(float) * size_t(D));
    for (int64_t r = begin; r < end; r++)
      norm_backward_row(g + r * D, s + r * D, weight, dsum ? dsum + r * D : nullptr, ds + r * D,
                        mine, rstd[r], D);
  });
  memset(dweight, 0, sizeof(float) * size_t(D));
  for (int64_t p = 0; p < parts; p++)
    for (int64_t i = 0; i < D; i++) dweight[i] += sums.data[p * D + i];
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE
