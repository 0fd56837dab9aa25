// Up to four rows against a panel of packed weights (packed.h), by a block of threads on a GPU.
//
// A warp has 128 inputs of the panel at a time, in turns with the other warps. Four lanes share a
// piece, each with 4 of the 16 outputs; what a lane reads of codes (4 bits: 16 bytes, 8 inputs;
// 6 bits: three times 16 bytes, 16 inputs; 8 bits: 4 bytes of each of 4 inputs) it reads for all 128
// inputs first, so that memory has much to do at once. A code becomes fp32 in a register, less its
// zero point, exactly; there it meets all rows. Sums are fp32, and a group's scale multiplies the
// sums of its inputs. Order of sums: inputs of a lane, lanes, warps; of nothing that varies.
#pragma once

#include "../common/device.h"

namespace PTM_NAMESPACE {

constexpr int PANEL = 16, ROWS = 4;

struct Weights {
  const uint8_t* codes;
  const void* scale;
  const int8_t* zero;
  const float* values;
  int64_t N, K, group;
  bool is_half;

  PTM_BOTH int64_t panels() const { return (N + PANEL - 1) / PANEL; }
  PTM_BOTH int64_t groups() const { return (K + group - 1) / group; }
  bool fits() const {
    return K % 32 == 0 && K <= INT32_MAX && group % 32 == 0 && group >= 32 &&
           aligned16(codes, scale, zero);
  }
};

// Where a row begins, and how its inputs may be read: whole: eight at a time.
template <class T>
struct Inputs {
  int64_t count;
  bool is_whole;

  Inputs(const T* rows, int64_t each) : count(each), is_whole(each % 8 == 0 && aligned16(rows)) {}

  // N inputs from k on, zeros behind the last
  template <int N>
  PTM_BODY void read(const T* row, int64_t k, float* to) const {
    if (is_whole) {
#pragma unroll
      for (int i = 0; i < N; i++) to[i] = 0;
      if (k < count) load<N>(row + k, to);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) to[i] = k + i < count ? to_float(row[k + i]) : 0;
    }
  }
};

template <class T, int BITS>
struct Few {
  static constexpr int THREADS = 256, WARPS = THREADS / 32, TURN = 128;
  static constexpr int INPUTS = BITS == 8 ? 4 : BITS == 6 ? 16 : 8;  // of a piece
  static constexpr int AT_ONCE = BITS == 8 ? 4 : 8;                  // numbers of an output
  static constexpr int STEP = INPUTS * 8, STEPS = TURN / STEP;       // inputs of 32 lanes
  static constexpr int WORDS = BITS == 6 ? 12 : 4;
  static constexpr int TABLE = BITS == 6 ? 64 : 0;
  static constexpr int SHARED = TABLE + WARPS * ROWS * PANEL;  // floats; then the caller's

  static PTM_BODY void begin(const Weights& w) {
    if (TABLE == 0) return;
    if (thread_id() < TABLE) shared_memory<float>()[thread_id()] = w.values[thread_id()];
    sync_block();
  }

  // f(Width<M>()) with M the least number of rows there is that holds `count`.
  template <class F>
  static PTM_BODY void by_count(int count, F f) {
    if (count == 1)
      f(Width<1>());
    else if (count == 2)
      f(Width<2>());
    else
      f(Width<ROWS>());
  }

  // sums (M, 16) of all threads' work, in shared memory; all may read them when it returns.
  template <int M>
  static PTM_BODY void multiply(const Weights& w, int64_t panel, const T* const (&row)[M],
                                const Inputs<T>& inputs, float* sums) {
    float total[M][4], part[M][4], by[4] = {}, less[4] = {};
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < 4; n++) total[m][n] = part[m][n] = 0;
    const int quarter = lane() & 3, piece = lane() >> 2;
    const uint8_t* from = w.codes + panel * (PANEL * w.K * BITS / 8);
    uint32_t current = ~0u;
    for (int64_t first = warp_id() * TURN + piece * INPUTS; first < w.K; first += WARPS * TURN) {
      uint32_t codes[STEPS][WORDS];
#pragma unroll
      for (int s = 0; s < STEPS; s++)
        if (first + s * STEP < w.K)
          read(from + (first + s * STEP) * (PANEL * BITS / 8), quarter, codes[s]);
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        const int64_t k = first + s * STEP;
        if (k >= w.K) break;
        const uint32_t g = uint32_t(k) / uint32_t(w.group);
        if (g != current) {
          scaled<M>(by, part, total);
          factors(w, (panel * w.groups() + g) * PANEL + quarter * 4, by, less);
          current = g;
        }
#pragma unroll
        for (int i = 0; i < INPUTS; i += AT_ONCE) {
          float x[M][AT_ONCE], weight[AT_ONCE];
#pragma unroll
          for (int m = 0; m < M; m++) inputs.template read<AT_ONCE>(row[m], k + i, x[m]);
#pragma unroll
          for (int n = 0; n < 4; n++) {
            decode(codes[s], i, n, less[n], weight);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
              for (int j = 0; j < AT_ONCE; j++) part[m][n] += x[m][j] * weight[j];
          }
        }
      }
    }
    scaled<M>(by, part, total);
    float* room = shared_memory<float>() + TABLE;  // (WARPS, M, 16)
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float all = part_sum<28>(total[m][n]);
        if (piece == 0) room[(warp_id() * M + m) * PANEL + quarter * 4 + n] = all;
      }
    sync_block();
    if (thread_id() < M * PANEL) {
      float all = 0;
      for (int i = 0; i < WARPS; i++) all += room[i * M * PANEL + thread_id()];
      sums[thread_id()] = all;
    }
    sync_block();
  }

  // A whole number on top of 2^23: a conversion would take longer.
  static constexpr float TOP = 8388608.0f;
  static PTM_BODY float whole(uint32_t code) { return float_of(code | 0x4b000000u); }

  static PTM_BODY void read(const uint8_t* from, int quarter, uint32_t* to) {
    if constexpr (BITS == 8) {
#pragma unroll
      for (int i = 0; i < 4; i++) to[i] = ((const uint32_t*)from)[4 * i + quarter];
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        const Bytes16 all = *(const Bytes16*)(from + 16 * i + 16 * quarter);
        to[i] = all.x, to[i + 1] = all.y, to[i + 2] = all.z, to[i + 3] = all.w;
      }
    }
  }

  // A group's scale of 4 outputs, and what their codes are less.
  static PTM_BODY void factors(const Weights& w, int64_t at, float* by, float* less) {
    if (w.is_half) {
      const Bytes8 all = *(const Bytes8*)((const uint16_t*)w.scale + at);
      by[0] = from_half(uint16_t(all.x)), by[1] = from_half(uint16_t(all.x >> 16));
      by[2] = from_half(uint16_t(all.y)), by[3] = from_half(uint16_t(all.y >> 16));
    } else {
      load<4>((const float*)w.scale + at, by);
    }
    const uint32_t zero = w.zero ? *(const uint32_t*)(w.zero + at) : 0;
#pragma unroll
    for (int n = 0; n < 4; n++)
      less[n] = TOP + float(1 << (BITS - 1)) + float(int8_t(zero >> (8 * n)));
  }

  template <int M>
  static PTM_BODY void scaled(const float* by, float (&part)[M][4], float (&total)[M][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < 4; n++) {
        total[m][n] += by[n] * part[m][n];
        part[m][n] = 0;
      }
  }

  // Output n's numbers for inputs i to i + AT_ONCE of a piece.
  static PTM_BODY void decode(const uint32_t* codes, int i, int n, float less, float* weight) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if constexpr (BITS == 8) {  // word j is input j's, and signed
        weight[j] = whole((codes[j] ^ 0x80808080u) >> (8 * n) & 255) - less;
      } else {  // word n is output n's; i is 0 or 8
        const int half = 16 * (j & 1);
        const uint32_t low = codes[n + i / 2] >> (half + 4 * (j >> 1)) & 15;
        if constexpr (BITS == 4) {
          weight[j] = whole(low) - less;
        } else {
          const uint32_t high = codes[8 + n] >> (half + 2 * ((i + j) >> 1)) & 3;
          weight[j] = shared_memory<float>()[low | high << 4];
        }
      }
    }
  }
};

// f(Width<BITS>())
template <class F>
int by_bits(int64_t bits, F f) {
  if (bits == 4) return f(Width<4>());
  if (bits == 6) return f(Width<6>());
  return bits == 8 ? f(Width<8>()) : int(PTM_BAD_SHAPE);
}

}  // namespace PTM_NAMESPACE
