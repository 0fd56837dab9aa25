// Gradients of a convolution's weight and bias, from rows of its input and of its output's gradient.
#pragma once

#include "taps.h"

namespace PTM_NAMESPACE {

constexpr int64_t kOutputs = 256, kInputs = 256;  // of a part: its sums and a chunk's panels stay near

// dW[o][i][tap] = sum over t of dy_t[o] x_(t + tap - 1)[i]. Rows of dy beyond the last, up to a
// multiple of 32, are zeros. x of 512 rows are the panels, a pair of them the two taps of 16 inputs,
// dy turned the rows: both taps of an input come out beside one another, as they lie in W.
struct WeightGradient {
  Rows rows;
  const bf16 *dy, *x;
  int64_t outputs, inputs;
  void* to;
  Into into;

  int64_t down() const { return (outputs + kOutputs - 1) / kOutputs; }
  int64_t parts() const { return down() * ((inputs + kInputs - 1) / kInputs); }

  bool run(int64_t part) const {
    const int64_t o0 = part % down() * kOutputs, i0 = part / down() * kInputs;
    const int64_t high = least(kOutputs, outputs - o0), wide = least(kInputs, inputs - i0);
    const int64_t pairs = wide / kTile, deep = least(kDeep, up(rows.T, kStep));
    const int64_t blocks = high / kBlock * pairs;
    Room& mine = room();
    if (!mine.reset(Room::bytes<uint32_t>(2 * pairs * panel(deep)) + Room::bytes<bf16>(kBlock * deep) +
                    blocks * int64_t(sizeof(Block))))
      return false;
    uint32_t* panels = mine.take<uint32_t>(2 * pairs * panel(deep));
    bf16* block = mine.take<bf16>(kBlock * deep);
    Block* sums = mine.take<Block>(blocks);
    Left left;
    int64_t t = 0;
    do {  // once at least: without rows the gradient is zeros
      const int64_t n = least(kDeep, up(rows.T - t, kStep));
      as_depth(t, n, i0, wide, panels);
      Block* sum = sums;
      for (int64_t o = o0; o < o0 + high; o += kBlock) {
        turned(dy + t * outputs + o, outputs, n, block);
        left.take(rows_turned(block, n), n);
        for (int64_t p = 0; p < pairs; p++, sum++)
          product(left, panels + 2 * p * panel(n), panels + (2 * p + 1) * panel(n), n, t > 0, *sum,
                  {nullptr, nullptr, 0}, [] {});
      }
      t += n;
    } while (t < rows.T);
    const Block* sum = sums;
    for (int64_t o = o0; o < o0 + high; o += kBlock)
      for (int64_t i = i0; i < i0 + wide; i += kTile, sum++)
        for (int64_t r = 0; r < kBlock; r++) {
          const float *first = sum->c[r >> 4][0][r & 15], *second = sum->c[r >> 4][1][r & 15];
          alignas(64) float both[32];
          for (int j = 0; j < 16; j++) {
            both[2 * j] = first[j];
            both[2 * j + 1] = second[j];
          }
          put_sums(into, to, 2 * ((o + r) * inputs + i), both, both + 16);
        }
    return true;
  }

  // Rows [t, t + n) of x as the depth of panels, by turns of tap 0 and of tap 1
  void as_depth(int64_t t, int64_t n, int64_t i0, int64_t wide, uint32_t* to) const {
    auto row = [&](int64_t at, int tap) {
      const bool is_there = at < rows.T && (tap || rows.follows[at]);
      return is_there ? x + (at + tap - 1) * inputs + i0 : nullptr;
    };
    for (int64_t j = 0; j < n; j += 2)
      for (int tap = 0; tap < 2; tap++)
        for (int64_t i = 0; i < wide; i += kBlock) {
          const bf16 *even = row(t + j, tap), *odd = row(t + j + 1, tap);
          pair_rows(even ? even + i : nullptr, odd ? odd + i : nullptr, kBlock,
                    to + (2 * (i / kTile) + tap) * panel(n) + j / 2 * kTile, 2 * panel(n));
        }
  }
};

// The sum of all rows, which is the gradient of a bias
inline void sum_rows(const bf16* rows, int64_t T, int64_t width, float* to, int64_t threads) {
  constexpr int64_t kColumns = 32;
  parallel_for(width, kColumns, threads, [&](int64_t begin, int64_t) {
    vf sums[kColumns / W] = {};
    for (int64_t t = 0; t < T; t++)
      for (int64_t v = 0; v < kColumns / W; v++) sums[v] += load(rows + t * width + begin + v * W);
    for (int64_t v = 0; v < kColumns / W; v++) store(to + begin + v * W, sums[v]);
  });
}

}  // namespace PTM_NAMESPACE
