// isa: amx
// Cross entropy of a linear head without the logits of all tokens: they are made for BLOCK words at
// a time, in tiles whose rows are words and whose lanes are tokens, so that a softmax sums down
// rows and never across lanes.
//
//   forward    z = W x^T; lse and the label's z by a running maximum and sum   1 product
//   backward   P = (exp(z - lse) - onehot) g, a block at a time:               3 products
//                dW = P x, whole at once; dx^T += W^T P in fp32
//
// The backward makes z again: what is kept between is lse, 4 bytes a token. Scratch memory: x twice,
// dx in fp32, and BLOCK x (tokens + 2 D) bf16 twice.
#include "tiles.h"

#include <math.h>

namespace PTM_NAMESPACE {

constexpr int64_t BLOCK = 1024;

inline int64_t up32(int64_t n) { return (n + 31) / 32 * 32; }

struct Head {
  Rows x, w;
  const int64_t* labels;
  int64_t tokens, threads;  // tokens: padded
  int64_t width() const { return up32(x.columns); }
};

// x as columns of B, [tokens / 16][D / 32].
void pack_tokens(const Head& h, bf16* to) {
  parallel_for(h.tokens / 16, 8, h.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t d = 0; d < h.width(); d += 32)
        b_tile(h.x, t * 16, d, to + (t * h.width() + d) / 32 * TILE);
  });
}

// Words [first, first + count) as rows of A, [count / 16][D / 32].
void pack_words(const Head& h, int64_t first, int64_t count, bf16* to) {
  parallel_for(count / 16, 4, h.threads, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; v++)
      for (int64_t d = 0; d < h.width(); d += 32)
        a_tile(h.w, first + v * 16, d, to + (v * h.width() + d) / 32 * TILE);
  });
}

// Labels of 32 tokens that lie in 32 words: f(row, lane).
template <class F>
PTM_INLINE void each_label(const Head& h, int64_t token, int64_t word, F f) {
  for (int64_t i = 0; i < 32 && token + i < h.x.rows; i++) {
    int64_t row = h.labels[token + i] - word;
    if (row >= 0 && row < 32) f(row, i);
  }
}

struct Softmax {
  float *largest, *sum, *label;  // per token

  PTM_INLINE void take(int64_t token, const float* top, const float* bottom, int64_t rows) const {
    vf before = load(largest + token), now = before;
    int64_t first = rows < 16 ? rows : 16;
    for (int64_t i = 0; i < first; i++) now = vmax(now, load(top + 16 * i));
    for (int64_t i = 16; i < rows; i++) now = vmax(now, load(bottom + 16 * (i - 16)));
    vf total = load(sum + token) * vexp(before - now), other = {};
    for (int64_t i = 0; i < first; i++) total += vexp(load(top + 16 * i) - now);
    for (int64_t i = 16; i < rows; i++) other += vexp(load(bottom + 16 * (i - 16)) - now);
    store(largest + token, now);
    store(sum + token, total + other);
  }
};

int forward(const Head& h, float* lse, float* nll) {
  int64_t D = h.width(), V = h.w.rows;
  Scratch<bf16> x(h.tokens * D), w(BLOCK * D);
  Scratch<float> state(3 * h.tokens);
  if (!x.data || !w.data || !state.data) return PTM_NO_MEMORY;
  Softmax softmax{state.data, state.data + h.tokens, state.data + 2 * h.tokens};
  for (int64_t t = 0; t < h.tokens; t++) {
    softmax.largest[t] = -1e30f;
    softmax.sum[t] = softmax.label[t] = 0;
  }
  pack_tokens(h, x.data);
  for (int64_t v0 = 0; v0 < V; v0 += BLOCK) {
    int64_t count = V - v0 < BLOCK ? up32(V - v0) : BLOCK;
    pack_words(h, v0, count, w.data);
    product(w.data, x.data, count, h.tokens, D, h.threads,
            [&](int64_t v, int64_t t, const float(*c)[256]) {
              int64_t rows = V - v0 - v < 32 ? V - v0 - v : 32;
              softmax.take(t, c[0], c[1], rows);
              softmax.take(t + 16, c[2], c[3], rows);
              each_label(h, t, v0 + v, [&](int64_t row, int64_t lane) {
                softmax.label[t + lane] = c[row / 16 + lane / 16 * 2][row % 16 * 16 + lane % 16];
              });
            });
  }
  for (int64_t t = 0; t < h.x.rows; t++) {
    lse[t] = softmax.largest[t] + logf(softmax.sum[t]);
    nll[t] = h.labels[t] < 0 ? 0.0f : lse[t] - softmax.label[t];
    if (nll[t] != nll[t]) lse[t] = nll[t];  // the maximum passes over NaNs; the gradient must not
  }
  return PTM_OK;
}

// Everything that lies in tiles during the backward.
struct Blocks {
  Scratch<bf16> x, x_down, w, w_down, p, p_down;
  Scratch<float> dx, lse, scale;
  Blocks(int64_t T, int64_t D, int64_t V)
      : x(T * D), x_down(T * D), w(V * D), w_down(V * D), p(V * T), p_down(V * T), dx(T * D),
        lse(T), scale(T) {}
  bool all() const {
    return x.data && x_down.data && w.data && w_down.data && p.data && p_down.data && dx.data &&
           lse.data && scale.data;
  }
};

// P of 32 words x 32 tokens from their z: rows of A for dW, columns of B for dx^T.
PTM_INLINE void to_gradient(const Head& h, const Blocks& b, int64_t v0, int64_t v, int64_t t,
                            int64_t count, float (*c)[256]) {
  for (int half = 0; half < 2; half++) {
    vf lse = load(b.lse.data + t + 16 * half), scale = load(b.scale.data + t + 16 * half);
    for (int i = 0; i < 512; i += 16) {
      float* z = c[2 * half] + i;  // c[1] follows c[0], and c[3] c[2]
      store(z, vexp(load(z) - lse) * scale);
    }
  }
  each_label(h, t, v0 + v, [&](int64_t row, int64_t lane) {
    c[row / 16 + lane / 16 * 2][row % 16 * 16 + lane % 16] -= b.scale.data[t + lane];
  });
  int64_t kept = h.w.rows - v0 - v;
  for (int i = 0; i < 32; i += 2) {
    __m512i rows[2];
    for (int j = 0; j < 2; j++) {
      int64_t at = (i + j) * 16;
      rows[j] = rounded(_mm512_load_ps(c[0] + at), _mm512_load_ps(c[2] + at));
      if (i + j >= kept) rows[j] = _mm512_setzero_si512();
      int64_t tile = (v + i) / 16 * (h.tokens / 32) + t / 32;
      _mm512_store_si512(b.p.data + tile * TILE + (i + j) % 16 * 32, rows[j]);
    }
    bf16* down = b.p_down.data + (t / 16 * (count / 32) + v / 32) * TILE + i / 2 * 32;
    _mm512_store_si512(down, low_pairs(rows[0], rows[1]));
    _mm512_store_si512(down + count / 32 * TILE, high_pairs(rows[0], rows[1]));
  }
}

PTM_INLINE void store_pair(bf16* to, const float* low, const float* high, int64_t count) {
  __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
  __m512i both = rounded(_mm512_load_ps(low), _mm512_load_ps(high));
  _mm512_mask_storeu_epi16(to, mask, both);
}

int backward(const Head& h, const float* lse, float grad, bf16* dx, bf16* dw) {
  int64_t D = h.width(), T = h.tokens, V = h.w.rows, width = h.x.columns;
  Blocks b(T, D, V < BLOCK ? up32(V) : BLOCK);
  if (!b.all()) return PTM_NO_MEMORY;
  for (int64_t t = 0; t < T; t++) {
    bool counts = t < h.x.rows && h.labels[t] >= 0;
    b.scale.data[t] = counts ? (lse[t] == lse[t] ? grad : lse[t]) : 0;
    b.lse.data[t] = t < h.x.rows ? lse[t] : 0;
  }
  pack_tokens(h, b.x.data);
  parallel_for(T / 32, 2, h.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t d = 0; d < D; d += 32) {
        bf16* to = b.x_down.data + (d / 16 * (T / 32) + t) * TILE;
        b_tiles_down(h.x, t * 32, d, to, to + T / 32 * TILE);
      }
  });
  for (int64_t v0 = 0; v0 < V; v0 += BLOCK) {
    int64_t count = V - v0 < BLOCK ? up32(V - v0) : BLOCK;
    pack_words(h, v0, count, b.w.data);
    parallel_for(count / 32, 2, h.threads, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; v++)
        for (int64_t d = 0; d < D; d += 32) {
          bf16* to = b.w_down.data + (d / 16 * (count / 32) + v) * TILE;
          a_tiles_down(h.w, v0 + v * 32, d, to, to + count / 32 * TILE);
        }
    });
    product(b.w.data, b.x.data, count, T, D, h.threads, [&](int64_t v, int64_t t, float(*c)[256]) {
      to_gradient(h, b, v0, v, t, count, c);
    });
    product(b.w_down.data, b.p_down.data, D, T, count, h.threads,
            [&](int64_t d, int64_t t, float(*c)[256]) {
              float* to = b.dx.data + (t / 32 * (D / 32) + d / 32) * 1024;
              for (int i = 0; i < 1024; i += W)
                store(to + i, v0 ? load(to + i) + load(c[0] + i) : load(c[0] + i));
            });
    product(b.p.data, b.x_down.data, count, D, T, h.threads,
            [&](int64_t v, int64_t d, float(*c)[256]) {
              for (int64_t i = 0; i < 32 && v0 + v + i < V && d < width; i++)
                store_pair(dw + (v0 + v + i) * width + d, c[0] + 16 * i, c[2] + 16 * i, width - d);
            });
  }
  parallel_for(T / 32, 4, h.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t d = 0; d < D; d += 32) {
        float* c = b.dx.data + (t * (D / 32) + d / 32) * 1024;
        for (int i = 0; i < 1024; i += 256) transpose((__m512i*)(c + i));
        for (int64_t i = 0; i < 32 && t * 32 + i < h.x.rows; i++) {
          float* low = c + i / 16 * 512 + i % 16 * 16;
          store_pair(dx + (t * 32 + i) * width + d, low, low + 256, width - d);
        }
      }
  });
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// x (T, D) and w (V, D) bf16, labels (T,) int64 in [0, V), or negative: ignored; lse, nll (T,) fp32.
PTM_EXPORT(linear_ce)(const void* x, const void* w, const int64_t* labels, float* lse, float* nll,
                      int64_t T, int64_t D, int64_t V, int64_t threads) {
  for (int64_t t = 0; t < T; t++)
    if (labels[t] >= V) return PTM_BAD_SHAPE;
  return forward({{(const bf16*)x, T, D}, {(const bf16*)w, V, D}, labels, up32(T), threads}, lse,
                 nll);
}

// dx (T, D), dw (V, D) bf16: of grad times the sum of nll.
PTM_EXPORT(linear_ce_backward)(const void* x, const void* w, const int64_t* labels,
                               const float* lse, void* dx, void* dw, int64_t T, int64_t D,
                               int64_t V, double grad, int64_t threads) {
  return backward({{(const bf16*)x, T, D}, {(const bf16*)w, V, D}, labels, up32(T), threads}, lse,
                  float(grad), (bf16*)dx, (bf16*)dw);
}
