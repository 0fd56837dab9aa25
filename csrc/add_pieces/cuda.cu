// The ranks' pieces of a gradient added up and put into a page or added to it, in one visit, as
// cpu.cpp has it: the same sums, bit for bit. Squares are added in fp64 by blocks of threads, and
// these by chunk in a second launch.
#include "../common/squares.h"

namespace PTM_NAMESPACE {

constexpr int64_t GRAIN = 1 << 12;  // elements of a block of threads

// N elements at once where everything lies on 16 bytes, but at the ragged end.
template <class T, int N>
struct Add {
  static constexpr int THREADS = 256;
  const T* pieces;
  float* total;
  double* squares;  // of each block of threads, or null
  int64_t num_pieces, stride, C;
  bool replaces;

  PTM_BODY void operator()() const {
    const int64_t begin = block_id() * GRAIN, end = begin + GRAIN < C ? begin + GRAIN : C;
    double square = 0;
    for (int64_t i = begin + thread_id() * N; i < end; i += THREADS * N) {
      if (i + N <= end)
        add<N>(i, square);
      else
        for (int64_t at = i; at < end; at++) add<1>(at, square);
    }
    if (!squares) return;
    square = block_sum<THREADS / 32>(square, shared_memory<double>());
    if (thread_id() == 0) squares[block_id()] = square;
  }

  template <int COUNT>
  PTM_BODY void add(int64_t i, double& square) const {
    float sum[COUNT], more[COUNT];
    load<COUNT>(pieces + i, sum);
    for (int64_t n = 1; n < num_pieces; n++) {
      load<COUNT>(pieces + n * stride + i, more);
#pragma unroll
      for (int j = 0; j < COUNT; j++) sum[j] += more[j];
    }
    if (!replaces) {
      load<COUNT>(total + i, more);
#pragma unroll
      for (int j = 0; j < COUNT; j++) sum[j] = more[j] + sum[j];
    }
    store<COUNT>(total + i, sum);
    if (!squares) return;
#pragma unroll
    for (int j = 0; j < COUNT; j++) square += double(sum[j]) * double(sum[j]);
  }
};

template <class T>
int add_pieces(const T* pieces, int64_t N, int64_t stride, float* total, int64_t C, bool replaces,
               double* chunk_sums, int64_t chunk, void* stream) {
  if (chunk_sums && chunk % GRAIN) return PTM_BAD_SHAPE;
  const int64_t blocks = divided_up(C, GRAIN);
  DeviceScratch<double> squares(chunk_sums ? blocks : 0, stream);
  if (!squares.data) return PTM_NO_MEMORY;
  double* each = chunk_sums ? squares.data : nullptr;
  const int status = by_width<T>(N > 1 ? stride : 0, aligned16(pieces, total), [&](auto width) {
    using Body = Add<T, decltype(width)::N>;
    return launch(Body{pieces, total, each, N, stride, C, replaces}, blocks, 64, stream);
  });
  if (status || !chunk_sums) return status;
  return add_squares(each, blocks, chunk / GRAIN, chunk_sums, divided_up(C, chunk), stream);
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// As cpu.cpp's; `squares` is on the device too.
PTM_EXPORT(add_pieces)(const void* pieces, int64_t N, int64_t stride, float* total, int64_t C,
                       int64_t replaces, double* squares, int64_t chunk, int64_t is_bf16,
                       void* stream) {
  const bool whole = replaces != 0;
  if (is_bf16)
    return add_pieces((const bf16*)pieces, N, stride, total, C, whole, squares, chunk, stream);
  return add_pieces((const float*)pieces, N, stride, total, C, whole, squares, chunk, stream);
}
