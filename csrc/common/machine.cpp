// What this CPU and its kernel can do: 0 portable, 1 avx2, 2 avx512, 3 avx512_bf16, 4 amx (the
// order of ptm.h); and whether its products of bf16 are slower than those of fp32.
#include "ptm.h"

#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

uint64_t saved_state() {  // XCR0: the registers that the operating system saves
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

bool all(uint32_t word, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (!((word >> bit) & 1)) return false;
  return true;
}

// Linux lends tiles to a process that asks; a child inherits the permission.
bool tiles_granted() {
#if defined(__linux__)
  const int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
  return false;
#endif
}

int detect() {
  const int PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4;
  uint32_t a, b, c, d;
  if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !all(c, {5})) return PORTABLE;  // LZCNT
  if (!__get_cpuid(1, &a, &b, &c, &d) || !all(c, {12, 22, 27, 28, 29}))
    return PORTABLE;  // FMA, MOVBE, OSXSAVE, AVX, F16C
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !all(b, {3, 5, 8}))
    return PORTABLE;  // BMI1, AVX2, BMI2
  uint64_t saved = saved_state();
  if ((saved & 6) != 6) return PORTABLE;
  bool f_dq_cd_bw_vl = all(b, {16, 17, 28, 30, 31});
  bool vbmi_vnni = all(c, {1, 11});
  bool has_tiles = all(d, {22, 24, 25});  // AMX bf16, tile, int8
  if (!f_dq_cd_bw_vl || (saved & 0xe6) != 0xe6) return AVX2;
  if (!vbmi_vnni || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !all(a, {5})) return AVX512;
  return has_tiles && (saved & 0x60000) == 0x60000 && tiles_granted() ? AMX : AVX512_BF16;
}

// Intel's cores with tiles (and half precision, which hypervisors leave when they hide the tiles)
// run VDPBF16PS at half the rate of multiply-adds; Cooper Lake and AMD's from Zen 4 on do not.
bool bf16_is_slow() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != 0x756e6547) return false;  // "Genu"
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && all(d, {23});        // AVX512-FP16
}

}  // namespace
#else
namespace {
int detect() { return 0; }
bool bf16_is_slow() { return false; }
}  // namespace
#endif

extern "C" __attribute__((visibility("default"))) int ptm_machine() {
  static const int isa = detect();
  return isa;
}

extern "C" __attribute__((visibility("default"))) int ptm_bf16_is_slow() {
  static const bool is_slow = bf16_is_slow();
  return is_slow;
}
