// What ranks of one machine share: one arena each, whose owner writes rows that the others read.
//
//   arena of rank r   | Door | channel 0: head, tails | channel 1: ... | data of 0 | data of 1 | ...
//
//   channel r          to everybody: a ring that each of the others reads from a tail of its own
//   channel c, c != r  to rank c alone
//
// Head and tails are positions in bytes since the start, so head - tail is what lies in a ring and
// neither ever goes back. The owner moves the head after it has written (release), a reader its
// tail after it has read (release); each looks at the other's with acquire. Who has moved one rings
// the door of who may wait for it: a counter, and a futex wake if its owner sleeps.
//
// This header is also compiled alone, with threads as ranks, under ThreadSanitizer
// (tests/kernels/shm_protocol.cpp). PTM_SHM_BUG seeds an error that this test must find:
//   1 write without room, 2 head moved without release, 3 tail moved before reading,
//   4 head looked at without acquire, 5 tail moved without release
#pragma once

#include <linux/futex.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>

#ifndef PTM_SHM_BUG
#define PTM_SHM_BUG 0
#endif

#ifndef PTM_NAMESPACE
#define PTM_NAMESPACE ptm_shm
#endif

namespace PTM_NAMESPACE {

constexpr int64_t kPage = 4096, kLine = 64;
constexpr int64_t kChunk = 256 << 10;  // moved at a time, so that a reader starts before the end

struct alignas(kLine) Position {
  std::atomic<uint64_t> bytes;
};

struct alignas(kLine) Door {
  std::atomic<uint32_t> rings, is_asleep, is_closed;

  void ring() {
    rings.fetch_add(1, std::memory_order_seq_cst);
    if (is_asleep.load(std::memory_order_seq_cst))
      syscall(SYS_futex, &rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
  // Until `rings` is not `heard` any more, or for so long.
  void sleep(uint32_t heard, long nanoseconds) {
    timespec most{0, nanoseconds};
    is_asleep.store(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &rings, FUTEX_WAIT, heard, &most, nullptr, 0);
    is_asleep.store(0, std::memory_order_relaxed);
  }
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "locks are not shared by processes");

// Bytes of the rings; `room` is that of the ring to everybody, and of those to one rank in sum.
struct Layout {
  int64_t world, room;
  int64_t head_bytes() const {
    int64_t bytes = sizeof(Door) + world * (1 + world) * sizeof(Position);
    return (bytes + kPage - 1) / kPage * kPage;
  }
  int64_t to_one() const { return std::max(kPage, room / (world - 1) / kPage * kPage); }
  int64_t bytes() const { return head_bytes() + room + (world - 1) * to_one(); }
};

struct Arena {
  char* base;
  int owner;
  Layout layout;

  Door& door() const { return *reinterpret_cast<Door*>(base); }
  Position* positions(int channel) const {
    return reinterpret_cast<Position*>(base + sizeof(Door)) + channel * (1 + layout.world);
  }
  std::atomic<uint64_t>& head(int channel) const { return positions(channel)->bytes; }
  std::atomic<uint64_t>& tail(int channel, int reader) const {
    return positions(channel)[1 + reader].bytes;
  }
  int64_t capacity(int channel) const { return channel == owner ? layout.room : layout.to_one(); }
  char* data(int channel) const {
    char* first = base + layout.head_bytes();
    if (channel == owner) return first;
    return first + layout.room + (channel - (channel > owner)) * layout.to_one();
  }
};

// Write up to `bytes` from `from` into an own channel; how many found room.
inline int64_t write_some(const Arena& mine, int channel, const char* from, int64_t bytes) {
  uint64_t head = mine.head(channel).load(std::memory_order_relaxed), last = head;
  bool is_shared = channel == mine.owner;
  for (int r = 0; r < mine.layout.world; r++)
    if (is_shared ? r != mine.owner : r == channel)
      last = std::min(last, mine.tail(channel, r).load(std::memory_order_acquire));
  int64_t capacity = mine.capacity(channel), place = head % capacity;
  int64_t room = PTM_SHM_BUG == 1 ? capacity : capacity - int64_t(head - last);
  int64_t n = std::min({bytes, room, capacity - place, kChunk});
  if (n <= 0) return 0;
  memcpy(mine.data(channel) + place, from, n);
  mine.head(channel).store(
      head + n, PTM_SHM_BUG == 2 ? std::memory_order_relaxed : std::memory_order_release);
  return n;
}

// Read up to `bytes` of a peer's channel; how many were there.
inline int64_t read_some(const Arena& peer, int channel, int reader, char* to, int64_t bytes) {
  uint64_t head = peer.head(channel).load(PTM_SHM_BUG == 4 ? std::memory_order_relaxed
                                                           : std::memory_order_acquire);
  std::atomic<uint64_t>& tail = peer.tail(channel, reader);
  uint64_t first = tail.load(std::memory_order_relaxed);
  int64_t capacity = peer.capacity(channel), place = first % capacity;
  int64_t n = std::min({bytes, int64_t(head - first), capacity - place, kChunk});
  if (n <= 0) return 0;
  auto order = PTM_SHM_BUG == 5 ? std::memory_order_relaxed : std::memory_order_release;
  if (PTM_SHM_BUG == 3) tail.store(first + n, order);
  memcpy(to, peer.data(channel) + place, n);
  if (PTM_SHM_BUG != 3) tail.store(first + n, order);
  return n;
}

}  // namespace PTM_NAMESPACE
