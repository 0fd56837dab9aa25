// Weights to their nearest on a grid and back, as `Grid.nearest` of ptm/quant/grid.py has it, and
// the scale of a group as its `scales` finds it: each step is the reference's in fp32 (a true
// division, ties to even), so the bits are the same on every instruction set and on a GPU. A scale
// is infinite as a divisor where it is 0.
//
// V is a vector of vec.h, or a float.
#pragma once

#include "ptm.h"

namespace PTM_NAMESPACE {

constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number

template <class V>
using WholeOf = decltype((V{} < V{}) + 0);  // int32, as many

template <class To, class From>
PTM_BOTH To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}
template <class V>
PTM_BOTH V all_of(float x) {
  if constexpr (sizeof(V) == sizeof x)
    return x;
  else
    return V{} + x;
}
template <class V>
PTM_BOTH V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
PTM_BOTH V smaller(V a, V b) {
  return a < b ? a : b;
}
template <class V>
PTM_BOTH V nearest(V x) {
  return (x + SHIFT) - SHIFT;
}
template <class V>
PTM_BOTH V divisor_of(V scale) {
  return scale != V{} ? scale : all_of<V>(__builtin_inff());
}

struct Integers {
  float most;  // the largest code

  template <class V>
  struct Group {
    V divisor, scale, zero, most;

    PTM_BOTH V operator()(V w) const {
      const V code = nearest(w / divisor) + zero;
      return scale * (smaller(most, larger(V{}, code)) - zero);
    }
  };

  template <class V>
  PTM_BOTH Group<V> with(V scale, V zero) const {
    return {divisor_of(scale), scale, zero, all_of<V>(most)};
  }
};

// Sign, 5 - M bits of exponent, M of mantissa: values of a binade are whole multiples of a step.
struct Floats {
  int mantissa;

  PTM_BOTH int bias() const { return (1 << (4 - mantissa)) - 1; }
  PTM_BOTH int top() const { return (1 << (5 - mantissa)) - 1 - bias(); }  // of the last binade
  PTM_BOTH float largest() const {
    const float two = float(1 << mantissa);
    return (2 * two - 1) / two * float(1 << top());
  }

  template <class V>
  struct Group {
    V divisor, scale, largest;
    int mantissa, lowest, top;

    PTM_BOTH V operator()(V w) const {
      typedef WholeOf<V> I;
      const I bits = same_bits<I>(w / divisor), sign = I{} + int32_t(0x80000000u);
      const V size = same_bits<V>(bits & ~sign);
      I binade = (same_bits<I>(size) >> 23) - 127;
      binade = smaller(larger(binade, I{} + lowest), I{} + top);
      const V steps = nearest(size * same_bits<V>((mantissa - binade + 127) << 23));
      const V value = smaller(largest, steps * same_bits<V>((binade - mantissa + 127) << 23));
      return scale * same_bits<V>(same_bits<I>(value) | (value > V{} ? bits & sign : I{}));
    }
  };

  template <class V>
  PTM_BOTH Group<V> with(V scale, V) const {
    return {divisor_of(scale), scale, all_of<V>(largest()), mantissa, 1 - bias(), top()};
  }
};

// Round to nearest fp16, ties to even, and back. Takes finite numbers; too large ones are infinite.
PTM_BOTH float as_half(float x) {
  uint32_t bits = same_bits<uint32_t>(x);
  const uint32_t sign = bits & 0x80000000u;
  bits ^= sign;
  if (bits < 0x38800000u) {  // below 2^-14: whole multiples of 2^-24, the last bit of 2^-1
    bits = same_bits<uint32_t>((same_bits<float>(bits) + 0.5f) - 0.5f);
  } else {
    bits += 0x0fffu + ((bits >> 13) & 1);
    bits = bits >= 0x47800000u ? 0x7f800000u : bits & ~0x1fffu;
  }
  return same_bits<float>(bits | sign);
}

// Grids that make the scale of a group from its least and its largest weight, 0 among them.
struct ScaledIntegers : Integers {
  bool symmetric;

  PTM_BOTH float span(float low, float high) const {
    return symmetric ? (-low > high ? -low : high) / (most / 2) : (high - low) / most;
  }
  template <class V>
  PTM_BOTH Group<V> of(float scale, float low) const {
    float zero = (most + 1) / 2;
    if (!symmetric) {
      zero = scale > 0 ? nearest(-low / scale) : 0;
      zero = zero < 0 ? 0 : zero > most ? most : zero;
    }
    return with(all_of<V>(scale), all_of<V>(zero));
  }
};

struct ScaledFloats : Floats {
  PTM_BOTH float span(float low, float high) const {
    return (-low > high ? -low : high) / largest();
  }
  template <class V>
  PTM_BOTH Group<V> of(float scale, float) const {
    return with(all_of<V>(scale), V{});
  }
};

// f(grid) for the grid of so many bits.
template <class F>
int with_scaled_grid(int64_t bits, int64_t mantissa, bool symmetric, F f) {
  if (bits == 4 || bits == 8) return f(ScaledIntegers{{float((1 << bits) - 1)}, symmetric});
  if (bits != 6 || mantissa < 2 || mantissa > 3 || !symmetric) return PTM_BAD_SHAPE;
  return f(ScaledFloats{{int(mantissa)}});
}

}  // namespace PTM_NAMESPACE
