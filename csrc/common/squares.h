// Sums of squares in fp64 that do not depend on timing: blocks of threads leave theirs in `squares`,
// and of each `per` of them a second launch makes one, in an order of their numbers.
#pragma once

#include "device.h"

namespace PTM_NAMESPACE {

struct AddSquares {
  static constexpr int THREADS = 256;
  const double* squares;
  double* sums;
  int64_t count, per;

  PTM_BODY void operator()() const {
    const int64_t first = block_id() * per, end = first + per < count ? first + per : count;
    double total = 0;
    for (int64_t i = first + thread_id(); i < end; i += THREADS) total += squares[i];
    total = block_sum<THREADS / 32>(total, shared_memory<double>());
    if (thread_id() == 0) sums[block_id()] = total;
  }
};

inline int add_squares(const double* squares, int64_t count, int64_t per, double* sums,
                       int64_t num_sums, void* stream) {
  return launch(AddSquares{squares, sums, count, per}, num_sums, 64, stream);
}

}  // namespace PTM_NAMESPACE
