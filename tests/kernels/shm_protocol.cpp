// csrc/shm/port.h with threads as ranks, for ThreadSanitizer: rounds of gathers and uneven
// exchanges of all sizes, several under way at once, waited for in an order of each rank's own.
// Every byte that comes is looked at. Usage: shm_protocol RANKS ROUNDS; 1 where bytes were wrong.
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

int main(int, char** argv) {
  int world = atoi(argv[1]);
  Layout layout{world, 2 * kPage};
  std::vector<Arena> arenas;
  for (int r = 0; r < world; r++) {
    void* base = mmap(nullptr, layout.bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                      -1, 0);
    arenas.push_back({static_cast<char*>(base), r, layout});
  }
  std::vector<std::thread> ranks;
  for (int r = 0; r < world; r++) ranks.emplace_back(run, r, arenas, atoi(argv[2]));
  for (auto& rank : ranks) rank.join();
  printf("%ld wrong bytes\n", wrong.load());
  return wrong ? 1 : 0;
}
