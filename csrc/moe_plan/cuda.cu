// The order of rows by expert as an op of its own.
#include "plan.h"

using namespace PTM_NAMESPACE;

PTM_EXPORT(moe_plan)
(const void* ids, void* order, void* starts, int64_t count, int64_t E, void* stream) {
  return plan((const int64_t*)ids, (int64_t*)order, (int64_t*)starts, count, E, stream);
}
