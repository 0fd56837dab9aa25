// rows x weights^T in fp32, where the instruction set has no products of bf16:
//
//   one or two rows, AVX2   codes become fp32 in registers (decode.h) and meet inputs; a group's
//                           scale multiplies its sum
//   else                    DEEP inputs of a panel become fp32 in L1, times their scale, and TALL
//                           rows pass over them (multiply.h). An fp16 scale times a code is exact.
#pragma once

#include "../common/multiply.h"
#include "decode.h"

#if !PTM_ISA_BF16

namespace PTM_NAMESPACE {

constexpr int64_t DEEP = 256, TALL = 96;   // inputs that stay in L1, rows in L2
constexpr int64_t ROWS = 5 * TALL;         // bounds what the rows take in fp32

#if PTM_ISA_AVX2

PTM_INLINE vf scales_of(const Packed& w, int64_t p, int64_t g, int half) {
  const int64_t at = (p * w.groups() + g) * PANEL + 8 * half;
  if (w.is_half)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)w.scale + at)));
  return load((const float*)w.scale + at);
}
PTM_INLINE vf zeros_of(const Packed& w, int64_t p, int64_t g, int half, float middle) {
  if (!w.zero) return vf{} + middle;
  const int8_t* at = w.zero + (p * w.groups() + g) * PANEL + 8 * half;
  return number(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at))) + middle;
}

template <int BITS>
void decode(const Decoder<BITS>& decoder, const Packed& w, int64_t p, int64_t from, int64_t depth,
            float* to) {
  using D = Decoder<BITS>;
  const uint8_t* codes = w.codes + p * w.panel_bytes() + from / D::INPUTS * D::BYTES;
  for (int64_t k = from; k < from + depth;) {
    const int64_t g = k / w.group;
    int64_t end = (g + 1) * w.group < from + depth ? (g + 1) * w.group : from + depth;
    vf scale[2], shift[2];
    for (int half = 0; half < 2; half++) {
      scale[half] = scales_of(w, p, g, half);
      shift[half] = -scale[half] * zeros_of(w, p, g, half, D::MIDDLE);
    }
    for (; k < end; k += D::INPUTS, codes += D::BYTES, to += D::INPUTS * PANEL)
      decoder.each(codes, [&](int i, int half, vf code) {
        store(to + i * PANEL + 8 * half, code * scale[half] + shift[half]);
      });
  }
}

// x: rows of fp32 times the decoder's factors; sums: of the rows' inputs by group
template <int BITS, int M, class F>
void few_rows(const float* x, int64_t stride, const float* sums, const Packed& w,
              const Decoder<BITS>& decoder, int64_t p, F take) {
  using D = Decoder<BITS>;
  constexpr int CHAINS = M == 1 ? 4 : 2;
  vf total[M][2] = {};
  const uint8_t* codes = w.codes + p * w.panel_bytes();
  const int64_t G = w.groups();
  for (int64_t g = 0, k = 0; g < G; g++) {
    const int64_t end = (g + 1) * w.group < w.K ? (g + 1) * w.group : w.K;
    vf part[M][2][CHAINS] = {};
    for (; k < end; k += D::INPUTS, codes += D::BYTES) {
      for (int64_t line = 0; line < D::BYTES; line += 64)
        __builtin_prefetch(codes + AHEAD + line);
      decoder.add(codes, x + k, stride, part);
    }
    for (int half = 0; half < 2; half++) {
      const vf scale = scales_of(w, p, g, half), zero = zeros_of(w, p, g, half, D::MIDDLE);
      for (int m = 0; m < M; m++)
        total[m][half] +=
            (D::template finish<CHAINS>(part[m][half]) - zero * sums[m * G + g]) * scale;
    }
  }
  for (int m = 0; m < M; m++) {
    alignas(64) float out[PANEL];
    store(out, total[m][0]);
    store(out + 8, total[m][1]);
    take(m, p * PANEL, out, outputs_of(w, p));
  }
}

#else

template <int BITS>
struct Decoder {
  explicit Decoder(const float*) {}
};

template <int BITS>
void decode(const Decoder<BITS>&, const Packed& w, int64_t p, int64_t from, int64_t depth,
            float* to) {
  float scale[PANEL], shift[PANEL] = {};
  int64_t last = -1;
  for (int64_t k = from; k < from + depth; k++, to += PANEL) {
    const int64_t g = k / w.group;
    if (g != last) {
      load_scales(w, p, last = g, scale);
      const int8_t* zero = w.zero ? w.zero + (p * w.groups() + g) * PANEL : nullptr;
      for (int64_t n = 0; zero && n < PANEL; n++) shift[n] = scale[n] * zero[n];
    }
    decode_input(w, p, k, to);
    for (int64_t n = 0; n < PANEL; n++) to[n] = to[n] * scale[n] - shift[n];
  }
}

#endif

// Up to ROWS rows of fp32 against panels [begin, end), at most GRAIN
template <int BITS, class F>
void many_rows(const float* x, int64_t stride, int64_t M, const Packed& w,
               const Decoder<BITS>& decoder, int64_t begin, int64_t end, F take) {
  alignas(64) float b[DEEP * PANEL], sums[TALL * GRAIN * PANEL];
  for (int64_t m0 = 0; m0 < M; m0 += TALL) {
    const int64_t rows = M - m0 < TALL ? M - m0 : TALL;
    for (int64_t k = 0; k < w.K; k += DEEP) {
      const int64_t depth = w.K - k < DEEP ? w.K - k : DEEP;
      for (int64_t p = begin; p < end; p++) {
        decode(decoder, w, p, k, depth, b);
        multiply(x + m0 * stride + k, stride, rows, depth, Columns{b}, sums + (p - begin) * PANEL,
                 GRAIN * PANEL, k > 0);
      }
    }
    for (int64_t m = 0; m < rows; m++)
      for (int64_t p = begin; p < end; p++)
        take(m0 + m, p * PANEL, sums + (m * GRAIN + p - begin) * PANEL, outputs_of(w, p));
  }
}

template <int BITS, class T, class F>
int wide_linear(const T* x, int64_t inputs, int64_t M, const Packed& w, int64_t threads, F take) {
  const int64_t stride = w.K + 16;  // rows 4 KiB apart would share a set of the L1 cache
  Scratch<float> rows((M < ROWS ? M : ROWS) * stride);
  if (!rows.data) return PTM_NO_MEMORY;
  const Decoder<BITS> decoder(w.values);
  for (int64_t m0 = 0; m0 < M; m0 += ROWS) {
    const int64_t count = M - m0 < ROWS ? M - m0 : ROWS;
    parallel_for(count, 8, threads, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) {
        float* to = rows.data + m * stride;
        for_lanes(inputs, [&](int64_t k, auto lanes) {
          store(to + k, load(x + (m0 + m) * inputs + k, lanes), lanes);
        });
        memset(to + inputs, 0, sizeof(float) * size_t(w.K - inputs));
      }
    });
#if PTM_ISA_AVX2
    if (M <= 2) {
      Scratch<float> sums(M * w.groups());
      if (!sums.data) return PTM_NO_MEMORY;
      for (int64_t m = 0; m < M; m++) {
        float* row = rows.data + m * stride;
        memset(sums.data + m * w.groups(), 0, sizeof(float) * size_t(w.groups()));
        for (int64_t k = 0; k < w.K; k++) {
          sums.data[m * w.groups() + k / w.group] += row[k];
          row[k] *= decoder.factor(k);
        }
      }
      parallel_for(w.panels(), GRAIN, threads, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++)
          if (M == 1)
            few_rows<BITS, 1>(rows.data, stride, sums.data, w, decoder, p, take);
          else
            few_rows<BITS, 2>(rows.data, stride, sums.data, w, decoder, p, take);
      });
      return PTM_OK;
    }
#endif
    auto from_m0 = [&](int64_t m, int64_t n, const float* out, int64_t outputs) {
      take(m0 + m, n, out, outputs);
    };
    parallel_for(w.panels(), GRAIN, threads, [&](int64_t begin, int64_t end) {
      many_rows<BITS>(rows.data, stride, count, w, decoder, begin, end, from_m0);
    });
  }
  return PTM_OK;
}

}  // namespace PTM_NAMESPACE
#endif
