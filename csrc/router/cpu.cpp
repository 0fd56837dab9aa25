// isa: portable avx2 avx512_bf16
// The attention router of ptm/kernels/router.py, a token at a time; its E x E attention stays in
// registers. The largest product of a query is with the largest or the smallest key, by its sign: no
// pass looks for it, and q (k - that key) is exact where q k - max would cancel. The backward computes again only rows of the attention with a gradient.
#include "../common/vec.h"

#include <initializer_list>

namespace PTM_NAMESPACE {

constexpr int64_t MAX_E = 512;  // the same number as in ptm/kernels/router.py
constexpr int64_t GRAIN = 32;   // tokens
constexpr int64_t PADDED = MAX_E + W;

// One token's q, k, v in fp32, padded with zeros to whole vectors; k also in units of log 2, for
// powers of two are cheaper than those of e.
struct Token {
  alignas(64) float q[PADDED] = {}, k[PADDED] = {}, k2[PADDED] = {}, v[PADDED] = {};
  float low, high;  // the extremes of k2

  template <class T>
  void read(const T* qkv, int64_t E) {
    float first = to_float(qkv[E]) * LOG2E;
    vf lows = splat(first), highs = lows;
    for_lanes(E, [&](int64_t i, auto lanes) {
      vf key = load(qkv + E + i, lanes);
      store(q + i, load(qkv + i, lanes));
      store(k + i, key);
      store(k2 + i, key * LOG2E);
      store(v + i, load(qkv + 2 * E + i, lanes));
    });
    for (int64_t i = E; i % W; i++) k2[i] = first;  // no extreme
    for_lanes(E, [&](int64_t i, auto) {
      lows = vmin(lows, load(k2 + i));
      highs = vmax(highs, load(k2 + i));
    });
    low = least(lows);
    high = largest(highs);
  }
};

// N vectors of queries against all keys.
template <int N>
PTM_INLINE void scores_of(const Token& t, int64_t i, int64_t E, float* scores) {
  vf q[N], far[N], total[N] = {}, mixed[N] = {};
  for (int n = 0; n < N; n++) {
    q[n] = load(t.q + i + n * W);
    far[n] = q[n] > 0 ? splat(t.high) : splat(t.low);
  }
  for (int64_t j = 0; j < E; j++)
    for (int n = 0; n < N; n++) {
      vf part = vexp2(q[n] * (t.k2[j] - far[n]));
      total[n] += part;
      mixed[n] += part * t.v[j];
    }
  for (int n = 0; n < N; n++) store(scores + i + n * W, mixed[n] / total[n]);
}

inline bool above(float a, float b) { return b == b && (a > b || a != a); }  // a NaN is the largest

// The A largest, largest first, the lowest id of equals; `ranked` has room for whole vectors and is
// spoilt.
void choose(float* ranked, int64_t E, int64_t A, int64_t* ids) {
  for (int64_t i = E; i % W; i++) ranked[i] = -__builtin_inff();
  for (int64_t a = 0; a < A; a++) {
    vf most = splat(-__builtin_inff());
    vi has_nan = {};
    for_lanes(E, [&](int64_t i, auto) {
      vf x = load(ranked + i);
      most = vmax(most, x);
      has_nan |= x != x;
    });
    float best = largest(most);
    bool is_plain = sum((vf)(has_nan & (vi)splat(1.0f))) == 0;
    int64_t i = 0;
    while (i < E - 1 && (is_plain ? ranked[i] != best : ranked[i] == ranked[i])) i++;
    ids[a] = i;
    ranked[i] = -__builtin_inff();
  }
}

void softmax(const float* scores, const int64_t* ids, int64_t A, float* weights) {
  float total = 0, most = scores[ids[0]];
  for (int64_t a = 1; a < A; a++) most = above(scores[ids[a]], most) ? scores[ids[a]] : most;
  for (int64_t a = 0; a < A; a++) total += weights[a] = vexp(splat(scores[ids[a]] - most))[0];
  for (int64_t a = 0; a < A; a++) weights[a] /= total;
}

template <class T>
int forward(const T* qkv, float* scores, int64_t tokens, int64_t E, int64_t threads) {
  if (E < 1 || E > MAX_E) return PTM_BAD_SHAPE;
  parallel_for(tokens, GRAIN, threads, [&](int64_t begin, int64_t end) {
    Token token;
    alignas(64) float found[PADDED];
    for (int64_t t = begin; t < end; t++) {
      token.read(qkv + t * 3 * E, E);
      int64_t i = 0;
      for (; i + W < E; i += 2 * W) scores_of<2>(token, i, E, found);
      if (i < E) scores_of<1>(token, i, E, found);
      memcpy(scores + t * E, found, sizeof(float) * size_t(E));
    }
  });
  return PTM_OK;
}

int top(const float* scores, const float* bias, float* weights, int64_t* ids, int64_t tokens,
        int64_t E, int64_t A, int64_t threads) {
  if (E < 1 || E > MAX_E || A < 1 || A > E) return PTM_BAD_SHAPE;
  parallel_for(tokens, GRAIN, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float ranked[PADDED];
    for (int64_t t = begin; t < end; t++) {
      memcpy(ranked, scores + t * E, sizeof(float) * size_t(E));
      for (int64_t e = 0; bias && e < E; e++) ranked[e] += bias[e];
      choose(ranked, E, A, ids + t * A);
      softmax(scores + t * E, ids + t * A, A, weights + t * A);
    }
  });
  return PTM_OK;
}

void top_backward(const float* g, const float* weights, const int64_t* ids, float* grad,
                  int64_t tokens, int64_t E, int64_t A, int64_t threads) {
  parallel_for(tokens, GRAIN, threads, [&](int64_t begin, int64_t end) {
    memset(grad + begin * E, 0, sizeof(float) * size_t((end - begin) * E));
    for (int64_t t = begin; t < end; t++) {
      const float *gw = g + t * A, *w = weights + t * A;
      float mean = 0;
      for (int64_t a = 0; a < A; a++) mean += gw[a] * w[a];
      for (int64_t a = 0; a < A; a++) grad[t * E + ids[t * A + a]] += w[a] * (gw[a] - mean);
    }
  });
}

// Of one query whose score r has gradient g: adds to the gradients of k and v, returns that of q.
PTM_INLINE float backward_row(const Token& t, int64_t i, float g, float r, int64_t E, float* part,
                              float* dk, float* dv) {
  float q = t.q[i], far = q > 0 ? t.high : t.low;
  vf total = {};
  for_lanes(E, [&](int64_t j, auto lanes) {
    store(part + j, vexp2(q * (load(t.k2 + j) - far)));
    total += load(part + j, lanes);  // 0 in the padding
  });
  float scale = g / sum(total);
  vf dq = {};
  for_lanes(E, [&](int64_t j, auto lanes) {
    vf gp = load(part + j, lanes) * scale, ds = gp * (load(t.v + j) - r);
    store(dv + j, load(dv + j) + gp);
    store(dk + j, load(dk + j) + ds * q);
    dq += ds * load(t.k + j);
  });
  return sum(dq);
}

template <class T>
int backward(const float* g, const T* qkv, const float* scores, T* grad, int64_t tokens, int64_t E,
             int64_t threads) {
  if (E < 1 || E > MAX_E) return PTM_BAD_SHAPE;
  parallel_for(tokens, GRAIN, threads, [&](int64_t begin, int64_t end) {
    Token token;
    alignas(64) float dq[PADDED], dk[PADDED], dv[PADDED], part[PADDED];
    for (int64_t t = begin; t < end; t++) {
      token.read(qkv + t * 3 * E, E);
      for (float* one : {dq, dk, dv}) memset(one, 0, sizeof(float) * size_t(E + W));
      for (int64_t i = 0; i < E; i++) {
        float gi = g[t * E + i];
        if (gi != 0) dq[i] = backward_row(token, i, gi, scores[t * E + i], E, part, dk, dv);
      }
      T* to = grad + t * 3 * E;
      for_lanes(E, [&](int64_t i, auto lanes) {
        store(to + i, load(dq + i), lanes);
        store(to + E + i, load(dk + i), lanes);
        store(to + 2 * E + i, load(dv + i), lanes);
      });
    }
  });
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// qkv (T, 3E) bf16 or fp32 -> scores (T, E) fp32.
PTM_EXPORT(attn_router)(const void* qkv, float* scores, int64_t tokens, int64_t E, int64_t is_bf16,
                        int64_t threads) {
  if (is_bf16) return forward((const bf16*)qkv, scores, tokens, E, threads);
  return forward((const float*)qkv, scores, tokens, E, threads);
}

// g (T, E) fp32 -> grad (T, 3E) in qkv's type.
PTM_EXPORT(attn_router_backward)(const float* g, const void* qkv, const float* scores, void* grad,
                                 int64_t tokens, int64_t E, int64_t is_bf16, int64_t threads) {
  if (is_bf16) return backward(g, (const bf16*)qkv, scores, (bf16*)grad, tokens, E, threads);
  return backward(g, (const float*)qkv, scores, (float*)grad, tokens, E, threads);
}

// scores (T, E), bias (E,) or null -> weights (T, A) fp32, ids (T, A) int64.
PTM_EXPORT(router_top)(const float* scores, const float* bias, float* weights, int64_t* ids,
                       int64_t tokens, int64_t E, int64_t A, int64_t threads) {
  return top(scores, bias, weights, ids, tokens, E, A, threads);
}

// g (T, A) -> grad (T, E), zero but at the chosen.
PTM_EXPORT(router_top_backward)(const float* g, const float* weights, const int64_t* ids,
                                float* grad, int64_t tokens, int64_t E, int64_t A,
                                int64_t threads) {
  top_backward(g, weights, ids, grad, tokens, E, A, threads);
  return PTM_OK;
}
