// y[m, n] = sum_k x[m, k] w[n, k] for a few rows m, from weights packed as packed.h has them: a block
// of threads for a panel of 16 outputs and a row. A lane takes 16 bytes of codes at a time (4 bits: 8
// inputs of 4 outputs; 6 bits: three times 16 bytes, 16 inputs of 4 outputs; 8 bits: an input of 16
// outputs), so a warp reads a panel as it lies in memory. Codes become fp32 exactly, sums are fp32,
// and a group's scale multiplies the sums of its inputs.
#include "../common/device.h"

namespace PTM_NAMESPACE {

constexpr int PANEL = 16;

PTM_BODY float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // times 2^112 moves the exponent's bias, and makes normal what was not
  return float_of(bits_of(float_of(rest << 13) * float_of(0x77800000u)) | sign);
}

template <class T, int BITS>
struct Linear {
  static constexpr int THREADS = 256, WARPS = THREADS / 32;
  static constexpr int OUTPUTS = BITS == 8 ? 16 : 4;                  // of a lane
  static constexpr int INPUTS = BITS == 8 ? 1 : BITS == 6 ? 16 : 8;   // of a piece
  static constexpr int LANES = PANEL / OUTPUTS;                       // that share a piece's inputs
  const T* x;
  const uint8_t* codes;
  const void* scale;
  const int8_t* zero;
  const float* values;
  T* y;
  int64_t inputs, N, K, group;
  bool is_half, is_aligned;  // the latter: rows of x come in eights, on 16 bytes

  PTM_BODY void operator()() const {
    const int64_t panels = (N + PANEL - 1) / PANEL, groups = (K + group - 1) / group;
    const int64_t m = block_id() / panels, p = block_id() % panels;
    float* table = shared_memory<float>();  // (64,) of 6 bits; then (WARPS, 16) sums
    float* sums = table + 64;
    if (BITS == 6) {
      if (thread_id() < 64) table[thread_id()] = values[thread_id()];
      sync_block();
    }
    const uint8_t* panel = codes + p * (PANEL * K * BITS / 8);
    const int first = lane() % LANES * OUTPUTS;  // of this lane's outputs
    float total[OUTPUTS], part[OUTPUTS], of_x = 0;
#pragma unroll
    for (int n = 0; n < OUTPUTS; n++) total[n] = part[n] = 0;
    int64_t current = 0;
    for (int64_t k = int64_t(thread_id()) / LANES * INPUTS; k < K; k += THREADS / LANES * INPUTS) {
      if (k / group != current) {
        scaled(p * groups + current, first, part, of_x, total);
        current = k / group;
      }
      float row[INPUTS];
      read(x + m * inputs + k, inputs - k, row);
#pragma unroll
      for (int i = 0; i < INPUTS; i++) of_x += row[i];
      piece(panel + k * PANEL * BITS / 8 + lane() % LANES * 16, row, table, part);
    }
    scaled(p * groups + current, first, part, of_x, total);
#pragma unroll
    for (int n = 0; n < OUTPUTS; n++) {
      total[n] = part_sum<31 & ~(LANES - 1)>(total[n]);
      if (lane() < LANES) sums[warp_id() * PANEL + first + n] = total[n];
    }
    sync_block();
    const int n = thread_id();
    if (n >= PANEL || p * PANEL + n >= N) return;
    float all = 0;
    for (int w = 0; w < WARPS; w++) all += sums[w * PANEL + n];
    store<1>(y + m * N + p * PANEL + n, &all);
  }

  // Inputs of a piece, zeros behind the last
  PTM_BODY void read(const T* from, int64_t left, float* row) const {
    if (INPUTS >= 8 && is_aligned) {
#pragma unroll
      for (int i = 0; i + 8 <= INPUTS; i += 8) {
#pragma unroll
        for (int j = i; j < i + 8; j++) row[j] = 0;
        if (i < left) load<8>(from + i, row + i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < INPUTS; i++) row[i] = i < left ? to_float(from[i]) : 0;
    }
  }

  PTM_BODY void piece(const uint8_t* from, const float* row, const float* table, float* part) const {
    const Bytes16 all = *(const Bytes16*)from;
    const uint32_t word[4] = {all.x, all.y, all.z, all.w};
    if constexpr (BITS == 4) {  // word n: halves h, nibble j of each is input 2 j + h
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 8; i++)
          part[n] += row[i] * (float((word[n] >> (16 * (i & 1) + 4 * (i >> 1))) & 15) - 8.0f);
    } else if constexpr (BITS == 6) {
      const Bytes16 second = *(const Bytes16*)(from + 64), upper = *(const Bytes16*)(from + 128);
      const uint32_t next[4] = {second.x, second.y, second.z, second.w};
      const uint32_t high[4] = {upper.x, upper.y, upper.z, upper.w};
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 16; i++) {
          const uint32_t low = i < 8 ? word[n] : next[n];
          const uint32_t code = ((low >> (16 * (i & 1) + 4 * ((i & 7) >> 1))) & 15) |
                                ((high[n] >> (16 * (i & 1) + 2 * (i >> 1))) & 3) << 4;
          part[n] += row[i] * table[code];
        }
    } else {
#pragma unroll
      for (int n = 0; n < 16; n++)
        part[n] += row[0] * float(int8_t(word[n >> 2] >> (8 * (n & 3))));
    }
  }

  // total += scale (part - zero sum of x), of a group; part and the sum begin again
  PTM_BODY void scaled(int64_t g, int first, float* part, float& of_x, float* total) const {
#pragma unroll
    for (int n = 0; n < OUTPUTS; n++) {
      const int64_t at = g * PANEL + first + n;
      const float by = is_half ? half_to_float(((const uint16_t*)scale)[at]) : ((const float*)scale)[at];
      total[n] += by * (zero ? part[n] - float(zero[at]) * of_x : part[n]);
      part[n] = 0;
    }
    of_x = 0;
  }
};

template <class T>
int linear(const T* x, const uint8_t* codes, const void* scale, const int8_t* zero,
           const float* values, T* y, int64_t M, int64_t inputs, int64_t N, int64_t K, int64_t bits,
           int64_t group, bool is_half, void* stream) {
  if (K % 32 || group % 32 || group < 32 || !aligned16(codes)) return PTM_BAD_SHAPE;
  const bool is_aligned = inputs % 8 == 0 && aligned16(x);
  auto run = [&](auto width) {
    constexpr int BITS = decltype(width)::N;
    const Linear<T, BITS> body{x, codes, scale, zero, values, y, inputs, N, K, group, is_half,
                                is_aligned};
    const int64_t shared = int64_t(sizeof(float)) * (64 + body.WARPS * PANEL);
    return launch(body, M * divided_up(N, PANEL), shared, stream);
  };
  if (bits == 4) return run(Width<4>());
  if (bits == 6) return run(Width<6>());
  return bits == 8 ? run(Width<8>()) : int(PTM_BAD_SHAPE);
}

}  // namespace PTM_NAMESPACE

using namespace PTM_NAMESPACE;

PTM_EXPORT(wq_linear)(const void* x, const uint8_t* codes, const void* scale, const int8_t* zero,
                      const float* values, void* y, int64_t M, int64_t inputs, int64_t N, int64_t K,
                      int64_t bits, int64_t group, int64_t is_half, int64_t is_bf16, void* stream) {
  if (is_bf16)
    return linear((const bf16*)x, codes, scale, zero, values, (bf16*)y, M, inputs, N, K, bits,
                  group, is_half != 0, stream);
  return linear((const float*)x, codes, scale, zero, values, (float*)y, M, inputs, N, K, bits,
                group, is_half != 0, stream);
}
