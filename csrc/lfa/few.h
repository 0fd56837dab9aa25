// Few rows, as in decoding: each row of a weight is read once, as it lies, and met by all pairs.
#pragma once

#include "taps.h"

namespace PTM_NAMESPACE {

constexpr int64_t kFew = 16;  // rows at most: panels take as long at 16 rows of 256, 32 of 2048
constexpr int kMet = 4;       // rows that meet a weight in registers

// Rows t as dwords (x_(t-1), x_t), the order in which a weight has its taps
inline void zip_pairs(const Rows& rows, const bf16* x, int64_t width, uint32_t* to) {
  for (int64_t t = 0; t < rows.T; t++, x += width, to += width)
    for (int64_t i = 0; i < width; i++)
      to[i] = uint32_t(x[i].bits) << 16 | (rows.follows[t] ? x[i - width].bits : 0);
}

template <int R>
PTM_INLINE void dot(const bf16* weight, const uint32_t* pairs, int64_t n, float* to) {
  vf sums[R] = {};
  for (int64_t i = 0; i < n; i += W) {
    vu taps;
    memcpy(&taps, weight + 2 * i, sizeof taps);
    for (int r = 0; r < R; r++) {
      vu both;
      memcpy(&both, pairs + r * n + i, sizeof both);
#if PTM_ISA_BF16
      sums[r] = (vf)_mm512_dpbf16_ps((__m512)sums[r], (__m512bh)taps, (__m512bh)both);
#else
      sums[r] += (vf)(taps << 16) * (vf)(both << 16);
      sums[r] += (vf)(taps & 0xffff0000u) * (vf)(both & 0xffff0000u);
#endif
    }
  }
  for (int r = 0; r < R; r++) to[r] = sum(sums[r]);
}

// done(t, output, sum) for all rows and outputs
template <class Done>
inline void few_times(const uint32_t* pairs, int64_t T, const Weight& w, int64_t threads, Done done) {
  parallel_for(w.outputs, 32, threads, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++)
      for (int64_t t = 0; t < T; t += kMet) {
        const bf16* weight = w.data + 2 * o * w.inputs;
        const uint32_t* from = pairs + t * w.inputs;
        const int64_t count = least(kMet, T - t);
        float found[kMet];
        switch (count) {
          case 1: dot<1>(weight, from, w.inputs, found); break;
          case 2: dot<2>(weight, from, w.inputs, found); break;
          case 3: dot<3>(weight, from, w.inputs, found); break;
          default: dot<4>(weight, from, w.inputs, found);
        }
        for (int64_t r = 0; r < count; r++) done(t + r, o, found[r]);
      }
  });
}

}  // namespace PTM_NAMESPACE
