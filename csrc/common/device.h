// What a CUDA kernel of csrc/<op>/cuda*.cu is written in. One source for two compilers: nvcc makes
// it run on a GPU, and g++ makes it run here, a block's threads as fibers (emulated.h), so that its
// indices, barriers and arithmetic can be tested where there is no GPU.
//
//   struct Body { static constexpr int THREADS; <arguments>; PTM_BODY void operator()() const; };
//   launch(Body{...}, blocks, bytes of shared memory, stream)      -> a Status
//
// Inside a body: thread_id(), block_id(), lane(), warp_id(); sync_block() for all threads of a
// block, sync_warp() for the 32 of a warp; shared_memory(); warp_sum and the like, which all 32
// lanes call and whose result all have; block_sum. No thread may leave before the last barrier.
// For tensor cores (tile.h has products made of them):
//
//   copy_async(to, from, is_there)   16 bytes to shared memory, zeros where there are none. Until
//                                    wait_copies they may or may not be there
//   commit_copies(), wait_copies<N>()   a thread's copies so far are a group; all but its last N
//                                    groups are there. For other threads' copies a barrier follows
//   load_matrices<IS_TURNED>(to, row)   four 8 x 8 matrices of bf16: lanes 8 i to 8 i + 7 name rows
//                                    of the i-th; lane l gets of row l / 4 two from 2 (l % 4) on,
//                                    IS_TURNED: of column l / 4
//   multiply_16x8x16(d, a, b)        d (16, 8) += a (16, 16) b (16, 8), in fp32. Of d and a a lane
//                                    has rows l / 4 and that + 8, of b column l / 4, of the other
//                                    side two from 2 (l % 4) on, and of a and b those + 8
//
// Blocks share nothing and come in any order: a sum over them is a second launch in fixed order, so
// results never depend on timing.
#pragma once

#include "ptm.h"

#if defined(__CUDACC__)
#include "on_device.h"
#else
#include "emulated.h"
#endif

namespace PTM_NAMESPACE {

// Sixteen bytes, the most that one instruction moves, and eight.
#if defined(__CUDACC__)
typedef float4 Floats4;
typedef uint4 Bytes16;
typedef uint2 Bytes8;
// The compiler takes some of the stores apart again; these are one instruction. Global memory only.
template <class All>
PTM_BODY void put_whole(void* to, All all) {
  __stwb(static_cast<All*>(to), all);
}
#else
template <class All>
PTM_BODY void put_whole(void* to, All all) {
  *static_cast<All*>(to) = all;
}
struct alignas(16) Floats4 {
  float x, y, z, w;
};
struct alignas(16) Bytes16 {
  uint32_t x, y, z, w;
};
struct alignas(8) Bytes8 {
  uint32_t x, y;
};
#endif

template <int ELEMENTS>
struct Width {
  static constexpr int N = ELEMENTS;
};

// f(Width<N>()): as many elements of T as fill sixteen bytes where rows of D and all pointers are
// multiples of that, else one.
template <class T, class F>
int by_width(int64_t D, bool is_aligned, F f) {
  constexpr int N = 16 / int(sizeof(T));
  return is_aligned && D % N == 0 ? f(Width<N>()) : f(Width<1>());
}

// N consecutive elements in global memory, as fp32. N is 1, or fills 8 or 16 bytes that are aligned.
PTM_BOTH float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
PTM_BOTH uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
PTM_BODY float low_half(uint32_t word) { return float_of(word << 16); }
PTM_BODY float high_half(uint32_t word) { return float_of(word & 0xffff0000u); }
PTM_BODY uint32_t halves(float low, float high) {
  return to_bf16(low).bits | uint32_t(to_bf16(high).bits) << 16;
}

template <int N>
PTM_BODY void load(const float* from, float* to) {
  if constexpr (N == 1) {
    to[0] = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const Floats4 all = *(const Floats4*)(from + i);
      to[i] = all.x, to[i + 1] = all.y, to[i + 2] = all.z, to[i + 3] = all.w;
    }
  }
}
template <int N>
PTM_BODY void load(const bf16* from, float* to) {
  if constexpr (N == 1) {
    to[0] = to_float(from[0]);
  } else if constexpr (N == 4) {
    const Bytes8 all = *(const Bytes8*)from;
    to[0] = low_half(all.x), to[1] = high_half(all.x);
    to[2] = low_half(all.y), to[3] = high_half(all.y);
  } else {
    static_assert(N == 8, "8 or 16 bytes");
    const Bytes16 all = *(const Bytes16*)from;
    to[0] = low_half(all.x), to[1] = high_half(all.x);
    to[2] = low_half(all.y), to[3] = high_half(all.y);
    to[4] = low_half(all.z), to[5] = high_half(all.z);
    to[6] = low_half(all.w), to[7] = high_half(all.w);
  }
}
template <int N>
PTM_BODY void store(float* to, const float* from) {
  if constexpr (N == 1) {
    to[0] = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      put_whole(to + i, Floats4{from[i], from[i + 1], from[i + 2], from[i + 3]});
  }
}
template <int N>
PTM_BODY void store(bf16* to, const float* from) {
  if constexpr (N == 1) {
    to[0] = to_bf16(from[0]);
  } else if constexpr (N == 4) {
    put_whole(to, Bytes8{halves(from[0], from[1]), halves(from[2], from[3])});
  } else {
    static_assert(N == 8, "8 or 16 bytes");
    put_whole(to, Bytes16{halves(from[0], from[1]), halves(from[2], from[3]),
                          halves(from[4], from[5]), halves(from[6], from[7])});
  }
}
PTM_BODY float as_stored(const float*, float x) { return x; }
PTM_BODY float as_stored(const bf16*, float x) { return to_float(to_bf16(x)); }

// Whether all of these pointers are multiples of 16; null ones are.
template <class... P>
bool aligned16(const P*... p) {
  return ((uintptr_t(p) | ... | 0) & 15) == 0;
}

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

PTM_BODY int lane() { return thread_id() & 31; }
PTM_BODY int warp_id() { return thread_id() >> 5; }

// Over the threads of a block of WARPS warps, in an order of their numbers; `room` of WARPS in
// shared memory, which may be used again after the next barrier.
template <int WARPS, class T>
PTM_BODY T block_sum(T x, T* room) {
  x = warp_sum(x);
  if (lane() == 0) room[warp_id()] = x;
  sync_block();
  T total = room[0];
#pragma unroll
  for (int i = 1; i < WARPS; i++) total += room[i];
  return total;
}

}  // namespace PTM_NAMESPACE
