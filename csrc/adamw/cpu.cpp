// isa: portable avx2 avx512_bf16
// AdamW over a range of a page in one visit: the gradient's sum of squares, its scaling, masters
// from weights and rests, moments from codes, the update, and all of them stored again.
//
// Each operation rounds as torch's fused kernel does (ATen FusedAdamKernel.cpp), and those around
// it as ptm/engine/states.py and split.py do, so with fp32 moments and gradients on time the bits
// are theirs (ptm/kernels/adamw.py says where they are not). `kept` stands where the compiler must
// not contract a product and a sum. Without a fused multiply-add in the instruction set one is made
// in fp64, whose second rounding can differ.
#include <type_traits>

#include "../common/kept.h"

namespace PTM_NAMESPACE {

constexpr int64_t BLOCK = 128;      // of int8 moments: ALIGN of ptm/engine/layout.py
constexpr int64_t GRAIN = 1 << 14;  // of a part, in elements
// torch's vectors: what is left over at the end of a range it does by scalars, which its compiler
// contracts in another way.
constexpr int64_t TORCH_LANES = 8;
typedef double vd __attribute__((vector_size(8 * W)));

PTM_INLINE vf fused(vf a, vf b, vf c) {  // a * b + c, rounded once
#if PTM_ISA_AVX512
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif PTM_ISA_AVX2
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  vd product = __builtin_convertvector(a, vd) * __builtin_convertvector(b, vd);
  return __builtin_convertvector(product + __builtin_convertvector(c, vd), vf);
#endif
}
PTM_INLINE vf root(vf x) {
#if PTM_ISA_AVX512
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif PTM_ISA_AVX2
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
// bits(master) = (bits(weight) << 16) + rest
template <class L>
PTM_INLINE vf master(const float* weight, const int16_t*, L lanes) {
  return load(weight, lanes);
}
template <class L>
PTM_INLINE vf master(const bf16* weight, const int16_t* rest, L lanes) {
  vf low = load((const bf16*)rest, lanes);  // the rest in the upper half, moved down with its sign
  return (vf)((vi)load(weight, lanes) + ((vi)low >> 16));
}
template <class L>
PTM_INLINE void put(float* weight, int16_t*, vf x, L lanes) {
  store(weight, x, lanes);
}
PTM_INLINE void put16(void* to, vu low, Whole) {
  vh half = __builtin_convertvector(low, vh);
  memcpy(to, &half, sizeof half);
}
PTM_INLINE void put16(void* to, vu low, Ragged end) {
  vh half = __builtin_convertvector(low, vh);
  memcpy(to, &half, 2 * size_t(end.n));
}
template <class L>
PTM_INLINE void put(bf16* weight, int16_t* rest, vf x, L lanes) {
  vu bits = (vu)x;
  put16(rest, bits & 0xffffu, lanes);
  put16(weight, (bits + 0x8000u) >> 16, lanes);
}

struct Rule {
  float scale, lerp, beta2, rest2, eps, root2, rate;
  // Of gradients that are a step late: what the moments before add to the weights, taken back, and
  // what those after add, made a second time. 0: not so.
  float back_root, back_rate, ahead_rate;
};

PTM_INLINE vf change(vf m, vf v, float root2, float eps, float rate) {
  return kept(kept(m / kept(kept(root(v) / root2) + eps)) * rate);
}

struct Range {  // of up to BLOCK elements
  float *m, *v;
  int64_t n;
};

template <bool IS_TAIL, class T, class G>
PTM_INLINE void update(T* weight, int16_t* rest, const G* grad, bf16* copy, Range r, float keep,
                       const Rule& rule, vd* squares) {
  for_lanes(r.n, [&](int64_t i, auto lanes) {
    vf g = load(grad + i, lanes), m = load(r.m + i, lanes), v = load(r.v + i, lanes);
    vf x = master(weight + i, rest + i, lanes);
    if (squares) {
      vd wide = __builtin_convertvector(g, vd);
      *squares += wide * wide;
    }
    g = kept(g * rule.scale);
    if (rule.back_rate != 0)
      x = kept(x - change(m, v, rule.back_root, rule.eps, rule.back_rate));
    x = kept(x * keep);
    m = fused(splat(rule.lerp), kept(g - m), m);
    vf by_rest = kept(g * rule.rest2);
    v = IS_TAIL ? fused(v, splat(rule.beta2), kept(by_rest * g))
                : fused(by_rest, g, kept(v * rule.beta2));
    x = kept(x + kept(kept(m * rule.rate) / kept(kept(root(v) / rule.root2) + rule.eps)));
    if (rule.ahead_rate != 0) x = kept(x + change(m, v, rule.root2, rule.eps, rule.ahead_rate));
    store(r.m + i, m, lanes);
    store(r.v + i, v, lanes);
    put(weight + i, rest + i, x, lanes);
    if (copy) store(copy + i, x, lanes);
  });
}

void decode(const int8_t* m, const uint8_t* v, float m_scale, float v_scale, Range out) {
  for (int64_t i = 0; i < out.n; i++) {
    out.m[i] = float(m[i]) * m_scale;
    float r = float(v[i]) * v_scale;
    out.v[i] = r * r;
  }
}

// Linear codes; the second moment's, of its root, are rounded up: one that became zero would make
// an endless step.
void encode(Range from, int8_t* m, uint8_t* v, float* m_scale, float* v_scale) {
  vf most_m = {}, most_v = {};
  for_lanes(from.n, [&](int64_t i, auto lanes) {
    vf a = load(from.m + i, lanes), r = root(load(from.v + i, lanes));
    store(from.v + i, r, lanes);
    most_m = vmax(most_m, vmax(a, -a));
    most_v = vmax(most_v, r);
  });
  *m_scale = largest(most_m) / 127.0f;
  *v_scale = largest(most_v) / 255.0f;
  float by_m = *m_scale > 0 ? 1.0f / *m_scale : 0.0f, by_v = *v_scale > 0 ? 1.0f / *v_scale : 0.0f;
  vf shifted = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
  for_lanes(from.n, [&](int64_t i, auto lanes) {
    vf codes = kept(kept(kept(load(from.m + i, lanes) * by_m) + shifted) - shifted);
    vf above = kept(kept(load(from.v + i, lanes) * by_v) - 1e-3f);
    vf near = kept(kept(above + shifted) - shifted);
    store(from.m + i, codes, lanes);
    store(from.v + i, near < above ? near + 1.0f : near, lanes);
  });
  for (int64_t i = 0; i < from.n; i++) {
    m[i] = int8_t(from.m[i]);
    v[i] = uint8_t(int32_t(from.v[i]));
  }
}

template <class T, class G>
struct Page {
  T* weight;
  int16_t* rest;
  void *m, *v;
  float *m_scales, *v_scales;
  const G* grad;
  bf16* copy;
  int64_t middle, total;
  float keep;

  void block(int64_t at, int64_t n, const Rule& rule, vd* squares) const {
    alignas(64) float ms[BLOCK], vs[BLOCK];
    bool is_int8 = m_scales;
    Range all = is_int8 ? Range{ms, vs, n} : Range{(float*)m + at, (float*)v + at, n};
    int64_t b = at / BLOCK;
    if (is_int8) decode((int8_t*)m + at, (uint8_t*)v + at, m_scales[b], v_scales[b], all);
    asm("" ::: "memory");  // or a product above and a sum below become one
    int64_t cut = middle - at < 0 ? 0 : middle - at > n ? n : middle - at;
    auto part = [&](auto is_tail, int64_t from, int64_t to, float by) {
      int64_t i = at + from;
      if (to > from)
        update<is_tail>(weight + i, rest ? rest + i : rest, grad + i, copy ? copy + i : copy,
                        Range{all.m + from, all.v + from, to - from}, by, rule, squares);
    };
    // Both sides of `middle`, each with its ragged end.
    auto side = [&](int64_t from, int64_t to, int64_t first, int64_t last, float by) {
      int64_t tail = last - (last - first) % TORCH_LANES - at;
      tail = tail < from ? from : tail > to ? to : tail;
      part(std::false_type{}, from, tail, by);
      part(std::true_type{}, tail, to, by);
    };
    side(0, cut, 0, middle, keep);
    side(cut, n, middle, total, 1.0f);
    if (is_int8) encode(all, (int8_t*)m + at, (uint8_t*)v + at, m_scales + b, v_scales + b);
  }
};

template <class T, class G>
int sweep(Page<T, G> page, int64_t n, const Rule& rule, double* square, int64_t threads) {
  Scratch<double> sums((n + GRAIN - 1) / GRAIN);
  if (!sums.data) return PTM_NO_MEMORY;
  parallel_for(n, GRAIN, threads, [&](int64_t begin, int64_t end) {
    vd squares = {};
    for (int64_t at = begin; at < end; at += BLOCK)
      page.block(at, end - at < BLOCK ? end - at : BLOCK, rule, square ? &squares : nullptr);
    double total = 0;
    for (int i = 0; i < W; i++) total += squares[i];
    sums.data[begin / GRAIN] = total;
  });
  if (square) {
    *square = 0;
    for (int64_t p = 0; p < (n + GRAIN - 1) / GRAIN; p++) *square += sums.data[p];
  }
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// weight (n,): masters in fp32 where rest is null, else bf16 upper halves beside rest (n,) int16.
// m, v (n,): fp32 where the scales are null, else int8 and uint8 with a scale for each 128.
// grad (n,): bf16 if is_bf16, else fp32. copy (n,) bf16 or null: masters rounded to nearest even.
// square (1,) fp64 or null: of the gradient before it is scaled; not finite if an element is not.
// Elements before `middle` are multiplied by `keep` (decay), the others not.
PTM_EXPORT(adamw_page)(void* weight, int16_t* rest, void* m, void* v, float* m_scales,
                       float* v_scales, const void* grad, bf16* copy, double* square, int64_t n,
                       int64_t middle, int64_t is_bf16, double keep, double scale, double lerp,
                       double beta2, double rest2, double eps, double root2, double rate,
                       double back_root, double back_rate, double ahead_rate, int64_t threads) {
  Rule rule{float(scale),     float(lerp),      float(beta2), float(rest2), float(eps),
            float(root2),     float(rate),      float(back_root), float(back_rate),
            float(ahead_rate)};
  auto run = [&](auto* w, const auto* g) {
    using T = std::remove_pointer_t<decltype(w)>;
    using G = std::remove_const_t<std::remove_pointer_t<decltype(g)>>;
    return sweep(Page<T, G>{w, rest, m, v, m_scales, v_scales, g, copy, middle, n, float(keep)}, n,
                 rule, square, threads);
  };
  if (rest)
    return is_bf16 ? run((bf16*)weight, (const bf16*)grad)
                   : run((bf16*)weight, (const float*)grad);
  return is_bf16 ? run((float*)weight, (const bf16*)grad) : run((float*)weight, (const float*)grad);
}
