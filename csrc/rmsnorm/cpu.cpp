// isa: portable avx2 avx512_bf16
// Residual add and RMSNorm of rows, and its backward: norm.h as an op.
#include "../common/norm.h"

using namespace PTM_NAMESPACE;

// x, residual (or null), y, s (with a residual): (rows, D), bf16 if is_bf16, else fp32; weight (D,)
// and rstd (rows,) fp32.
PTM_EXPORT(add_rmsnorm)(const void* x, const void* residual, const float* weight, void* y, void* s,
                        float* rstd, int64_t rows, int64_t D, int64_t is_bf16, double eps,
                        int64_t threads) {
  if (is_bf16)
    return norm_rows((const bf16*)x, (const bf16*)residual, weight, (bf16*)y, (bf16*)s, rstd, rows,
                     D, eps, threads);
  return norm_rows((const float*)x, (const float*)residual, weight, (float*)y, (float*)s, rstd,
                   rows, D, eps, threads);
}

// g, s, dsum (or null), ds: (rows, D) in the rows' type; weight, dweight (D,), rstd (rows,) fp32.
PTM_EXPORT(add_rmsnorm_backward)(const void* g, const void* s, const float* weight,
                                 const float* rstd, const void* dsum, void* ds, float* dweight,
                                 int64_t rows, int64_t D, int64_t is_bf16, int64_t threads) {
  if (is_bf16)
    return norm_backward((const bf16*)g, (const bf16*)s, weight, rstd, (const bf16*)dsum, (bf16*)ds,
                         dweight, rows, D, threads);
  return norm_backward((const float*)g, (const float*)s, weight, rstd, (const float*)dsum,
                       (float*)ds, dweight, rows, D, threads);
}
