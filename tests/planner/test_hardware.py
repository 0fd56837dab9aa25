"""What one rank may use: cgroups of both versions, limits of the process, described machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ptm.common.errors import RecipeError
from ptm.common.units import GIB, MIB
from ptm.planner.hardware import cgroup_free, detect, load

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
