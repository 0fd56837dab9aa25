// A small pool of threads that sleep when idle. Our own, for torch brings its libgomp and a second
// one in a process fights it for the cores.
//
// One job at a time: parts are handed out by a counter, whoever is free takes the next. The caller
// works too, so with one thread nothing is woken. A child of fork has none of the threads; it
// forgets them and starts new ones when it needs some.
#include "ptm.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

struct Pool {
  std::atomic<bool> busy{false};  // for the length of a job
  std::mutex mutex;
  std::condition_variable wake, done;
  void (*part)(void*, int64_t) = nullptr;
  void* context = nullptr;
  int64_t parts = 0;
  std::atomic<int64_t> next{0};
  int64_t job = 0;      // number of the current job
  int64_t wanted = 0;   // workers that may still join it
  int64_t working = 0;  // workers inside it
  int64_t started = 0;

  void take() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;) part(context, i);
  }

  void work() {
    int64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [&] { return job != seen && wanted > 0; });
      seen = job;
      wanted--;
      working++;
      lock.unlock();
      take();
      lock.lock();
      if (--working == 0) done.notify_one();
    }
  }

  // As many as the system gives; the caller does what they do not.
  void start(int64_t workers) try {
    for (; started < workers; started++) std::thread(&Pool::work, this).detach();
  } catch (const std::system_error&) {
  }
};

// Never destroyed: its threads are detached and may outlive static destructors.
std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
  });
  return pool.load();
}

}  // namespace

extern "C" void ptm_run_parts(int64_t parts, int64_t threads, void (*part)(void*, int64_t),
                              void* context) {
  int64_t helpers = (threads < parts ? threads : parts) - 1;
  Pool* p = helpers > 0 ? the_pool() : nullptr;
  if (!p || p->busy.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < parts; i++) part(context, i);
    return;
  }
  p->start(helpers);
  {
    std::lock_guard<std::mutex> lock(p->mutex);
    p->part = part;
    p->context = context;
    p->parts = parts;
    p->next.store(0, std::memory_order_relaxed);
    p->wanted = helpers;
    p->job++;
  }
  p->wake.notify_all();
  p->take();
  std::unique_lock<std::mutex> lock(p->mutex);
  p->wanted = 0;  // who has not come by now finds nothing left
  p->done.wait(lock, [&] { return p->working == 0; });
  lock.unlock();
  p->busy.store(false, std::memory_order_release);
}
