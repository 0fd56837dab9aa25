"""An export that is being made: a folder beside its place, layer by layer; a kill leaves it good.

    OUT.partial/  settings.json               what is being made; another export is not mixed in
                  model-00002-of-00005...     one file a layer, whole once it has its name
                  rows.safetensors            rows for the next layer, and how many layers are done
                  records-00001.json          what was found of each linear of a layer

A layer is done when its rows file is renamed into place, the last of its three; starting again goes
on behind it. `finish` gives the folder its name.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ptm.checkpoint.folders import disk_errors, sync_folder
from ptm.checkpoint.manifest import write_file
from ptm.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter
from ptm.checkpoint.shards import refuse_taken
from ptm.checkpoint.untrusted import read_json
from ptm.common.errors import CheckpointError, line

SETTINGS = "settings.json"
_ROWS = "rows-{:05d}.safetensors"
_RECORDS = "records-{:05d}.json"


def check_place(out: Path) -> None:
    """Raise CheckpointError or StorageError where no export can be written; leaves no folder."""
    refuse_taken(out)
    folder = folder_of(out)
    with disk_errors(out, is_out=True):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    if not any(folder.iterdir()):  # in one that was begun there are files
        folder.rmdir()


def folder_of(out: Path) -> Path:
    """Where an export to `out` is until it is whole."""
    return out.with_name(f"{out.name}.partial")


class Partial:
    """Raises CheckpointError where the place is taken, StorageError where the disk fails."""

    def __init__(self, out: Path, settings: Mapping[str, Any], num_files: int) -> None:
        self.out, self.num_files = out, num_files
        self.folder = folder_of(out)
        refuse_taken(out)
        made = json.dumps(dict(settings), indent=1, sort_keys=True)
        with disk_errors(out, is_out=True):
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / SETTINGS).exists():
                found = read_json(self.folder, SETTINGS)
                if found != json.loads(made):
                    keys = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
                    rule = f"holds another export that was begun ({', '.join(keys)} differ)"
                    raise CheckpointError(line("out", self.folder, rule, "remove it to start anew"))
            else:
                write_file(self.folder / SETTINGS, made.encode())

    @property
    def num_done(self) -> int:
        """Layers that are whole."""
        done = [int(p.stem.partition("-")[2]) for p in self.folder.glob("rows-*.safetensors")]
        return max(done, default=0)

    def rows(self) -> dict[str, Tensor]:
        """Rows for the next layer, as they were given."""
        file = SafetensorsFile(self.folder, _ROWS.format(self.num_done))
        return {name: file.read(name) for name in file.tensors}

    def records(self) -> list[Any]:
        """What was found in all layers that are done, in order."""
        names = [_RECORDS.format(i + 1) for i in range(self.num_done)]
        return [r for name in names for r in read_json(self.folder, name)["linears"]]

    def file_name(self, index: int) -> str:
        """Of shard `index`; 0 is what is in no layer."""
        return f"model-{index + 1:05d}-of-{self.num_files:05d}.safetensors"

    def write_shard(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        self._write(self.file_name(index), tensors)

    def finish_layer(self, layer: int, rows: Mapping[str, Tensor], records: list[Any]) -> None:
        """`layer` counts from 0; its shard is written."""
        with disk_errors(self.out, is_out=True):
            name = _RECORDS.format(layer + 1)
            (self.folder / name).unlink(missing_ok=True)
            write_file(self.folder / name, json.dumps({"linears": records}).encode())
        self._write(_ROWS.format(layer + 1), rows)
        (self.folder / _ROWS.format(layer)).unlink(missing_ok=True)

    def finish(self) -> None:
        """What only the work needed goes, and the folder gets its name."""
        with disk_errors(self.out, is_out=True):
            for pattern in ("rows-*", "records-*", SETTINGS, "*.tmp"):
                for path in self.folder.glob(pattern):
                    path.unlink()
            sync_folder(self.folder)
            if self.out.is_dir():
                self.out.rmdir()
            os.rename(self.folder, self.out)
            sync_folder(self.out.parent)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        path = self.folder / f"{name}.tmp"
        with disk_errors(self.out, is_out=True):
            path.unlink(missing_ok=True)
        header = {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
        with SafetensorsWriter(path, header, {"format": "pt"}) as file:
            for tensor in file.names:
                file.write(tensor, tensors[tensor].contiguous())
        with disk_errors(self.out, is_out=True):
            os.rename(path, self.folder / name)
            sync_folder(self.folder)
