// Rows by expert, in their order within one, as sort_rows of csrc/moe_mlp/cpu.cpp: one block, for it
// is a matter of microseconds. A warp has a stretch of the rows: all count theirs by expert, the
// counts are added up over experts and, within one, over warps, and each warp places its rows. Of 32
// rows at a time those of one expert know one another by `alike`, so their order is kept.
#pragma once

#include "../common/device.h"

namespace PTM_NAMESPACE {

constexpr int64_t MAX_E = 512;

struct Plan {
  static constexpr int THREADS = 1024, WARPS = THREADS / 32;
  const int64_t* ids;
  int64_t *order, *starts;
  int64_t count, E;

  // f(row, expert, how many of the 32 before it have the expert, how many have it)
  template <class F>
  PTM_BODY void rows(F f) const {
    const int64_t each = (count + THREADS - 1) / THREADS * 32, first = warp_id() * each;
    for (int64_t i = first; i < first + each && i < count; i += 32) {
      const int64_t row = i + lane();
      int e = -1;
      if (row < count) {
        e = ids[row] >= 0 && ids[row] < E ? int(ids[row]) : -1;
        if (e < 0) fail();
      }
      const uint32_t same = alike(e);
      f(row, e, count_bits(same & ((1u << lane()) - 1)), count_bits(same));
    }
  }

  PTM_BODY void operator()() const {
    int* counts = shared_memory<int>();  // (E, WARPS): of each expert and warp
    int* totals = counts + E * WARPS;    // (E,)
    for (int64_t i = thread_id(); i < E * WARPS; i += THREADS) counts[i] = 0;
    sync_block();
    rows([&](int64_t, int e, int before, int all) {
      if (e >= 0 && before == 0) counts[e * WARPS + warp_id()] += all;
      sync_warp();  // the next 32 may have the expert too
    });
    sync_block();
    for (int64_t e = thread_id(); e < E; e += THREADS) {  // warps of one expert
      int total = 0;
      for (int w = 0; w < WARPS; w++) {
        const int here = counts[e * WARPS + w];
        counts[e * WARPS + w] = total;
        total += here;
      }
      totals[e] = total;
    }
    sync_block();
    if (thread_id() == 0) {  // experts
      int total = 0;
      for (int64_t e = 0; e < E; e++) {
        starts[e] = total;
        const int here = totals[e];
        totals[e] = total;
        total += here;
      }
      starts[E] = total;
    }
    sync_block();
    rows([&](int64_t row, int e, int before, int all) {
      int place = 0;
      if (e >= 0) place = totals[e] + counts[e * WARPS + warp_id()] + before;
      sync_warp();
      if (e >= 0) order[place] = row;
      if (e >= 0 && before == 0) counts[e * WARPS + warp_id()] += all;
      sync_warp();
    });
  }
};

inline int plan(const int64_t* ids, int64_t* order, int64_t* starts, int64_t count, int64_t E,
                void* stream) {
  if (E < 1 || E > MAX_E || count > INT32_MAX) return PTM_BAD_SHAPE;
  const int64_t shared = int64_t(sizeof(int)) * E * (Plan::WARPS + 1);
  return launch(Plan{ids, order, starts, count, E}, 1, shared, stream);
}

}  // namespace PTM_NAMESPACE
