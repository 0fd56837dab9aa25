// device.h for g++: the words a kernel is written in, on the CPU and in one thread, for tests.
//
// The threads of a block are fibers that run in turn, each up to its next barrier; what a warp
// exchanges goes through a barrier of its 32 fibers. The last argument of an op, a stream on a GPU,
// is the number of the order in which threads and blocks take their turns: a kernel that lacks a
// barrier gives other bits in another order. A barrier that not all threads reach is PTM_TIMEOUT, and
// so is one where lanes bring different things. Asynchronous copies come when they are waited for.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#include "ptm.h"

#define PTM_BODY inline

namespace PTM_NAMESPACE {

constexpr int WARP = 32;
constexpr size_t STACK = 1 << 16;
constexpr int ROOM = 3;  // doubles that a lane may bring at once

struct Barrier {
  int arrived = 0;
  size_t size = 0;  // of what those who have arrived bring
  int64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  int group;
};

struct Fiber {
  jmp_buf at;
  std::vector<Copy> copies;  // under way
  int groups;
  std::unique_ptr<char[]> stack;
  bool is_started, is_done;
  int turn;  // which of the two rooms of its warp is next
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<double> rooms;  // two for each warp: a lane writes one again two barriers on
  Barrier all;
  jmp_buf scheduler;
  std::unique_ptr<char[]> shared;
  void (*body)(const void*);
  const void* arguments;
  int64_t id, progress, shared_bytes;
  int threads, now;
  bool is_failed;
};

inline Block*& here() {
  static thread_local Block* block = nullptr;
  return block;
}

PTM_BODY int thread_id() { return here()->now; }
PTM_BODY int64_t block_id() { return here()->id; }
PTM_BODY void fail() { here()->is_failed = true; }

template <class T>
PTM_BODY T* shared_memory() {
  return reinterpret_cast<T*>(here()->shared.get());
}

PTM_BODY void give_way() {
  if (_setjmp(here()->fibers[here()->now].at) == 0) _longjmp(here()->scheduler, 1);
}

// Whoever brings something else than the others waits for good.
__attribute__((noinline)) inline void wait_at(Barrier& barrier, int count, size_t size) {
  while (barrier.arrived > 0 && barrier.size != size) give_way();
  const int64_t mine = barrier.generation;
  barrier.size = size;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.generation++;
    here()->progress++;
    return;
  }
  while (barrier.generation == mine) give_way();
}

PTM_BODY void sync_block() { wait_at(here()->all, here()->threads, 0); }
PTM_BODY void sync_warp_with(size_t size) { wait_at(here()->warps[thread_id() / WARP], WARP, size); }
PTM_BODY void sync_warp() { sync_warp_with(0); }

// What each of the 32 lanes brings.
template <class T>
PTM_BODY const T* exchanged(T x) {
  static_assert(sizeof(T) <= ROOM * sizeof(double), "a room has that much for a lane");
  Fiber& fiber = here()->fibers[thread_id()];
  const int room = 2 * (thread_id() / WARP) + fiber.turn;
  fiber.turn ^= 1;
  T* all = reinterpret_cast<T*>(here()->rooms.data() + room * WARP * ROOM);
  memcpy((void*)(all + thread_id() % WARP), &x, sizeof(T));
  sync_warp_with(sizeof(T));
  return all;
}

template <class T>
PTM_BODY T from_lane(T x, int lane) {
  return exchanged(x)[lane & (WARP - 1)];
}
// In the order of a GPU's butterfly.
template <class T, class F>
PTM_BODY T folded(int mask, T x, F f) {
  const T* all = exchanged(x);
  T one[WARP], other[WARP];
  memcpy((void*)one, all, sizeof one);
  for (int m = WARP / 2; m > 0; m >>= 1) {
    if (!(mask & m)) continue;
    for (int i = 0; i < WARP; i++) other[i] = f(one[i], one[i ^ m]);
    memcpy((void*)one, other, sizeof one);
  }
  return one[thread_id() % WARP];
}
template <class T, class F>
PTM_BODY T warp_fold(T x, F f) {
  return folded(31, x, f);
}
template <class T, class F>
PTM_BODY T part_fold(int lanes, T x, F f) {
  return folded(lanes - 1, x, f);
}
template <int MASK, class T>
PTM_BODY T part_sum(T x) {
  return folded(MASK, x, [](T a, T b) { return a + b; });
}
PTM_BODY uint32_t alike(int x) {
  const int* all = exchanged(x);
  uint32_t mask = 0;
  for (int i = 0; i < WARP; i++) mask |= uint32_t(all[i] == x) << i;
  return mask;
}
PTM_BODY int count_bits(uint32_t x) { return __builtin_popcount(x); }

template <class T>
PTM_BODY T warp_sum(T x) {
  return folded(31, x, [](T a, T b) { return a + b; });
}
PTM_BODY float warp_max(float x) {
  return folded(31, x, [](float a, float b) { return fmaxf(a, b); });
}
PTM_BODY float warp_min(float x) {
  return folded(31, x, [](float a, float b) { return fminf(a, b); });
}

// The compiler is told not to contract (-ffp-contract=off).
PTM_BODY float times(float a, float b) { return a * b; }
PTM_BODY float plus(float a, float b) { return a + b; }
PTM_BODY float over(float a, float b) { return a / b; }
PTM_BODY float root(float a) { return sqrtf(a); }
PTM_BODY float fused(float a, float b, float c) { return fmaf(a, b, c); }
PTM_BODY float power2(float x) { return exp2f(x); }
PTM_BODY float power_e(float x) { return expf(x); }
PTM_BODY float from_half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits = 0x7f800000u | (rest & 0x3ff) << 13;
  float x;
  if (rest < 0x7c00) {  // times 2^112 moves the exponent's bias, and makes normal what was not
    bits = rest << 13;
    memcpy(&x, &bits, 4);
    x *= 0x1p112f;
    memcpy(&bits, &x, 4);
  }
  bits |= sign;
  memcpy(&x, &bits, 4);
  return x;
}

// Whether 16 bytes may be moved there at once.
PTM_BODY bool in_shared(const void* at) {
  const int64_t offset = static_cast<const char*>(at) - here()->shared.get();
  return offset >= 0 && offset + 16 <= here()->shared_bytes && (uintptr_t(at) & 15) == 0;
}
// NaN until it is waited for, as whatever was there may be gone.
PTM_BODY void copy_async(void* to, const void* from, bool is_there) {
  if (!in_shared(to) || (is_there && (uintptr_t(from) & 15))) return fail();
  Fiber& fiber = here()->fibers[thread_id()];
  memset(to, 0xff, 16);
  fiber.copies.push_back({to, is_there ? from : nullptr, fiber.groups});
}
PTM_BODY void commit_copies() { here()->fibers[thread_id()].groups++; }
template <int N>
PTM_BODY void wait_copies() {
  Fiber& fiber = here()->fibers[thread_id()];
  size_t left = 0;
  for (const Copy& copy : fiber.copies) {
    if (copy.group >= fiber.groups - N)
      fiber.copies[left++] = copy;
    else if (copy.from)
      memcpy(copy.to, copy.from, 16);
    else
      memset(copy.to, 0, 16);
  }
  fiber.copies.resize(left);
}

template <bool IS_TURNED>
PTM_BODY void load_matrices(uint32_t (&to)[4], const void* row) {
  if (!in_shared(row)) fail(), row = here()->shared.get();
  const void* const* rows = exchanged(row);
  const int side = thread_id() % WARP / 4, first = thread_id() % 4 * 2;
  for (int i = 0; i < 4; i++) {
    const void* const* matrix = rows + 8 * i;
    auto at = [&](int r, int c) { return static_cast<const uint16_t*>(matrix[r])[c]; };
    const uint16_t low = IS_TURNED ? at(first, side) : at(side, first);
    const uint16_t high = IS_TURNED ? at(first + 1, side) : at(side, first + 1);
    to[i] = low | uint32_t(high) << 16;
  }
}
PTM_BODY void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Both {
    uint32_t a[4], b[2];
  } mine;
  memcpy(mine.a, a, sizeof a);
  memcpy(mine.b, b, sizeof b);
  const Both* all = exchanged(mine);
  const int side = thread_id() % WARP / 4, first = thread_id() % 4 * 2;
  auto number = [](uint32_t pair, int half) {
    return to_float(bf16{uint16_t(half ? pair >> 16 : pair)});
  };
  for (int i = 0; i < 4; i++) {  // row side, + 8 from i = 2 on; column first + i % 2
    const Both *of_row = all + 4 * side, *of_column = all + 4 * (first + i % 2);
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const int lane = k % 8 / 2, right = k / 8;
      sum += number(of_row[lane].a[i / 2 + 2 * right], k % 2) *
             number(of_column[lane].b[right], k % 2);
    }
    d[i] += sum;
  }
}

inline void first_turn() {
  Block* block = here();
  block->body(block->arguments);
  block->fibers[block->now].is_done = true;
  block->progress++;
  _longjmp(block->scheduler, 1);
}

inline void turn(Block& block, int thread) {
  Fiber& fiber = block.fibers[thread];
  block.now = thread;
  if (_setjmp(block.scheduler)) return;
  if (fiber.is_started) _longjmp(fiber.at, 1);
  fiber.is_started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, first_turn, 0);
  setcontext(&context);
}

// Item i of n in order number `order`: 1 is as they are, an even one from behind.
inline int64_t in_order(int64_t i, int64_t n, int64_t order) {
  if (order % 2 == 0) return n - 1 - i;
  return (i + (order / 2) * 7) % n;
}

inline bool run_block(Block& block, int64_t order) {
  for (Fiber& fiber : block.fibers) {
    fiber.is_started = fiber.is_done = false;
    fiber.turn = fiber.groups = 0;
    fiber.copies.clear();
  }
  for (bool is_left = true; is_left;) {
    const int64_t before = block.progress;
    is_left = false;
    for (int i = 0; i < block.threads; i++) {
      const int thread = int(in_order(i, block.threads, order));
      if (block.fibers[thread].is_done) continue;
      turn(block, thread);
      is_left = is_left || !block.fibers[thread].is_done;
    }
    if (is_left && block.progress == before) return false;
  }
  return true;
}

template <class Body>
int launch(const Body& body, int64_t blocks, int64_t shared_bytes, void* stream) {
  if (blocks <= 0) return PTM_OK;
  static thread_local Block block;
  block = Block();
  block.threads = Body::THREADS;
  block.fibers.resize(size_t(block.threads));
  for (Fiber& fiber : block.fibers) fiber.stack.reset(new char[STACK]);
  block.warps.resize(size_t(block.threads / WARP));
  block.rooms.resize(size_t(2 * block.threads * ROOM));
  block.shared.reset(new char[size_t(shared_bytes) + 16]);
  block.shared_bytes = shared_bytes;
  block.body = [](const void* arguments) { (*static_cast<const Body*>(arguments))(); };
  block.arguments = &body;
  here() = &block;
  const int64_t order = int64_t(uintptr_t(stream));
  for (int64_t i = 0; i < blocks; i++) {
    memset(block.shared.get(), 0xff, size_t(shared_bytes));  // NaN, as no kernel may rely on more
    block.id = in_order(i, blocks, order);
    if (!run_block(block, order)) return PTM_TIMEOUT;
    if (block.is_failed) return PTM_BAD_SHAPE;
  }
  return PTM_OK;
}

template <class T>
struct DeviceScratch : Scratch<T> {
  DeviceScratch(int64_t n, void*) : Scratch<T>(n) {}
};

}  // namespace PTM_NAMESPACE
