"""Model folders made to harm: nothing in them runs, and refusing one is quick and small."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "m32_a"
NAMES = ("config.json", "model.safetensors", "model.safetensors.index.json", "manifest.json")
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class Bomb:
    """Unpickled, it makes the canary's file."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def config(change: dict[str, Any]) -> Callable[[Path, Path], None]:
    def write(folder: Path, canary: Path) -> None:
        keys = json.loads((GOLDEN / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(keys))

    return write


def raw(name: str, content: bytes) -> Callable[[Path, Path], object]:
    return lambda folder, canary: (folder / name).write_bytes(content)


def header(entries: dict[str, Any], length: int | None = None) -> Callable[[Path, Path], object]:
    text = json.dumps(entries).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    return raw("model.safetensors", prefix + text + bytes(64))


def pickled(name: str) -> Callable[[Path, Path], object]:
    return lambda folder, canary: (folder / name).write_bytes(pickle.dumps(Bomb(canary)))


def pickles_only(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Bomb(canary)))


def code(folder: Path, canary: Path) -> None:
    (folder / "modeling.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    (folder / "__init__.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    config({"auto_map": {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}})(
        folder, canary
    )


def template(folder: Path, canary: Path) -> None:
    text = "{{ cycler.__init__.__globals__.os.mkdir('" + str(canary) + "') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))


def tar(folder: Path, canary: Path) -> None:
    with tarfile.open(folder / "model.safetensors", "w") as file:
        file.addfile(tarfile.TarInfo(f"../{canary.name}"), io.BytesIO())


def zip_bomb(folder: Path, canary: Path) -> None:
    with zipfile.ZipFile(folder / "model.safetensors", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x", bytes(2**26))


def pipe(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def link(name: str, target: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def sparse(name: str) -> Callable[[Path, Path], None]:
    def make(folder: Path, canary: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, 2**40)

    return make


EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
HOSTILE: dict[str, Callable[[Path, Path], object]] = {
    **{f"pickle in {name}": pickled(name) for name in NAMES},
    "pickles only": pickles_only,
    "trust_remote_code": config({"trust_remote_code": True}),
    "attention by name": config({"_attn_implementation_internal": "someone/kernel"}),
    "another class": config({"architectures": ["os.system"]}),
    "40 billion layers": config({"num_hidden_layers": 4 * 10**10}),
    "two billion layers": config({"num_hidden_layers": 2 * 10**9}),
    "wide": config({"hidden_size": 2**30, "attention_projection_size": 2**30}),
    "big vocabulary": config({"vocab_size": 2**31 - 1}),
    "nested config": raw("config.json", b'{"a":' * 150_000),
    "many lists": raw("config.json", b'{"a":[' + b"[]," * 300_000 + b"[]]}"),
    "long number": raw("config.json", b'{"vocab_size":' + b"9" * 10**6 + b"}"),
    "endless config": sparse("config.json"),
    "endless manifest": sparse("manifest.json"),
    "endless header": sparse("model.safetensors"),
    "config is a pipe": pipe("config.json"),
    "weights are a pipe": pipe("model.safetensors"),
    "manifest is a pipe": pipe("manifest.json"),
    "config is /dev/zero": link("config.json", "/dev/zero"),
    "config is a loop": link("config.json", "config.json"),
    "config is /etc/passwd": link("config.json", "/etc/passwd"),
    "weights are a device": link("model.safetensors", "/dev/zero"),
    "300,000 tensors": header({f"t{i}": EMPTY for i in range(300_000)}),
    "100,000 tensors": header({f"t{i}": EMPTY for i in range(100_000)}),
    "2**63 header": header({}, length=2**63),
    "huge shape": header({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}),
    "huge empty": header({"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}),
    "overlap": header(
        {n: {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]} for n in ("a", "b")}
    ),
    "nested header": raw("model.safetensors", struct.pack("<Q", 4 * 2**20) + b"[" * 4 * 2**20),
    "tar": tar,
    "zip bomb": zip_bomb,
}
HARMLESS: dict[str, Callable[[Path, Path], object]] = {
    "nothing": lambda folder, canary: None,
    "auto_map and its code": code,
    "chat template": template,
    **{f"pickle in {name}": pickled(name) for name in (*TOKENIZER_NAMES, "training_args.bin")},
}

# Every case in one fresh process, so that its peak bounds each of them.
CHILD = """
    import json, sys, time
    from pathlib import Path
    from ptm.checkpoint.load_model import load_model
    from ptm.common.errors import PtmError
    from ptm.export.convert import ConvertConfig, convert
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for folder in sorted(root.iterdir()):
        row = found[folder.name] = []
        how = ConvertConfig(source=str(folder), out=str(out / folder.name))
        for job in (lambda: convert(how), lambda: load_model(folder)):
            started = time.monotonic()
            try:
                job()
                row.append([0, "", time.monotonic() - started])
            except PtmError as error:
                row.append([error.exit_code, str(error), time.monotonic() - started])
                break  # both open a folder in the same way
    status = open("/proc/self/status").read().split()
    found["peak_bytes"] = int(status[status.index("VmHWM:") + 1]) * 1024
    print("RESULT" + json.dumps(found))
"""


def attempt(tmp_path: Path, cases: dict[str, Callable[[Path, Path], object]]) -> dict[str, Any]:
    canary = tmp_path / "canary"
    (tmp_path / "out").mkdir()
    for name, make in cases.items():
        folder = tmp_path / "cases" / name.replace("/", "_")
        folder.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (folder / file).write_bytes((GOLDEN / file).read_bytes())
        make(folder, canary)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), tmp_path / "cases", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert not canary.exists(), "something in a model folder was executed"
    return json.loads(done.stdout.rpartition("RESULT")[2])


def test_hostile_folders_are_refused_quickly_in_little_memory(tmp_path: Path) -> None:
    found = attempt(tmp_path, HOSTILE)
    assert found.pop("peak_bytes") < 500 * 10**6
    assert len(found) == len(HOSTILE)
    for name, row in found.items():
        for exit_code, message, seconds in row:
            assert exit_code == 4 and message.isprintable(), (name, message)
            assert seconds < 5, (name, seconds)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_harmless_loads_and_nothing_of_it_runs(tmp_path: Path) -> None:
    found = attempt(tmp_path, HARMLESS)
    found.pop("peak_bytes")
    assert {
        name: [exit_code for exit_code, *_ in row] for name, row in found.items()
    } == dict.fromkeys(HARMLESS, [0, 0])
    for path in (tmp_path / "out").rglob("*"):
        assert path.suffix != ".py" and path.name != "training_args.bin"


def test_the_canary_sings_where_a_pickle_is_read(tmp_path: Path) -> None:
    # The negative control: reading the bomb as the pickle that it is does run it.
    canary = tmp_path / "canary"
    with pytest.raises(FileExistsError):
        for _ in range(2):
            pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()
