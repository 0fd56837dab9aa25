// isa: portable avx2 avx512_bf16
// The ranks' pieces of a gradient added up and put into a page or added to it, in one visit, and
// the sums of squares of what is there then, one for each `chunk` elements.
//
//   pieces (N, C) fp32 or bf16, rows `stride` apart  ->  total (C,) fp32
//
// Additions of an element are in fp32, one rank after another and `total` last, so the bits are
// those of torch on every instruction set; squares are added in fp64.
#include "../common/vec.h"

namespace PTM_NAMESPACE {

constexpr int64_t GRAIN = 1 << 14;  // of a part, in elements
typedef double vd __attribute__((vector_size(8 * W)));

template <class T>
int add_pieces(const T* pieces, int64_t N, int64_t stride, float* total, int64_t C, bool replaces,
               double* chunk_sums, int64_t chunk, int64_t threads) {
  if (chunk_sums && chunk % GRAIN) return PTM_BAD_SHAPE;
  const int64_t parts = (C + GRAIN - 1) / GRAIN;
  Scratch<double> sums(parts);
  if (!sums.data) return PTM_NO_MEMORY;
  parallel_for(C, GRAIN, threads, [&](int64_t begin, int64_t end) {
    vd squares = {};
    for_lanes(end - begin, [&](int64_t i, auto lanes) {
      const int64_t at = begin + i;
      vf sum = load(pieces + at, lanes);
      for (int64_t n = 1; n < N; n++) sum += load(pieces + n * stride + at, lanes);
      if (!replaces) sum += load(total + at, lanes);
      store(total + at, sum, lanes);
      if (chunk_sums) {
        vd wide = __builtin_convertvector(sum, vd);
        squares += wide * wide;
      }
    });
    double found = 0;
    for (int i = 0; i < W; i++) found += squares[i];
    sums.data[begin / GRAIN] = found;
  });
  for (int64_t p = 0; chunk_sums && p < parts; p++) {
    double& sum = chunk_sums[p * GRAIN / chunk];
    sum = p * GRAIN % chunk ? sum + sums.data[p] : sums.data[p];
  }
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// N and C at least 1; squares (C / chunk, rounded up) fp64 or null; chunk a multiple of 16,384.
PTM_EXPORT(add_pieces)(const void* pieces, int64_t N, int64_t stride, float* total, int64_t C,
                       int64_t replaces, double* squares, int64_t chunk, int64_t is_bf16,
                       int64_t threads) {
  const bool whole = replaces != 0;
  if (is_bf16)
    return add_pieces((const bf16*)pieces, N, stride, total, C, whole, squares, chunk, threads);
  return add_pieces((const float*)pieces, N, stride, total, C, whole, squares, chunk, threads);
}
