// Weights to their nearest on a grid and back, as `Grid.nearest` of ptm/quant/grid.py has it: each
// step is the reference's in fp32 (a true division, ties to even), so the bits are the same on every
// instruction set. A scale is infinite as a divisor where it is 0.
#pragma once

#include "vec.h"

namespace PTM_NAMESPACE {

constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number

PTM_INLINE vf nearest(vf x) { return (x + SHIFT) - SHIFT; }
PTM_INLINE vf divisor_of(vf scale) {
  return scale != splat(0) ? scale : splat(__builtin_inff());
}

struct Integers {
  float most;  // the largest code

  struct Group {
    vf divisor, scale, zero, most;

    PTM_INLINE vf operator()(vf w) const {
      vf code = nearest(w / divisor) + zero;
      return scale * (vmin(most, vmax(splat(0), code)) - zero);
    }
  };

  PTM_INLINE Group with(vf scale, vf zero) const {
    return {divisor_of(scale), scale, zero, splat(most)};
  }
};

// Sign, 5 - M bits of exponent, M of mantissa: values of a binade are whole multiples of a step.
struct Floats {
  int mantissa;

  int bias() const { return (1 << (4 - mantissa)) - 1; }
  int top() const { return (1 << (5 - mantissa)) - 1 - bias(); }  // exponent of the last binade
  float largest() const {
    const float two = float(1 << mantissa);
    return (2 * two - 1) / two * float(1 << top());
  }

  struct Group {
    vf divisor, scale, largest;
    int mantissa, lowest, top;

    PTM_INLINE vf operator()(vf w) const {
      vf ratio = w / divisor;
      vf size = (vf)((vu)ratio & 0x7fffffffu);
      const vi bound = vi{} + lowest, last = vi{} + top;
      vi binade = ((vi)size >> 23) - 127;
      binade = binade < bound ? bound : binade;
      binade = binade > last ? last : binade;
      vf steps = nearest(size * (vf)((mantissa - binade + 127) << 23));
      vf value = vmin(largest, steps * (vf)((binade - mantissa + 127) << 23));
      vu sign = value > splat(0) ? (vu)ratio & 0x80000000u : vu{};
      return scale * (vf)((vu)value | sign);
    }
  };

  PTM_INLINE Group with(vf scale, vf) const {
    return {divisor_of(scale), scale, splat(largest()), mantissa, 1 - bias(), top()};
  }
};

}  // namespace PTM_NAMESPACE
