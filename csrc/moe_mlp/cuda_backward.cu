// A mixture of SwiGLU experts, backward, as cpu.cpp has it, on tensor cores and without a word to
// the host:
//
//   ByHidden   dy rows, gathered, times W2 -> dh; with kept (g, u): rows (dg, du) and w h, and
//              <dh, h> of 32 features at a time
//   ByWeight   (dg, du)^T x = dW1,  dy^T (w h) = dW2, all rows of an expert in one sum
//   ByRows     (dg, du) W1 -> rows of dx, each to the place of its number
//   Combine    a token's rows added up;   Total  parts of <dh, h> added up
//
// Sums over blocks are of parts in memory, in order. Rows of dx come last: they may lie over dy.
#include "rows.h"

namespace PTM_NAMESPACE {

enum Into : int64_t { ROUNDED, EXACT, ADDED };  // as in csrc/common/row32.h

struct ByHidden {
  static constexpr int THREADS = TILE_THREADS;
  using A = Flat<Gathered>;
  using B = Turned<Plain>;
  Shape s;
  Place at;
  Gathered grad;
  Plain w2;
  const float* weights;
  const bf16* hidden;
  bf16 *by_hidden, *h;
  float* parts;  // (rows, F / 32)

  PTM_BODY void operator()() const {
    Place place = at;
    if (!place.find()) return;  // all threads alike
    Sums sums;
    const int left = int(s.F) - place.column;
    multiply(A(grad.of(place.first, place.count), 0),
             B(w2.of_expert(place.e), place.column, int(s.F)), int(s.D), place.count, left, sums);
    float of_row[8] = {};
    sums.each_row([&](int i, int m, auto pairs) {
      if (m >= place.count) return;
      const int64_t row = place.first + m, f0 = row * s.F + place.column;
      const float w = weights ? weights[place.tiles.order[row]] : 1.0f;
      bf16* by_gate = by_hidden + row * 2 * s.F + place.column;
      pairs([&](int n, float one, float other) {
        if (n >= left) return;
        const Bytes8 kept = *(const Bytes8*)(hidden + (f0 + n) * 2);
        const float g[2] = {low_half(kept.x), low_half(kept.y)};
        const float u[2] = {high_half(kept.x), high_half(kept.y)}, d[2] = {one, other};
        float by_g[2], by_u[2], wh[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float sig = sigmoid(g[j]), a = g[j] * sig;
          of_row[i] += d[j] * a * u[j];
          by_g[j] = d[j] * w * u[j] * (sig + a - a * sig);
          by_u[j] = d[j] * w * a;
          wh[j] = w * a * u[j];
        }
        put_two(by_gate + n, by_g[0], by_g[1], true);
        put_two(by_gate + s.F + n, by_u[0], by_u[1], true);
        put_two(h + f0 + n, wh[0], wh[1], true);
      });
    });
    if (!parts || Sums::column() >= left) return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float all = part_sum<3>(of_row[i]);
      const int m = Sums::row_of(i);
      if (lane() % 4 == 0 && m < place.count)
        parts[((place.first + m) * s.F + place.column + Sums::column()) / 32] = all;
    }
  }
};

struct ByRows {
  static constexpr int THREADS = TILE_THREADS;
  using A = Flat<Plain>;
  using B = Turned<Plain>;
  Shape s;
  Place at;
  Plain by_hidden, w1;
  Spread to;

  PTM_BODY void operator()() const {
    Place place = at;
    if (!place.find()) return;
    Sums sums;
    multiply(A(by_hidden.of(place.first, place.count), 0),
             B(w1.of_expert(place.e), place.column, int(s.D)), int(2 * s.F), place.count,
             int(s.D) - place.column, sums);
    to(place, sums);
  }
};

// (E, M, N): left^T right over an expert's rows; zeros without any
template <class Left, class Right>
struct ByWeight {
  static constexpr int THREADS = TILE_THREADS;
  using A = Turned<Left>;
  using B = Turned<Right>;
  const int64_t* starts;
  Left left;
  Right right;
  void* to;
  int64_t M, N, into;
  bool is_whole;

  int64_t blocks(int64_t E) const { return E * divided_up(M, TILE) * divided_up(N, TILE); }
  PTM_BODY void operator()() const {
    const int64_t wide = (N + TILE - 1) / TILE, of_expert = (M + TILE - 1) / TILE * wide;
    const int64_t e = block_id() / of_expert, rest = block_id() % of_expert;
    const int m0 = int(rest / wide) * TILE, n0 = int(rest % wide) * TILE;
    const int64_t first = starts[e];
    const int count = int(starts[e + 1] - first), height = int(M) - m0, width = int(N) - n0;
    if (count == 0 && into == ADDED) return;
    Sums sums;
    multiply(A(left.of(first, count), m0, int(M)), B(right.of(first, count), n0, int(N)), count,
             height, width, sums);
    sums.each_row([&](int, int m, auto pairs) {
      if (m >= height) return;
      const int64_t at = (e * M + m0 + m) * N + n0;
      pairs([&](int n, float a, float b) {
        if (n >= width) return;
        if (into == ROUNDED) return put_two((bf16*)to + at + n, a, b, is_whole);
        float* room = (float*)to + at + n;
        if (into == ADDED) a += room[0], b += room[1];
        put_two(room, a, b, is_whole);
      });
    });
  }
};

template <class Left, class Right>
int by_weight(const int64_t* starts, const Left& left, const Right& right, void* to,
              const Shape& s, int64_t M, int64_t N, int64_t into, void* stream) {
  using Body = ByWeight<Left, Right>;
  const bool is_whole = into == ROUNDED ? takes_pairs((bf16*)to) : takes_pairs((float*)to);
  const Body body{starts, left, right, to, M, N, into, is_whole};
  return launch(body, body.blocks(s.E), tile_bytes<typename Body::A, typename Body::B>(), stream);
}

// The gradient of a router's weight: a warp adds up the parts of a row.
struct Total {
  static constexpr int THREADS = 256, WARPS = THREADS / 32;
  const float* parts;
  const int64_t *order, *starts;
  float* to;
  int64_t E, each;

  PTM_BODY void operator()() const {
    const int64_t row = block_id() * WARPS + warp_id();
    if (row >= starts[E]) return;
    float total = 0;
    for (int64_t i = lane(); i < each; i += 32) total += parts[row * each + i];
    total = warp_sum(total);
    if (lane() == 0) to[order[row]] = total;
  }
};

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

PTM_EXPORT(moe_mlp_backward)
(const bf16* grad, const bf16* x, const float* weights, const bf16* w1, const bf16* w2,
 const int64_t* order, const int64_t* starts, const bf16* hidden, bf16* rows, bf16* by_x,
 float* by_weights, void* by_w1, void* by_w2, int64_t into, int64_t T, int64_t A, int64_t D,
 int64_t F, int64_t E, int64_t grad_A, void* stream) {
  const Shape s{T, A, D, F, E};
  if (!s.fits() || grad_A < 1 || into < ROUNDED || into > ADDED || !aligned16(hidden))
    return PTM_BAD_SHAPE;
  const int64_t n = s.rows();
  DeviceScratch<bf16> by_hidden(n * 2 * F, stream), h(n * F, stream);
  DeviceScratch<float> parts(by_weights ? n * F / 32 : 0, stream);
  if (!by_hidden.data || !h.data || !parts.data) return PTM_NO_MEMORY;
  const Aligned all_dy(grad, n / grad_A * D, stream), all_x(x, T * D, stream);
  const Aligned all_w1(w1, E * 2 * F * D, stream), all_w2(w2, E * D * F, stream);
  int status = first_of(all_dy.status, all_x.status, first_of(all_w1.status, all_w2.status, 0));
  const Place place(order, starts, s);
  const Gathered dy{all_dy.data, order, D, 0, uint32_t(grad_A)};
  const Gathered rows_of_x{all_x.data, order, D, 0, uint32_t(A)};
  const Plain dgu{by_hidden.data, 2 * F, 0}, wh{h.data, F, 0};
  if (n && !status) {
    const Plain rows_of_w2{all_w2.data, F, D};
    const ByHidden body{s, place, dy, rows_of_w2, weights, hidden, by_hidden.data, h.data,
                        by_weights ? parts.data : nullptr};
    status = launch(body, place.blocks(F), tile_bytes<ByHidden::A, ByHidden::B>(), stream);
  }
  if (by_weights && !status) {
    const Total total{parts.data, order, starts, by_weights, E, F / 32};
    status = launch(total, divided_up(n, Total::WARPS), 0, stream);
  }
  if (by_w1 && !status)
    status = by_weight(starts, dgu, rows_of_x, by_w1, s, 2 * F, D, into, stream);
  if (by_w2 && !status) status = by_weight(starts, dy, wh, by_w2, s, D, F, into, stream);
  if (n == 0 || status) return status;
  const ByRows to_rows{s, place, dgu, Plain{all_w1.data, D, 2 * F}, Spread(rows ? rows : by_x, D)};
  status = launch(to_rows, place.blocks(D), tile_bytes<ByRows::A, ByRows::B>(), stream);
  if (status || !rows) return status;
  return combine((const bf16*)rows, (const float*)nullptr, by_x, T, A, D, stream);
}
