"""The safetensors reader refuses what is odd, and agrees with the library on what is not."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ptm.checkpoint.safetensors_file import DTYPES, SafetensorsFile, SafetensorsWriter, as_bytes
from ptm.common.errors import CheckpointError, StorageError

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def put(folder: Path, header: object, data: bytes = bytes(24), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", size) + raw + data)
    return folder


def entry(**changes: object) -> dict[str, object]:
    return {"a": {**GOOD["a"], **changes}}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and as_bytes(a) == as_bytes(b)


def every_dtype() -> dict[str, torch.Tensor]:
    # Random bytes: NaN payloads, infinities and denormals come along.
    generator = torch.Generator().manual_seed(5)
    found = {}
    for code, dtype in DTYPES.items():
        raw = torch.randint(
            0, 2 if code == "BOOL" else 256, (6 * dtype.itemsize,), generator=generator
        )
        found[f"t.{code}"] = raw.to(torch.uint8).view(dtype).reshape(3, 2)
    return found | {"scalar": torch.tensor(1.5), "none": torch.empty(0, 4)}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    file = SafetensorsFile(tmp_path, "x.safetensors")
    assert file.metadata == {"k": "v"} and file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(file.read(name), tensor)
        if tensor.numel() > 1:
            assert same(file.read(name, 1, 2), tensor[1:2])


def test_library_reads_what_the_writer_writes(tmp_path: Path) -> None:
    tensors = every_dtype()
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", shapes) as file:
        for name in file.names:
            for row in tensors[name] if tensors[name].dim() else [tensors[name]]:
                file.write(name, row)
    again = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys()
    assert all(same(again[name], tensor) for name, tensor in tensors.items())
    assert SafetensorsFile(tmp_path, "x.safetensors").tensors.keys() == tensors.keys()


@pytest.mark.parametrize("order", [["b", "a"], ["a"], ["a", "a", "b"], ["a", "b", "b"]])
def test_writer_takes_each_tensor_once_in_order(tmp_path: Path, order: list[str]) -> None:
    shapes = {name: ((2,), torch.float32) for name in ("a", "b")}
    with (
        pytest.raises(AssertionError),
        SafetensorsWriter(tmp_path / "x.safetensors", shapes) as file,
    ):
        for name in order:
            file.write(name, torch.zeros(2))


def test_writer_reports_a_full_disk(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        shapes = {"a": ((4096,), torch.float32)}
        with (
            pytest.raises(StorageError, match="cannot be written"),
            SafetensorsWriter(tmp_path / "x.safetensors", shapes) as file,
        ):
            file.write("a", torch.zeros(4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


BAD = {
    "no file": (b"", None, "too short"),
    "cut in the length": (b"abc", None, "too short"),
    "header past the end": (json.dumps(GOOD).encode(), 10_000, "cut short"),
    "header of 2**63": (json.dumps(GOOD).encode(), 2**63, "at most"),
    "header of 9 MiB": (json.dumps(GOOD).encode(), 9 * 2**20, "at most"),
    "not JSON": (b"{oops", None, "not sound JSON"),
    "not UTF-8": (b'{"\xff": 1}', None, "not sound JSON"),
    "a list": ([], None, "must be a JSON object"),
    "nested": (b'{"a":' + b"[" * 100_000, None, "not sound JSON"),
    "many lists": (b'{"a":[' + b"[]," * 1_100_000 + b"[]]}", None, "lists"),
    "same name twice": (
        b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},' * 2,
        None,
        "JSON",
    ),
    "duplicate": (
        b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},'
        b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}',
        None,
        "twice",
    ),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}', None, "finite"),
    "1e999": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,24]}}', None, "finite"),
    "name is a path": ({"../../x": GOOD["a"]}, None, "must be named"),
    "name with newline": ({"a\nb": GOOD["a"]}, None, "must be named"),
    "empty name": ({"": GOOD["a"]}, None, "must be named"),
    "long name": ({"a" * 300: GOOD["a"]}, None, "must be named"),
    "unknown dtype": (entry(dtype="F31"), None, "known dtype"),
    "dtype a list": (entry(dtype=["F32"]), None, "known dtype"),
    "shape too large": (entry(shape=[2, 4]), None, "known dtype"),
    "shape of 2**62": (entry(shape=[2**62, 2**62]), None, "known dtype"),
    "shape of 10**400": (entry(shape=[10**400]), None, "known dtype"),
    "negative shape": (entry(shape=[-2, -3]), None, "known dtype"),
    "boolean shape": (entry(shape=[True, 6]), None, "known dtype"),
    "shape of floats": (entry(shape=[2.0, 3.0]), None, "known dtype"),
    "nine dims": (entry(shape=[1] * 7 + [2, 3]), None, "known dtype"),
    "offsets reversed": (entry(data_offsets=[24, 0]), None, "known dtype"),
    "three offsets": (entry(data_offsets=[0, 24, 24]), None, "known dtype"),
    "extra key": (entry(code="import os"), None, "known dtype"),
    "entry a number": ({"a": 3}, None, "known dtype"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **GOOD}, None, "strings"),
    "metadata a list": ({"__metadata__": [], **GOOD}, None, "strings"),
    "overlap": (GOOD | {"b": GOOD["a"]}, None, "overlaps"),
    "gap": (entry(shape=[2], data_offsets=[16, 24]), None, "gap"),
    "tail": (entry(shape=[2], data_offsets=[0, 8]), None, "as the header says"),
    "past the end": (entry(shape=[9], data_offsets=[0, 36]), None, "as the header says"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(tmp_path: Path, case: str) -> None:
    header, length, message = BAD[case]
    data = b"" if case in ("no file", "cut in the length") else bytes(24)
    put(tmp_path, header, data, length)
    if not data:
        (tmp_path / "x.safetensors").write_bytes(header)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(tmp_path, "x.safetensors")
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


def test_refuses_300_000_empty_tensors(tmp_path: Path) -> None:
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    put(tmp_path, {f"t{i}": empty for i in range(300_000)}, b"")
    with pytest.raises(CheckpointError, match="at most"):
        SafetensorsFile(tmp_path, "x.safetensors")


def test_the_good_one_is_good(tmp_path: Path) -> None:
    # The negative control of the table above.
    assert SafetensorsFile(put(tmp_path, GOOD), "x.safetensors").read("a").shape == (2, 3)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = (put(tmp_path, GOOD) / "x.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path, "x.safetensors")


def test_a_file_that_shrinks_later_is_refused(tmp_path: Path) -> None:
    file = SafetensorsFile(put(tmp_path, GOOD), "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 100)
    with pytest.raises(CheckpointError, match="changed"):
        file.read("a")


def test_only_regular_files_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    put(tmp_path, GOOD)
    (folder / "out.safetensors").symlink_to(tmp_path / "x.safetensors")
    (folder / "dir.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    put(folder, GOOD)
    (folder / "in.safetensors").symlink_to("x.safetensors")
    for name, message in {
        "out.safetensors": "link out of its folder",
        "dir.safetensors": "regular file",
        "pipe.safetensors": "regular file",
        "loop.safetensors": "cannot be opened|is missing",
        "none.safetensors": "missing",
        "../x.safetensors": "plain name",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            SafetensorsFile(folder, name)
    assert SafetensorsFile(folder, "in.safetensors").tensors
