// What `ptm bench kernels` holds the ops against: bytes and operations a second of this machine.
#include "../common/amx.h"
#include "../common/vec.h"

#if PTM_ISA_AVX512
#define PTM_IN_REGISTER(x) "+v"(x)
#elif defined(__x86_64__)
#define PTM_IN_REGISTER(x) "+x"(x)
#else
#define PTM_IN_REGISTER(x) "+m"(x)
#endif

namespace PTM_NAMESPACE {

constexpr int CHAINS = 10;  // multiply-adds at once: latency 4 x 2 a cycle, and some

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

// a = b + 3 c over n fp32 (STREAM's triad): 12 n bytes.
PTM_EXPORT(roofline_triad)(float* a, const float* b, const float* c, int64_t n, int64_t threads) {
  parallel_for(n, 1 << 16, threads, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t i, auto lanes) {
      store(a + begin + i, load(b + begin + i, lanes) + load(c + begin + i, lanes) * 3.0f, lanes);
    });
  });
  return PTM_OK;
}

// `turns` turns of the fastest multiply-add there is; flops[0] is the operations done: bf16 with
// AMX, fp32 without.
PTM_EXPORT(roofline_multiply)(double* flops, int64_t turns, int64_t threads) {
  parallel_for(threads, 1, threads, [&](int64_t, int64_t) {
#if PTM_ISA_AMX  // 2 x 2 tiles: four products of 16 x 16 x 32
    alignas(64) static const char zeros[1024] = {};
    Tiles tiles;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t t = 0; t < turns; t++) {
      _tile_loadd(4, zeros, 64);
      _tile_loadd(5, zeros, 64);
      _tile_loadd(6, zeros, 64);
      _tile_loadd(7, zeros, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
#else
    vf sums[CHAINS] = {}, a = splat(0.5f);
    for (int64_t t = 0; t < turns; t++)
      for (int i = 0; i < CHAINS; i++) {
        sums[i] = sums[i] * a + a;
        __asm__ volatile("" : PTM_IN_REGISTER(sums[i]));  // or the compiler sees that all are alike
      }
#endif
  });
#if PTM_ISA_AMX
  flops[0] = double(threads) * double(turns) * 4 * 2 * 16 * 16 * 32;
#else
  flops[0] = double(threads) * double(turns) * CHAINS * 2 * W;
#endif
  return PTM_OK;
}
