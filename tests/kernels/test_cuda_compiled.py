"""What nvcc makes of the CUDA kernels, for both architectures: no register goes to memory, rows are
read sixteen bytes at a time, and products of bf16 run on tensor cores."""

import re
import shutil
import struct
import subprocess
from collections import Counter

import pytest

from tests.support.emulated import build_script, cuda_sources

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
# A kernel's name has the widths that it is made for; these read rows, so must have the wide ones.
WIDE = {
    "adamw/cuda": ("Sweep",),
    "add_pieces/cuda": ("Add",),
    "fake_quant/cuda": ("OnGrid",),
    "moe_mlp/cuda": (),
    "moe_mlp/cuda_backward": (),
    "moe_plan/cuda": (),
    "rmsnorm/cuda": ("Forward", "Backward"),
    "rope/cuda": ("Turn",),
    "router/cuda": (),
    "wq/cuda": ("Linear",),
    "wq/cuda_moe": ("Inner", "Outer", "Combine"),
}
# These multiply on tensor cores: sixteen bytes from global to shared memory, matrices from there to
# registers, products. What a step of 32 numbers k takes of each (csrc/common/tile.h), and of copies
# the two steps before the first one too. An instruction's number is its lowest twelve bits.
TENSOR = {
    "moe_mlp/cuda": ("Inner", "Outer"),
    "moe_mlp/cuda_backward": ("ByHidden", "ByWeight", "ByRows"),
}
HMMA, LDSM, LDGSTS = 0x23C, 0x83B, 0xFAE
TAKES = {HMMA: 32, LDSM: 12, LDGSTS: 12}


def name_of(source):
    return f"{source.parent.name}/{source.stem}"


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", cuda_sources(), ids=name_of)
def test_machine_code(source, tmp_path):
    jobs = {job[0]: job[2] for job in build_script().cuda_jobs(shutil.which("nvcc"))}
    command = [*jobs[source], "-Xptxas=-v", "-keep", f"-keep-dir={tmp_path}", "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr

    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert spills and all(found == ("0", "0") for found in spills), done.stderr

    for architecture in ("compute_80", "compute_90a"):
        [ptx] = tmp_path.glob(f"*{architecture}.ptx")
        kernels = dict(re.findall(r"\.entry (\w+)\((.*?\n\})", ptx.read_text(), flags=re.DOTALL))
        assert kernels
        for name in WIDE[name_of(source)]:
            of = [body for kernel, body in kernels.items() if name in kernel]
            wide = [body for body in of if re.search(r"ld\.global\.v4\.[a-z]32", body)]
            assert len(wide) >= 2, (name, list(kernels))  # fp32 and bf16
            assert all("ld.local" not in body and "st.local" not in body for body in of)
        for name in TENSOR.get(name_of(source), ()):
            of = [body for kernel, body in kernels.items() if name in kernel]
            assert of and all("cp.async.cg.shared.global" in body for body in of), name
            assert all("ld.local" not in body and "st.local" not in body for body in of)
            [cubin] = tmp_path.glob(f"*{architecture}.cubin")
            found = [count for kernel, count in instructions(cubin.read_bytes()) if name in kernel]
            assert len(found) == len(of)
            assert all(count[code] >= n for count in found for code, n in TAKES.items()), found


def instructions(cubin: bytes):
    """Name and numbers of instructions of each kernel in an ELF file of 64 bits, 16 bytes each."""
    [at] = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    names = sections[of_names][4]
    for name, _, _, _, start, length in sections:
        text = cubin[names + name : cubin.index(b"\0", names + name)].decode()
        if text.startswith(".text."):
            words = range(start, start + length, 16)
            yield text, Counter(struct.unpack_from("<H", cubin, i)[0] & 0xFFF for i in words)
