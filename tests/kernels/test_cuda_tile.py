"""Products on tensor cores (csrc/common/tile.h) without a GPU: exact on small whole numbers,
whatever the order of threads, and proof that a wrong use of what they are made of shows there."""

import ctypes
import shutil

import pytest
import torch

from tests.support.emulated import ROOT, build_emulated, needs_gxx

# a (M, K) and b (N, K), or their transposes
PRODUCT = """
#include "common/tile.h"
namespace PTM_NAMESPACE {
struct Rows {
  const bf16* base;
  int count, size;
  PTM_BODY const bf16* at(int i) const { return i < count ? base + int64_t(i) * size : nullptr; }
};
template <class A, class B>
struct Product {
  static constexpr int THREADS = TILE_THREADS;
  const bf16 *a, *b;
  float* to;
  int M, N, K;
  PTM_BODY static Flat<Rows> lay(const bf16* of, int n, int k, Flat<Rows>*) {
    return {Rows{of, n, k}, 0};
  }
  PTM_BODY static Turned<Rows> lay(const bf16* of, int n, int k, Turned<Rows>*) {
    return {Rows{of, k, n}, 0, n};
  }
  PTM_BODY void operator()() const {
    Sums sums;
    multiply(lay(a, M, K, (A*)nullptr), lay(b, N, K, (B*)nullptr), K, M, N, sums);
    sums.each_row([&](int, int m, auto pairs) {
      pairs([&](int n, float first, float second) {
        if (m < M && n < N) to[m * N + n] = first, to[m * N + n + 1] = second;
      });
    });
  }
};
template <class A, class B>
int product(const bf16* a, const bf16* b, float* to, int M, int N, int K, void* stream) {
  return launch(Product<A, B>{a, b, to, M, N, K}, 1, tile_bytes<A, B>(), stream);
}
}
PTM_EXPORT(product)(const void* a, const void* b, float* to, int64_t M, int64_t N, int64_t K,
                    int64_t turned, void* stream) {
  using namespace PTM_NAMESPACE;
  using F = Flat<Rows>;
  using T = Turned<Rows>;
  const auto all = [&](auto of) {
    return of((const bf16*)a, (const bf16*)b, to, int(M), int(N), int(K), stream);
  };
  return all(turned == 0 ? product<F, F> : turned == 1 ? product<F, T> : product<T, T>);
}
"""
OK, BAD_SHAPE, TIMED_OUT = 0, 2, 3
WRONG = "other numbers"
AHEAD = "copy(step + STAGES - 1, stage ? stage - 1 : STAGES - 1);"
BARRIER = "sync_block();  // all copies of this step are there, and the stage before it is read"
# What is done to tile.h, and what then comes back
BROKEN = {
    "as it is": ("", "", OK),
    "copies not waited for": ("wait_copies<STAGES - 2>();", "", WRONG),
    "a group too few waited for": ("wait_copies<STAGES - 2>", "wait_copies<STAGES - 1>", WRONG),
    "groups not counted to the end": ("commit_", "if (step < steps) commit_", WRONG),
    "copies of others not waited for": (BARRIER, "", WRONG),
    "a stage filled while it is read": (f"{BARRIER}\n    {AHEAD}", f"{AHEAD} sync_block();", WRONG),
    "matrices not turned": ("load_matrices<true>", "load_matrices<false>", WRONG),
    "rows named by other lanes": ("(m + lane() % 16)", "(m + lane() / 2)", WRONG),
    "rows at no multiple of 16": ("STRIDE = STEP + 8", "STRIDE = STEP + 4", BAD_SHAPE),
    "numbers in other registers": ("right[j][1] = two[2]", "right[j][1] = two[1]", WRONG),
    "a lane without its part": ("multiply_16x", "if (lane() != 3) multiply_16x", TIMED_OUT),
}  # fmt: skip


def outcome(library, turned, M, N, K, order):
    generator = torch.Generator().manual_seed(K)
    a, b = (torch.randint(-8, 9, (n, K), generator=generator).bfloat16() for n in (M, N))
    of_a, of_b = a.t() if turned > 1 else a, b.t() if turned > 0 else b
    of_a, of_b = of_a.contiguous(), of_b.contiguous()
    to = torch.full((M, N), torch.nan)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (of_a, of_b, to)]
    sizes = [ctypes.c_int64(n) for n in (M, N, K, turned)]
    status = library.ptm_product_portable(*pointers, *sizes, ctypes.c_void_p(order))
    if status:
        return status
    return OK if torch.equal(to, a.float() @ b.float().t()) else WRONG


@pytest.mark.slow
@needs_gxx
@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_product_shows(tmp_path, case):
    shutil.copytree(ROOT / "csrc" / "common", tmp_path / "common")
    tile, (right, wrong, expected) = tmp_path / "common" / "tile.h", BROKEN[case]
    text = tile.read_text()
    assert right in text
    tile.write_text(text.replace(right, wrong) if right else text)
    source = tmp_path / "product.cu"
    source.write_text(PRODUCT)
    library = ctypes.CDLL(str(build_emulated(tmp_path, [source])))
    cases = [(0, 72, 40, 160), (1, 128, 96, 192), (2, 96, 64, 150), (2, 32, 128, 0)]
    found = {outcome(library, *case, order) for case in cases for order in (1, 2, 3)}
    assert expected in found and found <= {OK, expected}, found
