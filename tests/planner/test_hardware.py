"""What one rank may use: cgroups of both versions, limits of the process, described machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ptm.common.errors import RecipeError
from ptm.common.units import GIB, MIB
from ptm.planner.hardware import cgroup_free, counted, detect, load

SHIPPED = Path(__file__).parents[2] / "recipes" / "hardware"


def make_group(folder: Path, version: int, *, limit: str, usage: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }
    (folder / names[version][0]).write_text(f"{limit}\n")
    (folder / names[version][1]).write_text(f"{usage}\n")
    cache_name = {1: "total_inactive_file", 2: "inactive_file"}[version]
    (folder / "memory.stat").write_text(f"anon 1\n{cache_name} {cache}\nother 7\n")


def test_cgroup_v2_counts_parents_and_cache(tmp_path: Path) -> None:
    make_group(tmp_path / "a" / "b", 2, limit="max", usage=5, cache=0)
    make_group(tmp_path / "a", 2, limit="1000", usage=700, cache=100)
    membership = tmp_path / "membership"
    membership.write_text("0::/a/b\n")
    assert [free for free, _ in cgroup_free(tmp_path, membership)] == [400]


def test_cgroup_v1_without_limit_and_with_one(tmp_path: Path) -> None:
    make_group(tmp_path / "memory" / "job", 1, limit="900", usage=1000, cache=50)
    make_group(tmp_path / "memory", 1, limit=str(2**63 - 4096), usage=10, cache=0)
    membership = tmp_path / "membership"
    membership.write_text("7:cpu,cpuacct:/\n4:hugetlb,memory:/job\n")
    assert [free for free, _ in cgroup_free(tmp_path, membership)] == [0]


def test_cgroup_of_a_container_is_the_root(tmp_path: Path) -> None:
    make_group(tmp_path, 2, limit="500", usage=100, cache=0)
    membership = tmp_path / "membership"
    membership.write_text("0::/docker/not-visible-in-here\n")
    assert [free for free, _ in cgroup_free(tmp_path, membership)] == [400]
    assert list(cgroup_free(tmp_path, tmp_path / "absent")) == []


def test_ranks_share_a_machine() -> None:
    one, four = detect(device="cpu"), detect(local_ranks=4, device="cpu")
    assert one.rank_bytes > four.rank_bytes > one.rank_bytes / 6
    assert "/ 4 ranks" in four.why


def test_address_space_limit_binds() -> None:
    code = (
        "import resource\nfrom ptm.planner.hardware import detect\n"
        "free = detect(device='cpu').rank_bytes\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "found = detect(device='cpu')\nprint(free > 2**30, found.rank_bytes < 2**30, found.why)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip().endswith("True RLIMIT_AS of 1.00 GiB")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_machines_load(path: Path) -> None:
    found = load(path.stem, folders=[SHIPPED])
    assert found.name == path.stem and found.rank_bytes > GIB


def test_machine_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "box.yaml").write_text("device: cpu\nranks_per_node: 4\nmemory: 400 MiB\n")
    found = load(str(tmp_path / "box.yaml"))
    assert (found.device, found.ranks_per_node) == ("cpu", 4)
    assert found.rank_bytes == pytest.approx(97 * MIB, rel=1e-6)


GOOD = "device: cpu\nranks_per_node: 4\nmemory: 4GiB\n"


@pytest.mark.parametrize(
    "body, message",
    [
        (GOOD.replace("cpu", "tpu"), "hardware.device=tpu: must be cpu or cuda"),
        (GOOD.replace("4\n", "0\n", 1), "hardware.ranks_per_node=0"),
        (GOOD.replace("4\n", "true\n", 1), "hardware.ranks_per_node=True"),
        (GOOD.replace("4GiB", "much"), "hardware.memory=much"),
        (
            GOOD + "more: 1\n",
            "must have the keys device, ranks_per_node, memory, .*; it has: .*more",
        ),
        ("- 1\n", "it has: list"),
        ("", "it has: NoneType"),
        ("a: [", "must be readable YAML"),
        ("a: !!python/object/apply:os.system [x]", "must be readable YAML"),
        ("\x00", "must be readable YAML"),
    ],
)
def test_bad_description(tmp_path: Path, body: str, message: str) -> None:
    path = tmp_path / "box.yaml"
    path.write_text(body)
    with pytest.raises(RecipeError, match=message):
        load(str(path))


def test_unknown_machine_names_the_known() -> None:
    with pytest.raises(RecipeError, match="hardware=h1000: must be .*; known are: .*h100-8"):
        load("h1000", folders=[SHIPPED])


@pytest.mark.parametrize(
    "name, stem",
    [
        ("8xH200", "h200-8"),
        ("16xh100", "h100-8"),
        ("8xA100-40G", "a100-40g-8"),
        ("8xa100-80g-8", "a100-80g-8"),
        ("h200", "h200-8"),
        ("laptop", "laptop"),
        ("2xLaptop", "laptop"),
    ],
)
def test_counted_names(name: str, stem: str) -> None:
    assert load(name, folders=[SHIPPED]).name == stem
    assert counted(name)[0] == (int(name.split("x")[0]) if name[0].isdigit() else None)


def test_described_tiers_and_speed() -> None:
    found = load("8xH200", folders=[SHIPPED])
    assert found.host_bytes == pytest.approx(0.97 * 2048 * GIB / 8, rel=1e-6)
    assert found.ssd_bytes > found.host_bytes
    assert found.speed is not None
    # 788 of 989 TFLOP/s were measured; projections reach 0.90 of that
    assert found.speed.rate("bf16", "dense") == pytest.approx(0.9 * 788e12, rel=0.01)


SPEED = """speed:
  bf16: {dense: 1e12, experts: 1e12, attention: 1e12, head: 1e12}
  memory: 1e10
  link: 1e9
  network: 1e9
  latency: 1e-4
  adam: 1e8
  host: 1e9
  host_adam: 1e8
  ssd_read: 1e9
  ssd_write: 1e9
"""


@pytest.mark.parametrize(
    "changed, message",
    [
        (("  adam: 1e8\n", ""), "hardware.speed=: must have the keys .*adam"),
        (("adam: 1e8", "adam: fast"), "hardware.speed.adam=fast: must be a number above 0"),
        (("link: 1e9", "link: -1"), "hardware.speed.link=-1: must be a number above 0"),
        (("link: 1e9", "link: true"), "hardware.speed.link=True: must be a number above 0"),
        (("dense: 1e12, ", ""), "hardware.speed.bf16=.*: must have the keys dense, experts"),
        (("  link", "  more: 1\n  link"), "hardware.speed=.*it has: .*more"),
    ],
)
def test_bad_speed(tmp_path: Path, changed: tuple[str, str], message: str) -> None:
    path = tmp_path / "box.yaml"
    path.write_text(GOOD + SPEED)
    speed = load(str(path)).speed
    assert speed is not None and speed.rate("fp32", "head") == 1e12 / 16
    path.write_text(GOOD + SPEED.replace(*changed))
    with pytest.raises(RecipeError, match=message):
        load(str(path))
