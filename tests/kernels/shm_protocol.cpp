// csrc/shm/port.h with threads as ranks, for ThreadSanitizer: rounds of gathers and uneven
// exchanges of all sizes, several under way at once, waited for in an order of each rank's own.
// Every byte that comes is looked at. Then windows (ptm/parallel/in_memory.py): plain memory of all
// ranks, in which only words through the port say who may read or write, with a gather under way.
// Usage: shm_protocol RANKS ROUNDS; 1 where bytes were wrong. PTM_SHM_BUG besides those of arena.h:
//   6 a window written again before the others have said that they have read it
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <thread>

#include "../../csrc/shm/port.h"

using namespace PTM_NAMESPACE;

static uint32_t mix(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t x = a * 2654435761u ^ b * 40503u ^ c * 2246822519u;
  x ^= x >> 15;
  x *= 2654435761u;
  return x ^ x >> 13;
}

// How many bytes rank `from` sends to `to` in an exchange; more than a ring holds, or none.
static int64_t size_of(int exchange, int from, int to) {
  uint32_t x = mix(exchange, from, to + 100);
  return x % 4 == 0 ? 0 : x % 4 == 1 ? x / 4 % 64 : x / 4 % (6 * kPage);
}

static char byte_of(int exchange, int from, int to, int64_t i) {
  return char(mix(exchange + 7, from * 16 + to, uint32_t(i)));
}

static std::atomic<long> wrong{0};

static void run(int rank, const std::vector<Arena>& arenas, int rounds) {
  int world = int(arenas.size());
  Port port(rank, arenas, std::vector<int>(world, -1));
  constexpr int kAtOnce = 3;
  for (int round = 0; round < rounds; round++) {
    std::vector<std::vector<char>> sent, came;
    struct Read {
      int exchange, source, to;
      size_t at;
    };
    std::vector<Read> reads;
    for (int k = 0; k < kAtOnce; k++) {
      int exchange = round * kAtOnce + k;
      bool is_gather = exchange % 2;
      for (int r = 0; r < world; r++) {
        if (is_gather ? r == rank : r != rank) {
          int to = is_gather ? rank : r;
          std::vector<char> bytes(size_of(exchange, rank, to));
          for (size_t i = 0; i < bytes.size(); i++) bytes[i] = byte_of(exchange, rank, to, i);
          sent.push_back(std::move(bytes));
          port.write(exchange, r, sent.back().data(), sent.back().size());
        }
        if (r != rank) {
          int to = is_gather ? r : rank;
          came.emplace_back(size_of(exchange, r, to));
          reads.push_back({exchange, r, to, came.size() - 1});
          port.read(exchange, r, is_gather, came.back().data(), came.back().size());
        }
      }
      port.start();
    }
    for (int k = 0; k < kAtOnce; k++) {
      int exchange = round * kAtOnce + (k + rank) % kAtOnce;
      if (port.wait(exchange, 60.0).rank >= 0) abort();
      for (const Read& read : reads)
        if (read.exchange == exchange)
          for (size_t i = 0; i < came[read.at].size(); i++)
            if (came[read.at][i] != byte_of(exchange, read.source, read.to, i)) wrong++;
    }
  }
  port.close();
}

constexpr int kRow = 512;  // bytes of a window for each rank

// A pass: each rank lays out a row for every rank, tells, takes those for it out of all windows and
// puts an answer into its row of each rank's other window, tells, and reads its answers.
static void run_windows(int rank, const std::vector<Arena>& arenas, std::vector<char>& rows,
                        std::vector<char>& answers, int rounds) {
  int world = int(arenas.size());
  Port port(rank, arenas, std::vector<int>(world, -1));
  int exchange = 0;
  auto row = [&](std::vector<char>& of, int window, int r) {
    return of.data() + (window * world + r) * kRow;
  };
  auto start_telling = [&](int64_t word, std::vector<int64_t>& words) {
    for (int r = 0; r < world; r++) {
      if (r == rank) continue;
      port.write(exchange, r, &word, sizeof word);
      port.read(exchange, r, false, &words[r], sizeof word);
    }
    port.start();
    return exchange++;
  };
  auto tell = [&](int64_t word) {
    std::vector<int64_t> words(world, word);
    if (port.wait(start_telling(word, words), 60.0).rank >= 0) abort();
    for (int64_t other : words) wrong += other != word;
  };
  std::vector<char> sent(3 * kPage, 1), came(world * sent.size());
  for (int round = 0; round < rounds; round++) {
    int gather = exchange++;
    port.write(gather, rank, sent.data(), sent.size());
    for (int r = 0; r < world; r++)
      if (r != rank) port.read(gather, r, true, &came[r * sent.size()], sent.size());
    port.start();
    for (int r = 0; r < world; r++)
      for (int i = 0; i < kRow; i++) row(rows, rank, r)[i] = byte_of(round, rank, r, i);
    tell(round);
    for (int r = 0; r < world; r++)
      for (int i = 0; i < kRow; i++) row(answers, r, rank)[i] = char(row(rows, r, rank)[i] + 1);
#if PTM_SHM_BUG == 6
    std::vector<int64_t> words(world);
    int late = start_telling(-round, words);
    for (int i = 0; i < kRow; i++) row(rows, rank, (rank + 1) % world)[i] = 0;
    port.wait(late, 60.0);
#else
    tell(-round);
#endif
    for (int r = 0; r < world; r++)
      for (int i = 0; i < kRow; i++)
        if (row(answers, rank, r)[i] != char(byte_of(round, rank, r, i) + 1)) wrong++;
    if (port.wait(gather, 60.0).rank >= 0) abort();
  }
  port.close();
}

static std::vector<Arena> new_arenas(const Layout& layout) {
  std::vector<Arena> arenas;
  for (int r = 0; r < layout.world; r++) {
    void* base = mmap(nullptr, layout.bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                      -1, 0);
    arenas.push_back({static_cast<char*>(base), r, layout});
  }
  return arenas;
}

int main(int, char** argv) {
  int world = atoi(argv[1]), rounds = atoi(argv[2]);
  Layout layout{world, 2 * kPage};
  std::vector<Arena> arenas = new_arenas(layout), others = new_arenas(layout);
  std::vector<char> rows(world * world * kRow), answers(rows.size());
  auto all_ranks = [&](auto job) {
    std::vector<std::thread> ranks;
    for (int r = 0; r < world; r++) ranks.emplace_back(job, r);
    for (auto& rank : ranks) rank.join();
  };
  if (PTM_SHM_BUG != 6) all_ranks([&](int r) { run(r, arenas, rounds); });
  long before = wrong;
  all_ranks([&](int r) { run_windows(r, others, rows, answers, rounds); });
  printf("%ld wrong bytes, %ld of them in windows\n", wrong.load(), wrong - before);
  return wrong ? 1 : 0;
}
