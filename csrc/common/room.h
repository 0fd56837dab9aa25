// Scratch that a thread keeps between calls. Fresh memory of this size comes from the system each
// time, and its page faults cost as much as the products.
#pragma once

#include "ptm.h"

#include <stdlib.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace PTM_NAMESPACE {

class Room {
 public:
  ~Room() { free(data_); }

  // Forget what was taken, and have at least so many bytes.
  bool reset(int64_t bytes) {
    constexpr int64_t kPage = 2 << 20;
    used_ = 0;
    if (bytes <= size_) return true;
    free(data_);
    size_ = (bytes + kPage - 1) / kPage * kPage;
    data_ = (char*)aligned_alloc(kPage, size_);
#if defined(__linux__)
    if (data_) madvise(data_, size_, MADV_HUGEPAGE);
#endif
    if (!data_) size_ = 0;
    return data_ != nullptr;
  }

  template <class T>
  T* take(int64_t n) {
    T* taken = (T*)(data_ + used_);
    used_ += bytes<T>(n);
    return taken;
  }

  // What `take` takes: whole cache lines
  template <class T>
  static int64_t bytes(int64_t n) {
    return (int64_t(sizeof(T)) * n + 63) / 64 * 64;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

inline Room& room() {
  thread_local Room mine;
  return mine;
}

// Another one, of the thread that calls an op, for what all its parts share.
inline Room& room_of_op() {
  thread_local Room mine;
  return mine;
}

}  // namespace PTM_NAMESPACE
