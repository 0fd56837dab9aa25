// AdamW over a range of a page in one visit, as cpu.cpp has it, with the same bits: a page may be
// updated on either device. A warp takes a block of 128 elements (that of int8 moments), a lane four
// of them. Each operation rounds once: times, plus and the like are never contracted.
#include <type_traits>

#include "../common/squares.h"

namespace PTM_NAMESPACE {

constexpr int BLOCK = 128;           // of int8 moments: ALIGN of ptm/engine/layout.py
constexpr int64_t GRAIN = 1 << 14;   // elements of a block of threads
constexpr int64_t TORCH_LANES = 8;   // torch's vectors on a CPU; see cpu.cpp

struct Rule {
  float scale, lerp, beta2, rest2, eps, root2, rate;
  float back_root, back_rate, ahead_rate;  // of gradients that are a step late; 0: not so
};

PTM_BODY float change(float m, float v, float root2, float eps, float rate) {
  return times(over(m, plus(over(root(v), root2), eps)), rate);
}

// N of 1 or 4 elements; bits(master) = (bits(weight) << 16) + rest
template <int N>
PTM_BODY void read_master(const float* weight, const int16_t*, float* to) {
  load<N>(weight, to);
}
template <int N>
PTM_BODY void read_master(const bf16* weight, const int16_t* rest, float* to) {
  float low[N];
  load<N>(weight, to);
  load<N>((const bf16*)rest, low);
#pragma unroll
  for (int j = 0; j < N; j++) to[j] = float_of(bits_of(to[j]) + uint32_t(int32_t(bits_of(low[j])) >> 16));
}
PTM_BODY void put_halves(uint16_t* to, const uint32_t* from, Width<1>) { *to = uint16_t(from[0]); }
PTM_BODY void put_halves(uint16_t* to, const uint32_t* from, Width<4>) {
  put_whole(to, Bytes8{(from[0] & 0xffffu) | from[1] << 16, (from[2] & 0xffffu) | from[3] << 16});
}
template <int N>
PTM_BODY void put_master(float* weight, int16_t*, const float* from) {
  store<N>(weight, from);
}
template <int N>
PTM_BODY void put_master(bf16* weight, int16_t* rest, const float* from) {
  uint32_t low[N], high[N];
#pragma unroll
  for (int j = 0; j < N; j++) {
    low[j] = bits_of(from[j]);
    high[j] = (low[j] + 0x8000u) >> 16;
  }
  put_halves((uint16_t*)rest, low, Width<N>());
  put_halves((uint16_t*)weight, high, Width<N>());
}

PTM_BODY float whole(float x) {  // to a whole number, ties to even; below 2^22
  return plus(plus(x, 12582912.0f), -12582912.0f);
}

// VEC: everything lies on 16 bytes. n elements at most, fewer in the last block of all.
template <class T, class G, bool IS_INT8, bool VEC>
struct Sweep {
  static constexpr int THREADS = 256;
  T* weight;
  int16_t* rest;
  void *m, *v;
  float *m_scales, *v_scales;
  const G* grad;
  bf16* copy;
  double* squares;  // of each block of threads, or null
  int64_t n, middle;
  float keep;
  Rule rule;

  PTM_BODY void operator()() const {
    const int64_t begin = block_id() * GRAIN, end = begin + GRAIN < n ? begin + GRAIN : n;
    double square = 0;
    for (int64_t at = begin + warp_id() * BLOCK; at < end; at += THREADS / 32 * BLOCK) {
      const int64_t i = at + lane() * 4;
      float ms[4] = {}, vs[4] = {};
      if constexpr (IS_INT8) {
        const float m_scale = m_scales[at / BLOCK], v_scale = v_scales[at / BLOCK];
        for (int j = 0; j < 4; j++) {
          if (i + j >= n) break;
          ms[j] = times(float(((const int8_t*)m)[i + j]), m_scale);
          const float r = times(float(((const uint8_t*)v)[i + j]), v_scale);
          vs[j] = times(r, r);
        }
      }
      if (VEC && i + 4 <= n)
        four<4>(i, ms, vs, square);
      else
        for (int j = 0; j < 4 && i + j < n; j++) four<1>(i + j, ms + j, vs + j, square);
      if constexpr (IS_INT8) encode(at, i, ms, vs);
    }
    if (!squares) return;
    square = block_sum<THREADS / 32>(square, shared_memory<double>());
    if (thread_id() == 0) squares[block_id()] = square;
  }

  template <int N>
  PTM_BODY void four(int64_t i, float* ms, float* vs, double& square) const {
    float g[N], x[N];
    load<N>(grad + i, g);
    read_master<N>(weight + i, rest + i, x);
    if constexpr (!IS_INT8) {
      load<N>((const float*)m + i, ms);
      load<N>((const float*)v + i, vs);
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
      if (squares) square += double(g[j]) * double(g[j]);
      x[j] = updated(x[j], g[j], ms[j], vs[j], i + j);
    }
    if constexpr (!IS_INT8) {
      store<N>((float*)m + i, ms);
      store<N>((float*)v + i, vs);
    }
    put_master<N>(weight + i, rest + i, x);
    if (copy) store<N>(copy + i, x);
  }

  PTM_BODY float updated(float x, float g, float& m, float& v, int64_t i) const {
    const int64_t side = i < middle ? middle : n - middle, place = i < middle ? i : i - middle;
    const bool is_tail = place >= side - side % TORCH_LANES;
    g = times(g, rule.scale);
    if (rule.back_rate != 0)
      x = plus(x, -change(m, v, rule.back_root, rule.eps, rule.back_rate));
    x = times(x, i < middle ? keep : 1.0f);
    m = fused(rule.lerp, plus(g, -m), m);
    const float by_rest = times(g, rule.rest2);
    v = is_tail ? fused(v, rule.beta2, times(by_rest, g)) : fused(by_rest, g, times(v, rule.beta2));
    x = plus(x, over(times(m, rule.rate), plus(over(root(v), rule.root2), rule.eps)));
    if (rule.ahead_rate != 0) x = plus(x, change(m, v, rule.root2, rule.eps, rule.ahead_rate));
    return x;
  }

  // Linear codes; the second moment's, of its root, are rounded up: one that became zero would make
  // an endless step.
  PTM_BODY void encode(int64_t at, int64_t i, float* ms, float* vs) const {
    float most_m = 0, most_v = 0;
    for (int j = 0; j < 4; j++) {
      vs[j] = root(vs[j]);
      most_m = fmaxf(most_m, fabsf(ms[j]));
      most_v = fmaxf(most_v, vs[j]);
    }
    const float m_scale = over(warp_max(most_m), 127.0f), v_scale = over(warp_max(most_v), 255.0f);
    const float by_m = m_scale > 0 ? over(1.0f, m_scale) : 0.0f;
    const float by_v = v_scale > 0 ? over(1.0f, v_scale) : 0.0f;
    for (int j = 0; j < 4; j++) {
      if (i + j >= n) break;
      const float above = plus(times(vs[j], by_v), -1e-3f), near = whole(above);
      ((int8_t*)m)[i + j] = int8_t(whole(times(ms[j], by_m)));
      ((uint8_t*)v)[i + j] = uint8_t(int32_t(near < above ? plus(near, 1.0f) : near));
    }
    if (lane() == 0) {
      m_scales[at / BLOCK] = m_scale;
      v_scales[at / BLOCK] = v_scale;
    }
  }
};

template <class T, class G>
struct Page {
  T* weight;
  int16_t* rest;
  void *m, *v;
  float *m_scales, *v_scales;
  const G* grad;
  bf16* copy;
  double* square;
  int64_t n, middle;
  float keep;
  Rule rule;

  template <bool IS_INT8, bool VEC>
  int run(double* squares, void* stream) const {
    return launch(Sweep<T, G, IS_INT8, VEC>{weight, rest, m, v, m_scales, v_scales, grad, copy,
                                            squares, n, middle, keep, rule},
                  divided_up(n, GRAIN), 64, stream);
  }

  int sweep(void* stream) const {
    const int64_t blocks = divided_up(n, GRAIN);
    DeviceScratch<double> squares(square ? blocks : 0, stream);
    if (!squares.data) return PTM_NO_MEMORY;
    double* each = square ? squares.data : nullptr;
    const bool is_aligned = aligned16(weight, rest, grad, copy) && (m_scales || aligned16(m, v));
    const int status = m_scales ? is_aligned ? run<true, true>(each, stream)
                                             : run<true, false>(each, stream)
                       : is_aligned ? run<false, true>(each, stream)
                                    : run<false, false>(each, stream);
    if (status || !square) return status;
    return add_squares(each, blocks, blocks, square, 1, stream);
  }
};

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// As cpu.cpp's; `square` is on the device too.
PTM_EXPORT(adamw_page)(void* weight, int16_t* rest, void* m, void* v, float* m_scales,
                       float* v_scales, const void* grad, bf16* copy, double* square, int64_t n,
                       int64_t middle, int64_t is_bf16, double keep, double scale, double lerp,
                       double beta2, double rest2, double eps, double root2, double rate,
                       double back_root, double back_rate, double ahead_rate, void* stream) {
  const Rule rule{float(scale),     float(lerp),      float(beta2), float(rest2), float(eps),
                  float(root2),     float(rate),      float(back_root), float(back_rate),
                  float(ahead_rate)};
  auto run = [&](auto* w, const auto* g) {
    using T = std::remove_pointer_t<decltype(w)>;
    using G = std::remove_const_t<std::remove_pointer_t<decltype(g)>>;
    return Page<T, G>{w, rest, m, v, m_scales, v_scales, g, copy, square, n, middle, float(keep),
                      rule}
        .sweep(stream);
  };
  if (rest)
    return is_bf16 ? run((bf16*)weight, (const bf16*)grad) : run((bf16*)weight, (const float*)grad);
  return is_bf16 ? run((float*)weight, (const bf16*)grad) : run((float*)weight, (const float*)grad);
}
