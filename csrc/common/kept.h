// Where a compiler that makes one fused operation of a product and a sum must not.
#pragma once

#include "vec.h"

namespace PTM_NAMESPACE {

PTM_INLINE vf kept(vf x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

}  // namespace PTM_NAMESPACE
