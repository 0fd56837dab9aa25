// A mixture of SwiGLU experts, forward, as cpu.cpp has it, on tensor cores and without a word to the
// host. A tile is up to 128 rows of one expert, found in the plan:
//
//   Inner    128 rows, gathered, times 64 rows of G and of U -> silu(g) u, and pairs (g, u) to keep
//   Outer    times W2, each row to the place of its number
//   Combine  a token's rows, weighted and added up in the order of its experts
//
// Kept are rows of 2 F in the order of the plan, g and u of a feature beside one another.
#include "rows.h"

namespace PTM_NAMESPACE {

struct Inner {
  static constexpr int THREADS = TILE_THREADS;
  using A = Flat<Gathered>;
  using B = Flat<Paired>;
  Shape s;
  Place at;
  Gathered x;
  Paired w1;
  bf16 *h, *hidden;

  PTM_BODY void operator()() const {
    Place place = at;
    if (!place.find()) return;  // all threads alike
    const int left = int(2 * s.F) - place.column;
    Sums sums;
    multiply(A(x.of(place.first, place.count), 0), B(w1.of_expert(place.e), place.column), int(s.D),
             place.count, left, sums);
    sums.each_row([&](int, int m, auto pairs) {
      if (m >= place.count) return;
      const int64_t row = (place.first + m) * 2 * s.F + place.column;
      pairs([&](int n, float g, float u) {
        if (n >= left) return;
        if (hidden) put_two(hidden + row + n, g, u, true);
        h[(row + n) / 2] = to_bf16(g * sigmoid(g) * u);
      });
    });
  }
};

struct Outer {
  static constexpr int THREADS = TILE_THREADS;
  using A = Flat<Plain>;
  using B = Flat<Plain>;
  Shape s;
  Place at;
  Plain h, w2;
  Spread to;

  PTM_BODY void operator()() const {
    Place place = at;
    if (!place.find()) return;
    Sums sums;
    multiply(A(h.of(place.first, place.count), 0), B(w2.of_expert(place.e), place.column), int(s.F),
             place.count, int(s.D) - place.column, sums);
    to(place, sums);
  }
};

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

PTM_EXPORT(moe_mlp)
(const bf16* x, const float* weights, const bf16* w1, const bf16* w2, const int64_t* order,
 const int64_t* starts, bf16* rows, bf16* y, bf16* hidden, int64_t T, int64_t A, int64_t D,
 int64_t F, int64_t E, void* stream) {
  const Shape s{T, A, D, F, E};
  if (!s.fits() || !aligned16(hidden)) return PTM_BAD_SHAPE;
  if (T == 0) return PTM_OK;
  DeviceScratch<bf16> h(s.rows() * F, stream);
  if (!h.data) return PTM_NO_MEMORY;
  const Aligned all_x(x, T * D, stream), all_w1(w1, E * 2 * F * D, stream);
  const Aligned all_w2(w2, E * D * F, stream);
  int status = first_of(all_x.status, all_w1.status, all_w2.status);
  if (status) return status;
  const Place place(order, starts, s);
  const Gathered rows_of_x{all_x.data, order, D, 0, uint32_t(A)};
  const Inner inner{s, place, rows_of_x, Paired{all_w1.data, D, F}, h.data, hidden};
  status = launch(inner, place.blocks(2 * F), tile_bytes<Inner::A, Inner::B>(), stream);
  if (status) return status;
  const Outer outer{s, place, Plain{h.data, F, 0}, Plain{all_w2.data, F, D}, Spread(rows ? rows : y, D)};
  status = launch(outer, place.blocks(D), tile_bytes<Outer::A, Outer::B>(), stream);
  if (status || !rows) return status;
  return combine((const bf16*)rows, weights, y, T, A, D, stream);
}
