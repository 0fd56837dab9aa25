// One rank's side of the arenas: what it still has to write and to read, and waiting for it.
//
// An exchange is a set of flows: bytes into channels of the own arena, bytes out of the peers'.
// `start` writes what finds room and never waits. `wait` moves all flows of an exchange to their
// end, and those that are before them in a channel, for channels are first in, first out; rows of
// later exchanges stay in their rings. While it waits it also writes for later exchanges. So ranks
// that start the same exchanges in the same order never wait in a circle, however small the rings
// are.
//
// A wait without news spins for some microseconds, then sleeps at the door, a tenth of a second at
// a time, and looks after its peers: one whose process has ended without closing its port is lost,
// whoever is waited for, and so is the one waited for where it has closed its own, or where nothing
// has moved for `timeout_s`.
//
// Used by one thread at a time.
#pragma once

#include <poll.h>

#include <chrono>
#include <deque>
#include <unordered_map>
#include <vector>

#include "arena.h"

namespace PTM_NAMESPACE {

class Port {
 public:
  struct Flow {
    char* memory;
    int64_t bytes;
    int64_t exchange;
  };
  struct Lost {
    int rank = -1;  // nobody
    bool has_left = false;  // else it is late
  };

  // fds: of each peer's process, readable when it has ended; -1 where there is none.
  Port(int rank, std::vector<Arena> arenas, std::vector<int> fds)
      : rank_(rank),
        world_(int(arenas.size())),
        arenas_(std::move(arenas)),
        fds_(std::move(fds)),
        out_(world_),
        in_(2 * world_) {}

  // `exchange` counts from 0; write and read of one exchange come before `start` of it.
  void write(int64_t exchange, int channel, const void* from, int64_t bytes) {
    add(out_[channel], exchange, const_cast<void*>(from), bytes);
  }
  // From rank `source`, out of its channel to everybody or of the one to this rank.
  void read(int64_t exchange, int source, bool is_shared, void* to, int64_t bytes) {
    add(in_[2 * source + is_shared], exchange, to, bytes);
  }
  void start() {
    while (write_all()) {
    }
  }

  Lost wait(int64_t exchange, double timeout_s) {
    Door& door = arenas_[rank_].door();
    auto moved = Clock::now(), looked = moved;
    for (int spins = 0;; spins++) {
      uint32_t heard = door.rings.load(std::memory_order_acquire);
      bool has_moved = write_all() | read_all(exchange);
      if (!open_.count(exchange)) return {};
      if (has_moved) {
        spins = 0;
        moved = Clock::now();
        continue;
      }
      if (spins < kSpins) {
        pause();
        continue;
      }
      door.sleep(heard, kLook);
      auto now = Clock::now();
      if (seconds(now - looked) < kLook * 1e-9) continue;
      looked = now;
      int gone = first_dead(), slow = waited_for(exchange);
      if (gone < 0 && is_closed(slow)) gone = slow;
      if (gone >= 0 && !(write_all() | read_all(exchange))) return {gone, true};
      if (seconds(now - moved) > timeout_s) return {slow, false};
    }
  }

  void close() { arenas_[rank_].door().is_closed.store(1, std::memory_order_release); }

 private:
  using Clock = std::chrono::steady_clock;
  using Queue = std::deque<Flow>;
  static constexpr int kSpins = 500;
  static constexpr long kLook = 100'000'000;

  static double seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void add(Queue& queue, int64_t exchange, void* memory, int64_t bytes) {
    if (bytes <= 0) return;
    queue.push_back({static_cast<char*>(memory), bytes, exchange});
    open_[exchange]++;
  }
  bool advance(Queue& queue, int64_t n) {
    Flow& flow = queue.front();
    flow.memory += n;
    flow.bytes -= n;
    if (flow.bytes) return n > 0;
    if (--open_[flow.exchange] == 0) open_.erase(flow.exchange);
    queue.pop_front();
    return true;
  }
  // A chunk for each channel; whether anything moved.
  bool write_all() {
    bool has_moved = false;
    for (int c = 0; c < world_; c++) {
      if (out_[c].empty()) continue;
      Flow& flow = out_[c].front();
      int64_t n = write_some(arenas_[rank_], c, flow.memory, flow.bytes);
      if (!n) continue;
      has_moved = advance(out_[c], n);
      for (int r = 0; r < world_; r++)
        if (c == rank_ ? r != rank_ : r == c) arenas_[r].door().ring();
    }
    return has_moved;
  }
  bool read_all(int64_t exchange) {
    bool has_moved = false;
    for (int r = 0; r < world_; r++) {
      for (int is_shared = 0; is_shared < 2; is_shared++) {
        Queue& queue = in_[2 * r + is_shared];
        if (queue.empty() || queue.front().exchange > exchange) continue;
        Flow& flow = queue.front();
        int64_t n = read_some(arenas_[r], is_shared ? r : rank_, rank_, flow.memory, flow.bytes);
        if (!n) continue;
        has_moved = advance(queue, n);
        arenas_[r].door().ring();
      }
    }
    return has_moved;
  }
  bool is_closed(int rank) const {
    return arenas_[rank].door().is_closed.load(std::memory_order_acquire);
  }
  int first_dead() const {
    for (int r = 0; r < world_; r++) {
      if (fds_[r] < 0 || is_closed(r)) continue;
      pollfd one{fds_[r], POLLIN, 0};
      if (poll(&one, 1, 0) > 0) return r;
    }
    return -1;
  }
  // Who has not written what is read here, or not read what is written here.
  int waited_for(int64_t exchange) const {
    for (int r = 0; r < world_; r++)
      for (int is_shared = 0; is_shared < 2; is_shared++) {
        const Queue& queue = in_[2 * r + is_shared];
        if (!queue.empty() && queue.front().exchange <= exchange) return r;
      }
    const Arena& mine = arenas_[rank_];
    for (int c = 0; c < world_; c++) {
      if (out_[c].empty()) continue;
      if (c != rank_) return c;
      int last = -1;
      for (int r = 0; r < world_; r++)
        if (r != rank_ && (last < 0 || mine.tail(c, r) < mine.tail(c, last))) last = r;
      return last;
    }
    return rank_;  // nobody: all has moved meanwhile
  }

  int rank_, world_;
  std::vector<Arena> arenas_;
  std::vector<int> fds_;
  std::vector<Queue> out_, in_;
  std::unordered_map<int64_t, int> open_;  // flows of an exchange that have not ended
};

}  // namespace PTM_NAMESPACE
