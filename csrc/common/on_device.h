// device.h for nvcc: the words a kernel is written in, on a GPU.
#pragma once

#include <cuda_runtime.h>

#include "ptm.h"

#define PTM_BODY __device__ __forceinline__

namespace PTM_NAMESPACE {

PTM_BODY int thread_id() { return int(threadIdx.x); }
PTM_BODY int64_t block_id() { return int64_t(blockIdx.x); }
PTM_BODY void sync_block() { __syncthreads(); }
PTM_BODY void sync_warp() { __syncwarp(); }
// Ends the kernel and every later call on this device with an error.
PTM_BODY void fail() { __trap(); }

template <class T>
PTM_BODY T* shared_memory() {
  extern __shared__ uint4 ptm_shared[];
  return reinterpret_cast<T*>(ptm_shared);
}

template <class T>
PTM_BODY T from_lane(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <class T, class F>
PTM_BODY T warp_fold(T x, F f) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) x = f(x, __shfl_xor_sync(0xffffffffu, x, m));
  return x;
}
// Of the lanes that differ in the bits of MASK alone.
template <int MASK, class T>
PTM_BODY T part_sum(T x) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1)
    if (MASK & m) x += __shfl_xor_sync(0xffffffffu, x, m);
  return x;
}
// Of `lanes` neighbours, a power of two; all lanes call it with the same number.
template <class T, class F>
PTM_BODY T part_fold(int lanes, T x, F f) {
  for (int m = lanes >> 1; m > 0; m >>= 1) x = f(x, __shfl_xor_sync(0xffffffffu, x, m));
  return x;
}
// The lanes that have the same number, as bits.
PTM_BODY uint32_t alike(int x) { return __match_any_sync(0xffffffffu, x); }
PTM_BODY int count_bits(uint32_t x) { return __popc(x); }

template <class T>
PTM_BODY T warp_sum(T x) {
  return warp_fold(x, [](T a, T b) { return a + b; });
}
PTM_BODY float warp_max(float x) {
  return warp_fold(x, [](float a, float b) { return fmaxf(a, b); });
}
PTM_BODY float warp_min(float x) {
  return warp_fold(x, [](float a, float b) { return fminf(a, b); });
}

// Rounded once each; a product and a sum are never made one.
PTM_BODY float times(float a, float b) { return __fmul_rn(a, b); }
PTM_BODY float plus(float a, float b) { return __fadd_rn(a, b); }
PTM_BODY float over(float a, float b) { return __fdiv_rn(a, b); }
PTM_BODY float root(float a) { return __fsqrt_rn(a); }
PTM_BODY float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PTM_BODY float power2(float x) { return exp2f(x); }
PTM_BODY float power_e(float x) { return expf(x); }
PTM_BODY float from_half(uint16_t x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
  return wide;
}

template <class Body>
__global__ void __launch_bounds__(Body::THREADS) run(const Body body) {
  body();
}

template <class Body>
int launch(const Body& body, int64_t blocks, int64_t shared_bytes, void* stream) {
  if (blocks <= 0) return PTM_OK;
  if (blocks > INT32_MAX) return PTM_BAD_SHAPE;
  if (shared_bytes > 48 << 10 &&
      cudaFuncSetAttribute(run<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           int(shared_bytes)) != cudaSuccess) {
    cudaGetLastError();
    return PTM_BAD_SHAPE;
  }
  run<Body><<<unsigned(blocks), Body::THREADS, size_t(shared_bytes), cudaStream_t(stream)>>>(body);
  return cudaGetLastError() == cudaSuccess ? PTM_OK : PTM_LAUNCH;
}

// Memory of the stream's order. Test it before use: nullptr is PTM_NO_MEMORY.
template <class T>
struct DeviceScratch {
  DeviceScratch(int64_t n, void* on) : data(nullptr), stream(on) {
    void* memory = nullptr;
    if (cudaMallocAsync(&memory, sizeof(T) * size_t(n ? n : 1), cudaStream_t(on)) == cudaSuccess)
      data = static_cast<T*>(memory);
    else
      cudaGetLastError();
  }
  ~DeviceScratch() {
    if (data) cudaFreeAsync(data, cudaStream_t(stream));
  }
  DeviceScratch(const DeviceScratch&) = delete;
  DeviceScratch& operator=(const DeviceScratch&) = delete;
  T* data;
  void* stream;
};

}  // namespace PTM_NAMESPACE
