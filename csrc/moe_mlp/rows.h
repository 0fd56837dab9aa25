// Rows of memory that products of experts read (csrc/common/tile.h), and what they write.
#pragma once

#include "../common/tile.h"
#include "../moe_plan/tiles.h"

#include <optional>

namespace PTM_NAMESPACE {

struct Shape {
  static constexpr int64_t MOST = 1 << 30;
  int64_t T, A, D, F, E;

  bool fits() const {
    return D % 32 == 0 && F % 32 == 0 && A > 0 && T * A < MOST && D < MOST && F < MOST / 2;
  }
  int64_t rows() const { return T * A; }
};

// One after another
struct Plain {
  const bf16* base;
  int64_t size, count;

  PTM_BODY const bf16* at(int i) const { return i < count ? base + i * size : nullptr; }
  // n of them from place `first` of the plan on
  PTM_BODY Plain of(int64_t first, int64_t n) const {
    Plain some = *this;
    some.base += first * size;
    some.count = n;
    return some;
  }
  // Those of one expert, where each has `count`
  PTM_BODY Plain of_expert(int64_t e) const { return of(e * count, count); }
};

// In the order of the plan, whose numbers have `each` to a row
struct Gathered {
  const bf16* base;
  const int64_t* order;
  int64_t size, count;
  uint32_t each;

  PTM_BODY const bf16* at(int i) const {
    return i < count ? base + int64_t(uint32_t(order[i]) / each) * size : nullptr;
  }
  PTM_BODY Gathered of(int64_t first, int64_t n) const {
    Gathered some = *this;
    some.order += first;
    some.count = n;
    return some;
  }
};

// G and U of an expert, a row of each in turn, so that a thread has both numbers of a feature
struct Paired {
  const bf16* base;
  int64_t size, F;

  PTM_BODY const bf16* at(int i) const {
    return i < 2 * F ? base + ((i & 1) * F + (i >> 1)) * size : nullptr;
  }
  PTM_BODY Paired of_expert(int64_t e) const {
    Paired one = *this;
    one.base += e * 2 * F * size;
    return one;
  }
};

// Which block is it: of all tiles of rows, for one panel of columns after another, so that those
// that read the same weights run together
struct Place {
  Tiles<TILE> tiles;
  int64_t most;
  int64_t e, first;
  int column, count;

  Place(const int64_t* order, const int64_t* starts, const Shape& s)
      : tiles{order, starts, s.E}, most(Tiles<TILE>::most(s.rows(), s.E)), e(0), first(0),
        column(0), count(0) {}
  int64_t blocks(int64_t width) const { return most * divided_up(width, TILE); }
  PTM_BODY bool find() {
    column = int(block_id() / most) * TILE;
    return tiles.find(block_id() % most, e, first, count);
  }
};

struct CopyAll {
  static constexpr int THREADS = 256;
  const bf16* from;
  bf16* to;
  int64_t n;

  PTM_BODY void operator()() const {
    const int64_t i = block_id() * THREADS + thread_id();
    if (i < n) to[i] = from[i];
  }
};

// A tensor at a multiple of 16: itself, or a copy of it where it begins elsewhere.
struct Aligned {
  std::optional<DeviceScratch<bf16>> room;
  const bf16* data;
  int status;

  Aligned(const bf16* from, int64_t n, void* stream) : data(from), status(PTM_OK) {
    if (aligned16(from) || n == 0) return;
    room.emplace(n, stream);
    data = room->data;
    if (data)
      status = launch(CopyAll{from, room->data, n}, divided_up(n, CopyAll::THREADS), 0, stream);
    else
      status = PTM_NO_MEMORY;
  }
};

inline int first_of(int a, int b, int c) { return a ? a : b ? b : c; }

// Two numbers beside one another, at once where addresses allow it
PTM_BODY void put_two(bf16* to, float a, float b, bool is_whole) {
  if (is_whole)
    *(uint32_t*)to = halves(a, b);
  else
    to[0] = to_bf16(a), to[1] = to_bf16(b);
}
PTM_BODY void put_two(float* to, float a, float b, bool is_whole) {
  if (is_whole)
    *(Bytes8*)to = Bytes8{bits_of(a), bits_of(b)};
  else
    to[0] = a, to[1] = b;
}
// Whether pairs that begin at even places from there on may be put at once
template <class T>
bool takes_pairs(const T* to) {
  return uintptr_t(to) % (2 * sizeof(T)) == 0;
}

// Rows that products make, each to the place of its number
struct Spread {
  bf16* to;
  int64_t size;
  bool is_whole;

  Spread(bf16* rows, int64_t length)
      : to(rows), size(length), is_whole(takes_pairs(rows)) {}
  PTM_BODY void operator()(const Place& place, const Sums& sums) const {
    const int left = int(size) - place.column;
    sums.each_row([&](int, int m, auto pairs) {
      if (m >= place.count) return;
      bf16* row = to + place.tiles.order[place.first + m] * size + place.column;
      pairs([&](int n, float a, float b) {
        if (n < left) put_two(row + n, a, b, is_whole);
      });
    });
  }
};

PTM_BODY float sigmoid(float x) { return over(1.0f, 1.0f + power_e(-x)); }

}  // namespace PTM_NAMESPACE
