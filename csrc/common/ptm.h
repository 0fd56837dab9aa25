// What every kernel includes: the export of an op for the instruction set being compiled, bf16,
// status codes and parallel_for. See docs/kernels.md.
//
// A file csrc/<op>/cpu*.cpp is compiled once per instruction set with one of PTM_ISA=0, 1, 2, 3, 4:
//
//   PTM_ISA_PORTABLE  1 only in the portable build (x86-64-v2, or what another CPU has)
//   PTM_ISA_AVX2      1 from the avx2 build up: AVX2, FMA, F16C exist
//   PTM_ISA_AVX512    1 from the avx512 build up: AVX-512 F/CD/BW/DQ/VL exist
//   PTM_ISA_BF16      1 in the avx512_bf16 and the amx build: AVX-512 BF16/VNNI/VBMI exist too
//   PTM_ISA_AMX       1 only in the amx build: AMX tiles for bf16 and int8 exist too
//
// A line `// isa: portable avx2 avx512_bf16` at the head of a file limits it to these; without an
// object for the machine's own set the next lower one serves. A file that is not named cpu*.cpp is
// compiled once, portably. A file csrc/<op>/cuda*.cu is compiled by nvcc (device.h).
#pragma once

#include <stdint.h>
#include <string.h>

#include <new>

#ifndef PTM_ISA
#define PTM_ISA 0
#endif
#define PTM_ISA_PORTABLE (PTM_ISA == 0)
#define PTM_ISA_AVX2 (PTM_ISA >= 1)
#define PTM_ISA_AVX512 (PTM_ISA >= 2)
#define PTM_ISA_BF16 (PTM_ISA >= 3)
#define PTM_ISA_AMX (PTM_ISA >= 4)

#if defined(__CUDACC__)
#define PTM_ISA_NAME cuda
#elif PTM_ISA_AMX
#define PTM_ISA_NAME amx
#elif PTM_ISA_BF16
#define PTM_ISA_NAME avx512_bf16
#elif PTM_ISA_AVX512
#define PTM_ISA_NAME avx512
#elif PTM_ISA_AVX2
#define PTM_ISA_NAME avx2
#else
#define PTM_ISA_NAME portable
#endif

#define PTM_JOIN2(a, b) a##b
#define PTM_JOIN(a, b) PTM_JOIN2(a, b)
// Everything lives in a namespace of its source and instruction set, which csrc/build.py names: the
// linker merges inline functions and templates of one name, and a machine would meet the wrong one.
#ifndef PTM_NAMESPACE
#define PTM_NAMESPACE PTM_JOIN(ptm_, PTM_ISA_NAME)
#endif

// int ptm_<op>_<isa>(...): arguments are pointers, int64_t and double; the number of threads comes
// last, of ptm_<op>_cuda the stream; returns a Status.
#define PTM_EXPORT_AS(op, isa) \
  extern "C" __attribute__((visibility("default"))) int PTM_JOIN(ptm_##op##_, isa)
#define PTM_EXPORT(op) PTM_EXPORT_AS(op, PTM_ISA_NAME)

// The same numbers as STATUS in ptm/kernels/native.py.
enum PtmStatus { PTM_OK = 0, PTM_NO_MEMORY = 1, PTM_BAD_SHAPE = 2, PTM_TIMEOUT = 3, PTM_SYSTEM = 4, PTM_LAUNCH = 5 };

// csrc/common/threads.cpp: run part(context, i) for i in [0, parts) on at most `threads` threads,
// the caller among them; returns when all are done. A pool that is busy (two callers at once, or a
// call from inside a part) runs the parts in the caller.
extern "C" void ptm_run_parts(int64_t parts, int64_t threads, void (*part)(void*, int64_t),
                              void* context);

// A function for the host and, where nvcc compiles it, for the device.
#if defined(__CUDACC__)
#define PTM_BOTH __host__ __device__ __forceinline__
#else
#define PTM_BOTH inline __attribute__((always_inline))
#endif

namespace PTM_NAMESPACE {

struct bf16 {
  uint16_t bits;
};

PTM_BOTH float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}
PTM_BOTH float to_float(float x) { return x; }

// Round to nearest, ties to even; a NaN stays one.
PTM_BOTH bf16 to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

// Cut [0, n) into parts of `grain` (the last may be shorter) and run f(begin, end) for each. The
// cut depends on n and grain only, so a sum kept per part is the same for any number of threads.
template <class F>
void parallel_for(int64_t n, int64_t grain, int64_t threads, F f) {
  if (n <= 0) return;
  struct Context {
    F* f;
    int64_t n, grain;
  } context{&f, n, grain};
  auto part = [](void* c, int64_t i) {
    auto* with = static_cast<Context*>(c);
    int64_t begin = i * with->grain, end = begin + with->grain;
    (*with->f)(begin, end < with->n ? end : with->n);
  };
  ptm_run_parts((n + grain - 1) / grain, threads, part, &context);
}

// Scratch memory on a cache line. Test it before use: nullptr is PTM_NO_MEMORY.
template <class T>
struct Scratch {
  explicit Scratch(int64_t n)
      : data(static_cast<T*>(::operator new(sizeof(T) * size_t(n ? n : 1), std::align_val_t(64),
                                            std::nothrow))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data;
};

}  // namespace PTM_NAMESPACE
