// The attention router as cpu.cpp has it, a warp for a token; lanes are queries in the forward, keys
// in the backward, ranks in the choice. See ptm/kernels/router.py for the formulas.
#include "../common/device.h"

namespace PTM_NAMESPACE {

constexpr int64_t MAX_E = 512;  // the same number as in ptm/kernels/router.py
constexpr int WARPS = 4;        // tokens of a block
constexpr float LOG2E = 1.44269504f;

PTM_BODY float minus_infinity() { return float_of(0xff800000u); }

// One token's numbers in shared memory: k2 is k in units of log 2.
struct Token {
  float *q, *k2, *v, *g;
  float low, high;  // the extremes of k2

  PTM_BODY explicit Token(int64_t E) {
    q = shared_memory<float>() + warp_id() * 4 * E;
    k2 = q + E;
    v = k2 + E;
    g = v + E;
  }

  template <class T>
  PTM_BODY void read(const T* qkv, int64_t E) {
    float least = -minus_infinity(), most = minus_infinity();
    for (int64_t i = lane(); i < E; i += 32) {
      q[i] = to_float(qkv[i]);
      k2[i] = to_float(qkv[E + i]) * LOG2E;
      v[i] = to_float(qkv[2 * E + i]);
      least = fminf(least, k2[i]);
      most = fmaxf(most, k2[i]);
    }
    low = warp_min(least);
    high = warp_max(most);
    sync_warp();
  }
};

template <class T>
struct Scores {
  static constexpr int THREADS = 32 * WARPS;
  const T* qkv;
  float* scores;
  int64_t tokens, E;

  PTM_BODY void operator()() const {
    const int64_t t = block_id() * WARPS + warp_id();
    if (t >= tokens) return;
    Token token(E);
    token.read(qkv + t * 3 * E, E);
    for (int64_t i = lane(); i < E; i += 32) {
      const float q = token.q[i], far = q > 0 ? token.high : token.low;
      float total = 0, mixed = 0;
      for (int64_t j = 0; j < E; j++) {
        const float part = power2(q * (token.k2[j] - far));
        total += part;
        mixed += part * token.v[j];
      }
      scores[t * E + i] = mixed / total;
    }
  }
};

// CHUNKS x 32 keys at least, the gradients of each in a register of its lane.
template <class T, int CHUNKS>
struct ScoresBackward {
  static constexpr int THREADS = 32 * WARPS;
  const float* g;
  const T* qkv;
  const float* scores;
  T* grad;
  int64_t tokens, E;

  PTM_BODY void operator()() const {
    const int64_t t = block_id() * WARPS + warp_id();
    if (t >= tokens) return;
    Token token(E);
    token.read(qkv + t * 3 * E, E);
    for (int64_t i = lane(); i < E; i += 32) token.g[i] = g[t * E + i];
    sync_warp();
    T* to = grad + t * 3 * E;
    float k2[CHUNKS], v[CHUNKS], part[CHUNKS], dk[CHUNKS], dv[CHUNKS], dq[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int64_t j = lane() + 32 * c;
      k2[c] = j < E ? token.k2[j] : 0;
      v[c] = j < E ? token.v[j] : 0;
      dk[c] = dv[c] = dq[c] = 0;
    }
    for (int64_t i = 0; i < E; i++) {
      const float gi = token.g[i];
      if (gi == 0) continue;  // all lanes alike
      const float q = token.q[i], r = scores[t * E + i], far = q > 0 ? token.high : token.low;
      float total = 0;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        part[c] = lane() + 32 * c < E ? power2(q * (k2[c] - far)) : 0;
        total += part[c];
      }
      const float scale = gi / warp_sum(total);
      float mine = 0;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        const float gp = part[c] * scale, ds = gp * (v[c] - r);
        dv[c] += gp;
        dk[c] += ds * q;
        mine += ds * k2[c];
      }
      mine = warp_sum(mine) / LOG2E;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
        if (i == lane() + 32 * c) dq[c] = mine;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int64_t j = lane() + 32 * c;
      if (j >= E) break;
      store<1>(to + j, dq + c);
      store<1>(to + E + j, dk + c);
      store<1>(to + 2 * E + j, dv + c);
    }
  }
};

// Whether (a, i) goes before (b, j): larger, a NaN largest of all, then the lower id.
PTM_BODY bool before(float a, int i, float b, int j) {
  const bool is_nan = a != a, other_is = b != b;
  if (is_nan != other_is) return is_nan;
  if (!is_nan && a != b) return a > b;
  return i < j;
}

struct Top {
  static constexpr int THREADS = 32 * WARPS;
  const float *scores, *bias;
  float* weights;
  int64_t* ids;
  int64_t tokens, E, A;

  PTM_BODY void operator()() const {
    const int64_t t = block_id() * WARPS + warp_id();
    if (t >= tokens) return;
    float* ranked = shared_memory<float>() + warp_id() * 2 * E;
    float* chosen = ranked + E;  // (A,) scores
    const float* mine = scores + t * E;
    for (int64_t i = lane(); i < E; i += 32) ranked[i] = bias ? mine[i] + bias[i] : mine[i];
    for (int64_t a = 0; a < A; a++) {
      float best = minus_infinity();
      int at = int(E);
      for (int i = lane(); i < E; i += 32)
        if (before(ranked[i], i, best, at)) best = ranked[i], at = i;
#pragma unroll
      for (int m = 16; m > 0; m >>= 1) {
        const float other = from_lane(best, lane() ^ m);
        const int there = from_lane(at, lane() ^ m);
        if (before(other, there, best, at)) best = other, at = there;
      }
      if (at % 32 == lane()) {  // who ranks it, alone
        ranked[at] = minus_infinity();
        ids[t * A + a] = at;
        chosen[a] = mine[at];
      }
    }
    sync_warp();
    // fmaxf leaves out a NaN; its own exponential is one all the same.
    float most = minus_infinity(), total = 0;
    for (int64_t a = lane(); a < A; a += 32) most = fmaxf(most, chosen[a]);
    most = warp_max(most);
    for (int64_t a = lane(); a < A; a += 32) total += chosen[a] = power_e(chosen[a] - most);
    total = warp_sum(total);
    for (int64_t a = lane(); a < A; a += 32) weights[t * A + a] = chosen[a] / total;
  }
};

struct TopBackward {
  static constexpr int THREADS = 32 * WARPS;
  const float *g, *weights;
  const int64_t* ids;
  float* grad;
  int64_t tokens, E, A;

  PTM_BODY void operator()() const {
    const int64_t t = block_id() * WARPS + warp_id();
    if (t >= tokens) return;
    const float *gw = g + t * A, *w = weights + t * A;
    float mean = 0;
    for (int64_t a = 0; a < A; a++) mean += gw[a] * w[a];
    for (int64_t e = lane(); e < E; e += 32) {
      float total = 0;
      for (int64_t a = 0; a < A; a++)
        if (ids[t * A + a] == e) total += w[a] * (gw[a] - mean);
      grad[t * E + e] = total;
    }
  }
};

bool is_served(int64_t E) { return E >= 1 && E <= MAX_E; }

int64_t shared_for(int64_t E, int kinds) { return WARPS * kinds * E * int64_t(sizeof(float)); }

template <class T>
int scores_of(const T* qkv, float* scores, int64_t tokens, int64_t E, void* stream) {
  if (!is_served(E)) return PTM_BAD_SHAPE;
  return launch(Scores<T>{qkv, scores, tokens, E}, divided_up(tokens, WARPS), shared_for(E, 4),
                stream);
}

template <int CHUNKS, class T>
int backward_by(const float* g, const T* qkv, const float* scores, T* grad, int64_t tokens,
                int64_t E, void* stream) {
  return launch(ScoresBackward<T, CHUNKS>{g, qkv, scores, grad, tokens, E},
                divided_up(tokens, WARPS), shared_for(E, 4), stream);
}

template <class T>
int backward(const float* g, const T* qkv, const float* scores, T* grad, int64_t tokens, int64_t E,
             void* stream) {
  if (!is_served(E)) return PTM_BAD_SHAPE;
  if (E <= 32) return backward_by<1>(g, qkv, scores, grad, tokens, E, stream);
  if (E <= 128) return backward_by<4>(g, qkv, scores, grad, tokens, E, stream);
  return backward_by<16>(g, qkv, scores, grad, tokens, E, stream);
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

PTM_EXPORT(attn_router)(const void* qkv, float* scores, int64_t tokens, int64_t E, int64_t is_bf16,
                        void* stream) {
  if (is_bf16) return scores_of((const bf16*)qkv, scores, tokens, E, stream);
  return scores_of((const float*)qkv, scores, tokens, E, stream);
}

PTM_EXPORT(attn_router_backward)(const float* g, const void* qkv, const float* scores, void* grad,
                                 int64_t tokens, int64_t E, int64_t is_bf16, void* stream) {
  if (is_bf16) return backward(g, (const bf16*)qkv, scores, (bf16*)grad, tokens, E, stream);
  return backward(g, (const float*)qkv, scores, (float*)grad, tokens, E, stream);
}

PTM_EXPORT(router_top)(const float* scores, const float* bias, float* weights, int64_t* ids,
                       int64_t tokens, int64_t E, int64_t A, void* stream) {
  if (!is_served(E) || A < 1 || A > E) return PTM_BAD_SHAPE;
  return launch(Top{scores, bias, weights, ids, tokens, E, A}, divided_up(tokens, WARPS),
                shared_for(E, 2), stream);
}

PTM_EXPORT(router_top_backward)(const float* g, const float* weights, const int64_t* ids,
                                float* grad, int64_t tokens, int64_t E, int64_t A, void* stream) {
  return launch(TopBackward{g, weights, ids, grad, tokens, E, A}, divided_up(tokens, WARPS), 0,
                stream);
}
