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

PTM_BODY uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }
PTM_BODY void copy_async(void* to, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(is_there ? 16 : 0)
               : "memory");
}
PTM_BODY void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int N>
PTM_BODY void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}
template <bool IS_TURNED>
PTM_BODY void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (IS_TURNED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
PTM_BODY void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
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
