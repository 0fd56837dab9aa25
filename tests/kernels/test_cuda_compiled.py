"""What nvcc makes of the CUDA kernels, for both architectures: no register goes to memory, and rows
are read sixteen bytes at a time."""

import re
import shutil
import subprocess

import pytest

from tests.support.emulated import build_script, cuda_sources

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
# A kernel's name has the widths that it is made for; these read rows, so must have the wide ones.
WIDE = {
    "adamw/cuda": ("Sweep",),
    "add_pieces/cuda": ("Add",),
    "fake_quant/cuda": ("OnGrid",),
    "moe_plan/cuda": (),
    "rmsnorm/cuda": ("Forward", "Backward"),
    "rope/cuda": ("Turn",),
    "router/cuda": (),
    "wq/cuda": ("Linear",),
    "wq/cuda_moe": ("Inner", "Outer", "Combine"),
}


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
