"""Tensors assembled from the shards that torch's writer makes, and refused when one is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ptm.checkpoint.source import FolderSource, RowsSource, all_rows, stream
from ptm.common.errors import CheckpointError
from ptm.model.hf_names import Piece, Rows
from tests.support.ranks import run_ranks

SHAPES = {"even": (6, 4), "uneven": (7, 3, 2), "fewer_rows_than_ranks": (2, 5), "flat": (11,)}


def whole() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def save(rank: int, world: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    state = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in whole().items()}
    writer = HuggingFaceStorageWriter(
        folder, {name: i % 2 + 1 for i, name in enumerate(SHAPES)}, save_distributed=True
    )
    dcp.save(state, storage_writer=writer)


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.safetensors")]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(3, save, str(folder))
    return folder


def test_assembles_what_three_ranks_saved(sharded: Path) -> None:
    source = FolderSource(sharded, files_in(sharded))
    assert set(source.names()) == SHAPES.keys()
    for name, tensor in whole().items():
        assert source.info(name) == (tensor.shape, torch.float32)
        assert torch.equal(source.read(name), tensor)
        for start in range(len(tensor) + 1):
            for stop in range(start, len(tensor) + 1):
                assert torch.equal(source.read(name, start, stop), tensor[start:stop])
    assert len(source.files_of("uneven")) == 3


def test_a_missing_first_or_middle_shard_is_named(sharded: Path) -> None:
    for gone in source_files(sharded, "uneven")[:2]:
        with pytest.raises(CheckpointError, match=r"tensor=\w+: lacks row"):
            FolderSource(sharded, [name for name in files_in(sharded) if name != gone])


def test_a_missing_last_shard_shows_in_the_shape(sharded: Path) -> None:
    # Only a manifest or a model knows how many rows there should be.
    last = source_files(sharded, "uneven")[2]
    source = FolderSource(sharded, [name for name in files_in(sharded) if name != last])
    assert source.info("uneven").shape == (6, 3, 2)


def source_files(folder: Path, name: str) -> list[str]:
    return FolderSource(folder, files_in(folder)).files_of(name)


def put(folder: Path, file: str, tensors: dict[str, torch.Tensor], info: object = None) -> None:
    metadata = None if info is None else {"DCP_SHARDING_INFO": json.dumps(info)}
    save_file(tensors, folder / f"{file}.safetensors", metadata=metadata)


def at(*offsets: int) -> dict[str, object]:
    return {"a": {"saved_offsets": list(offsets)}}


BAD = {
    "twice": ([at(0, 0), at(0, 0)], "is twice in x0.safetensors and x1.safetensors"),
    "overlap": ([at(0, 0), at(1, 0)], "is twice"),
    "gap": ([at(0, 0), at(3, 0)], "lacks row 2"),
    "no first row": ([at(1, 0), at(3, 0)], "lacks row 0"),
    "columns": ([at(0, 0), at(0, 3)], "cut along another dim"),
    "negative": ([at(0, 0), at(-2, 0)], "is not the place"),
    "too few offsets": ([at(0, 0), at(2)], "is not the place"),
    "huge": ([at(0, 0), at(2**64, 0)], "is not the place"),
    "a boolean": ([at(0, 0), {"a": {"saved_offsets": [True, 0]}}], "is not the place"),
    "of another tensor": ([at(0, 0), {"b": {"saved_offsets": [2, 0]}}], "is not the place"),
    "a list": ([at(0, 0), []], "must be a JSON object"),
    "a string": ([at(0, 0), {"a": "2"}], "is not the place"),
    "no places at all": ([None, None], "is twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_shards(tmp_path: Path, case: str) -> None:
    infos, message = BAD[case]
    for i, info in enumerate(infos):
        put(tmp_path, f"x{i}", {"a": torch.ones(2, 3)}, info)
    with pytest.raises(CheckpointError, match=message) as caught:
        FolderSource(tmp_path, files_in(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [torch.ones(2, 4), torch.ones(2, 3).half(), torch.ones(2, 3, 1)])
def test_refuses_shards_of_different_tensors(tmp_path: Path, other: torch.Tensor) -> None:
    put(tmp_path, "x0", {"a": torch.ones(2, 3)}, at(0, 0))
    put(tmp_path, "x1", {"a": other}, at(*([2] + [0] * (other.dim() - 1))))
    with pytest.raises(CheckpointError, match="tensor=a: differs between"):
        FolderSource(tmp_path, files_in(tmp_path))


@pytest.mark.parametrize("piece_bytes", [1, 24, 10**6])
def test_rows_and_streams_of_other_tensors(tmp_path: Path, piece_bytes: int) -> None:
    a, b = torch.rand(4, 3), torch.rand(2, 3)
    put(tmp_path, "x", {"a": a, "b": b})
    stacked = Rows((2, 3, 3), (Piece("b", 0, 2), Piece("a", 0, 3), Piece("b", 1, 2)))
    rows = RowsSource(FolderSource(tmp_path, ["x.safetensors"]), {"s": stacked})
    wanted = torch.cat([b, a[:3], b[1:]]).reshape(2, 3, 3)
    assert torch.equal(rows.read("s"), wanted)
    assert torch.equal(rows.read("s", 1, 2), wanted[1:])
    pieces = list(stream(rows, all_rows(rows, "s"), piece_bytes))
    assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces]), wanted.reshape(-1))
    assert len(pieces) == (1 if piece_bytes == 10**6 else 2)


def test_torch_writes_what_this_test_believes(sharded: Path) -> None:
    # Should torch change its words, this fails and not a user's checkpoint.
    name = source_files(sharded, "uneven")[1]
    with safe_open(sharded / name, "pt") as file:
        info = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    assert info["uneven"] == {"saved_offsets": [3, 0, 0]}
    assert load_file(sharded / name)["uneven"].shape == (3, 3, 2)
