// Residual add and RMSNorm of rows, and its backward, as cpu.cpp has them: the same roundings, in
// one visit of memory each. The forward gives a warp a row. The backward gives a block a part of the
// rows, a row at a time: a thread has the same columns of each, so the weight's gradient is summed
// in shared memory without a word between threads.
#include "../common/device.h"

namespace PTM_NAMESPACE {

constexpr int64_t MAX_PARTS = 256;  // of the backward; each keeps a row of fp32 sums

template <class T, int N>
struct Forward {
  static constexpr int THREADS = 128;
  const T *x, *residual;
  const float* weight;
  T *y, *s;
  float* rstd;
  int64_t rows, D;
  float eps;

  PTM_BODY void operator()() const {
    const int64_t row = block_id() * (THREADS / 32) + warp_id();
    if (row >= rows) return;  // the whole warp; no barrier of the block follows
    const T* from = x + row * D;
    float squares = 0, a[N], b[N];
    for (int64_t i = lane() * N; i < D; i += 32 * N) {
      load<N>(from + i, a);
      if (residual) {
        load<N>(residual + row * D + i, b);
#pragma unroll
        for (int j = 0; j < N; j++) a[j] = as_stored(x, a[j] + b[j]);
        store<N>(s + row * D + i, a);
      }
#pragma unroll
      for (int j = 0; j < N; j++) squares += a[j] * a[j];
    }
    const float scale = over(1.0f, root(warp_sum(squares) / float(D) + eps));
    if (lane() == 0) rstd[row] = scale;
    if (residual) from = s + row * D;  // a lane reads what it wrote itself
    for (int64_t i = lane() * N; i < D; i += 32 * N) {
      load<N>(from + i, a);
      load<N>(weight + i, b);
#pragma unroll
      for (int j = 0; j < N; j++) a[j] = as_stored(x, a[j] * scale) * b[j];
      store<N>(y + row * D + i, a);
    }
  }
};

template <class T, int N>
struct Backward {
  static constexpr int THREADS = 256;
  const T *g, *s;
  const float *weight, *rstd;
  const T* dsum;
  T* ds;
  float* parts;  // (parts, D)
  int64_t rows, D, grain;

  static PTM_BODY void keep(float* shared, const float* from) {
#pragma unroll
    for (int j = 0; j < N; j++) shared[j] = from[j];
  }

  PTM_BODY void operator()() const {
    float *room = shared_memory<float>(), *mine = room + 2 * (THREADS / 32);
    float u[N], d[N], w[N], sum[N];
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] = 0;
    for (int64_t i = thread_id() * N; i < D; i += THREADS * N) keep(mine + i, sum);
    const int64_t first = block_id() * grain, end = first + grain < rows ? first + grain : rows;
    for (int64_t row = first; row < end; row++) {
      const float scale = rstd[row];
      float along = 0;
      for (int64_t i = thread_id() * N; i < D; i += THREADS * N) {
        load<N>(g + row * D + i, d);
        load<N>(s + row * D + i, u);
        load<N>(weight + i, w);
        load<N>(mine + i, sum);
#pragma unroll
        for (int j = 0; j < N; j++) {
          const float by_weight = d[j] * (u[j] * scale);
          sum[j] += by_weight;
          along += by_weight * w[j];
        }
        keep(mine + i, sum);
      }
      // Two rooms in turn: between two uses of one lies the barrier of the other.
      const float mean = block_sum<THREADS / 32>(along, room + (row & 1) * (THREADS / 32)) / float(D);
      for (int64_t i = thread_id() * N; i < D; i += THREADS * N) {
        load<N>(g + row * D + i, d);
        load<N>(s + row * D + i, u);
        load<N>(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] = 0;
        if (dsum) load<N>(dsum + row * D + i, sum);
#pragma unroll
        for (int j = 0; j < N; j++)
          sum[j] += (d[j] * w[j] - u[j] * scale * mean) * scale;
        store<N>(ds + row * D + i, sum);
      }
    }
    for (int64_t i = thread_id() * N; i < D; i += THREADS * N) {
      load<N>(mine + i, sum);
      store<N>(parts + block_id() * D + i, sum);
    }
  }
};

// dweight = sum of the parts: each eighth of them by a warp, for 32 columns, then the eight
struct AddParts {
  static constexpr int THREADS = 256;
  const float* parts;
  float* dweight;
  int64_t count, D;

  PTM_BODY void operator()() const {
    float* room = shared_memory<float>();  // (8, 32)
    const int64_t i = block_id() * 32 + lane();
    float total = 0;
    if (i < D)
      for (int64_t p = warp_id(); p < count; p += 8) total += parts[p * D + i];
    room[thread_id()] = total;
    sync_block();
    if (warp_id() != 0 || i >= D) return;
    for (int w = 1; w < 8; w++) total += room[32 * w + lane()];
    dweight[i] = total;
  }
};

template <class T, int N>
int forward(const T* x, const T* residual, const float* weight, T* y, T* s, float* rstd,
            int64_t rows, int64_t D, double eps, void* stream) {
  return launch(Forward<T, N>{x, residual, weight, y, s, rstd, rows, D, float(eps)},
                divided_up(rows, 4), 0, stream);
}

template <class T, int N>
int backward(const T* g, const T* s, const float* weight, const float* rstd, const T* dsum, T* ds,
             float* dweight, int64_t rows, int64_t D, void* stream) {
  const int64_t grain = rows > MAX_PARTS ? divided_up(rows, MAX_PARTS) : 1;
  const int64_t count = divided_up(rows, grain);
  DeviceScratch<float> parts(count * D, stream);
  if (!parts.data) return PTM_NO_MEMORY;
  const int64_t shared = int64_t(sizeof(float)) * (2 * Backward<T, N>::THREADS / 32 + D);
  const int status = launch(
      Backward<T, N>{g, s, weight, rstd, dsum, ds, parts.data, rows, D, grain}, count, shared, stream);
  if (status) return status;
  return launch(AddParts{parts.data, dweight, count, D}, divided_up(D, 32), 1024, stream);
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

namespace {
template <class T>
int forward_of(const T* x, const T* residual, const float* weight, T* y, T* s, float* rstd,
               int64_t rows, int64_t D, double eps, void* stream) {
  return by_width<T>(D, aligned16(x, residual, weight, y, s), [&](auto width) {
    return forward<T, width.N>(x, residual, weight, y, s, rstd, rows, D, eps, stream);
  });
}
template <class T>
int backward_of(const T* g, const T* s, const float* weight, const float* rstd, const T* dsum,
                T* ds, float* dweight, int64_t rows, int64_t D, void* stream) {
  return by_width<T>(D, aligned16(g, s, weight, dsum, ds), [&](auto width) {
    return backward<T, width.N>(g, s, weight, rstd, dsum, ds, dweight, rows, D, stream);
  });
}
}  // namespace

PTM_EXPORT(add_rmsnorm)(const void* x, const void* residual, const float* weight, void* y, void* s,
                        float* rstd, int64_t rows, int64_t D, int64_t is_bf16, double eps,
                        void* stream) {
  if (is_bf16)
    return forward_of((const bf16*)x, (const bf16*)residual, weight, (bf16*)y, (bf16*)s, rstd, rows,
                      D, eps, stream);
  return forward_of((const float*)x, (const float*)residual, weight, (float*)y, (float*)s, rstd,
                    rows, D, eps, stream);
}

PTM_EXPORT(add_rmsnorm_backward)(const void* g, const void* s, const float* weight,
                                 const float* rstd, const void* dsum, void* ds, float* dweight,
                                 int64_t rows, int64_t D, int64_t is_bf16, void* stream) {
  if (is_bf16)
    return backward_of((const bf16*)g, (const bf16*)s, weight, rstd, (const bf16*)dsum, (bf16*)ds,
                       dweight, rows, D, stream);
  return backward_of((const float*)g, (const float*)s, weight, rstd, (const float*)dsum, (float*)ds,
                     dweight, rows, D, stream);
}
