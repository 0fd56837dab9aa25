// isa: portable
// The C interface of port.h for ptm/kernels/shm.py, which maps the arenas and owns the handle.
#include "../common/ptm.h"
#include "port.h"

using namespace PTM_NAMESPACE;

PTM_EXPORT(shm_bytes)(int64_t world, int64_t room, int64_t* bytes, int64_t) {
  if (world < 2 || room < kPage) return PTM_BAD_SHAPE;
  *bytes = Layout{world, room}.bytes();
  return PTM_OK;
}

// bases, fds (world,): where each rank's arena is mapped, and its process. The arenas are zero.
PTM_EXPORT(shm_open)(int64_t rank, int64_t world, int64_t room, const int64_t* bases,
                     const int64_t* fds, int64_t* handle, int64_t) {
  std::vector<Arena> arenas;
  for (int r = 0; r < world; r++)
    arenas.push_back({reinterpret_cast<char*>(bases[r]), r, Layout{world, room}});
  auto* port = new (std::nothrow) Port(int(rank), std::move(arenas), {fds, fds + world});
  *handle = reinterpret_cast<int64_t>(port);
  return port ? PTM_OK : PTM_NO_MEMORY;
}

// flows (number, 5): is_read, channel or source, is_shared, address, bytes.
PTM_EXPORT(shm_start)(int64_t handle, int64_t exchange, const int64_t* flows, int64_t number,
                      int64_t) {
  auto* port = reinterpret_cast<Port*>(handle);
  for (const int64_t* f = flows; f < flows + 5 * number; f += 5) {
    auto* memory = reinterpret_cast<void*>(f[3]);
    if (f[0])
      port->read(exchange, int(f[1]), f[2] != 0, memory, f[4]);
    else
      port->write(exchange, int(f[1]), memory, f[4]);
  }
  port->start();
  return PTM_OK;
}

// lost (2,): the rank that has left or is late, or -1, and whether it has left.
PTM_EXPORT(shm_wait)(int64_t handle, int64_t exchange, double timeout_s, int64_t* lost, int64_t) {
  Port::Lost found = reinterpret_cast<Port*>(handle)->wait(exchange, timeout_s);
  lost[0] = found.rank;
  lost[1] = found.has_left;
  return PTM_OK;
}

PTM_EXPORT(shm_close)(int64_t handle, int64_t) {
  auto* port = reinterpret_cast<Port*>(handle);
  port->close();
  delete port;
  return PTM_OK;
}
