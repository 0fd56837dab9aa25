// Rows beside their neighbours, and weights with two taps, as operands of products.
//
// A row and the one before it are one run of memory: [x_(t-1) ; x_t] begins a row earlier, has
// twice its width, and the next such pair a row later. So pairs of rows are used as they lie; a
// block of 32 is copied only where one of its rows has no neighbour.
#pragma once

#include "../common/product.h"
#include "../common/room.h"
#include "../common/row32.h"

#include <atomic>

namespace PTM_NAMESPACE {

constexpr int64_t kBlock = 32;        // rows of a product
constexpr int64_t kCache = 1 << 18;   // bytes of panels that stay in the cache while rows pass

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows in sequences of L: follows[t] says whether row t continues row t - 1; row T continues none.
struct Rows {
  int64_t T;
  const uint8_t* follows;
};

inline void find_neighbours(const uint8_t* connected, int64_t T, int64_t L, uint8_t* follows) {
  for (int64_t t = 0; t < T; t++) follows[t] = t % L != 0 && (!connected || connected[t]);
  follows[T] = 0;
}

enum Side { kBefore, kAfter };

// [x_(t-1) ; x_t], or [x_t ; x_(t+1)], with zeros for a neighbour that there is not
struct Pairs {
  Rows rows;
  const bf16* x;
  int64_t width;
  Side side;

  // 32 of them; `copy` has room for as many
  RowsA block(int64_t t, bf16* copy) const {
    const uint8_t* joined = rows.follows + t + (side == kAfter);
    const int64_t count = least(kBlock, rows.T - t);
    int64_t found = 0;
    for (int64_t r = 0; r < count; r++) found += joined[r];
    if (found == kBlock) return rows_of(x + (t - (side == kBefore)) * width, width);
    memset((void*)copy, 0, sizeof(bf16) * 2 * kBlock * width);
    for (int64_t r = 0; r < count; r++) {
      bf16 *first = copy + 2 * r * width, *second = first + width;
      const bf16* own = x + (t + r) * width;
      memcpy((void*)(side == kBefore ? second : first), own, sizeof(bf16) * width);
      if (joined[r] && side == kBefore) memcpy((void*)first, own - width, sizeof(bf16) * width);
      if (joined[r] && side == kAfter) memcpy((void*)second, own + width, sizeof(bf16) * width);
    }
    return rows_of(copy, 2 * width);
  }
};

// Rows [begin, end) of pairs times panels; done(t, column, c0, c1) uses 32 columns of a row, in order.
template <class Done>
inline bool rows_times(const Pairs& a, int64_t begin, int64_t end, const uint32_t* panels,
                       int64_t columns, Done done) {
  const int64_t k = 2 * a.width, group = most(32, kCache / (2 * k) / 32 * 32);
  Room& mine = room();
  const int64_t blocks = 2 * least(group, columns) / 32;
  if (!mine.reset(Room::bytes<bf16>(kBlock * k) + blocks * int64_t(sizeof(Block)))) return false;
  bf16* copy = mine.take<bf16>(kBlock * k);
  Block* sums = mine.take<Block>(blocks);
  for (int64_t first = 0; first < columns; first += group)
    sweep(
        (end - begin + kBlock - 1) / kBlock,
        [&](int64_t i) { return a.block(begin + kBlock * i, copy); }, false,
        panels + first / kTile * panel(k), k, least(group, columns - first) / 32, sums,
        [&](int64_t i, int64_t p, const Block& c, int piece) {
          constexpr int64_t kRows = kBlock / kPieces;
          const int64_t t = begin + kBlock * i;
          for (int64_t r = kRows * piece; r < kRows * (piece + 1) && t + r < end; r++)
            done(t + r, first + 32 * p, c.c[r >> 4][0][r & 15], c.c[r >> 4][1][r & 15]);
        });
  return true;
}

// The weight of a convolution, (outputs, inputs, 2)
struct Weight {
  const bf16* data;
  int64_t outputs, inputs;

  int64_t dwords() const { return outputs * inputs; }

  // One output: [tap 0 ; tap 1]
  void part(int64_t output, bf16* __restrict to) const {
    const bf16* __restrict row = data + 2 * output * inputs;
    for (int64_t i = 0; i < inputs; i++) {
      to[i] = row[2 * i];
      to[inputs + i] = row[2 * i + 1];
    }
  }

  // Panels that take [x_(t-1) ; x_t] to outputs
  bool forward(uint32_t* to, int64_t threads) const {
    const int64_t k = 2 * inputs;
    return each(outputs, kTile, threads, [&](int64_t first, bf16* taps) {
      const bf16* rows[kTile];
      for (int64_t i = 0; i < kTile; i++) rows[i] = taps + i * k;
      columns_of(rows, k, to + first / kTile * panel(k));
    });
  }

  // Panels that take gradients [y_t ; y_(t+1)] of outputs back to inputs
  bool backward(uint32_t* to, int64_t threads) const {
    const int64_t k = 2 * outputs;
    return each(outputs, kBlock, threads, [&](int64_t first, bf16* taps) {
      for (int64_t i = 0; i < kBlock; i += 2) {
        const bf16 *even = taps + 2 * i * inputs, *odd = even + 2 * inputs;
        uint32_t* pair = to + panel(first + i);
        pair_rows(even + inputs, odd + inputs, inputs, pair, panel(k));
        pair_rows(even, odd, inputs, pair + panel(outputs), panel(k));
      }
    });
  }

 private:
  // f(first, taps) with the taps of `count` outputs at a time
  template <class F>
  bool each(int64_t n, int64_t count, int64_t threads, F f) const {
    std::atomic<bool> fits{true};
    parallel_for(n, count, threads, [&](int64_t begin, int64_t end) {
      Room& mine = room();
      if (!mine.reset(Room::bytes<bf16>(2 * count * inputs))) {
        fits = false;
        return;
      }
      bf16* taps = mine.take<bf16>(2 * count * inputs);
      for (int64_t i = begin; i < end; i++) part(i, taps + 2 * (i - begin) * inputs);
      f(begin, taps);
    });
    return fits;
  }
};

}  // namespace PTM_NAMESPACE
