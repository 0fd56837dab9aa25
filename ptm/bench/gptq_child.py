"""One tool of `ptm bench gptq` in a process of its own: quantize the workload, say what it took.

    PYTHON -P gptq_child.py TOOL WORKLOAD OUT '{"key": value}'

A peer's interpreter may lack ptm, so this file imports nothing but what the named tool needs. Last
it writes OUT.json: CPU seconds of quantizing and saving, over all threads, after imports and the
model's loading (ours reads the model as it goes, so that is in); the most memory the process held;
the tool's version. An error is written there in their place.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def ptm(workload: Path, out: Path, settings: dict[str, Any]) -> float:
    """Ours: the exporter that `ptm export` runs."""
    torch = importlib.import_module("torch")
    config = importlib.import_module("ptm.export.config")
    walk = importlib.import_module("ptm.export.ordinary").OrdinaryWalk
    export = importlib.import_module("ptm.export.quantize").export
    ids = torch.tensor(_tokens(workload))
    method = config.Method(settings.pop("method", "gptq"))
    job = config.ExportConfig(
        run=str(workload), out=str(out), rows=len(ids), method=method, **settings
    )
    rows_of = None if method is config.Method.nearest else lambda n: (ids[:n], 0 * ids[:n])
    began = time.process_time()
    export(job, walk(workload, job.format), rows_of, lambda name: None)
    return time.process_time() - began


def llmcompressor(workload: Path, out: Path, settings: dict[str, Any]) -> float:
    """GPTQModifier, W4A16; settings: dtype of the model, observer of the scales."""
    oneshot = importlib.import_module("llmcompressor").oneshot
    modifier = importlib.import_module("llmcompressor.modifiers.gptq").GPTQModifier
    grid = importlib.import_module("compressed_tensors.quantization")
    transformers = importlib.import_module("transformers")
    rows = _tokens(workload)
    text = importlib.import_module("datasets").Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(workload, dtype=settings.pop("dtype", "auto"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(workload)
    weights = grid.QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=128, **settings
    )
    scheme = grid.QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    began = time.process_time()
    oneshot(
        model=model,
        dataset=text,
        recipe=recipe,
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        tokenizer=tokenizer,
    )
    model.save_pretrained(out, save_compressed=True)
    return time.process_time() - began


def gptqmodel(workload: Path, out: Path, settings: dict[str, Any]) -> float:
    """GPTQModel on the CPU; settings: dtype of the model, else keys of its GPTQConfig."""
    load = importlib.import_module("gptqmodel").GPTQModel.load
    config = importlib.import_module("gptqmodel.quantization").GPTQConfig
    keys = {"dtype": settings.pop("dtype")} if "dtype" in settings else {}
    model = load(str(workload), config(bits=4, group_size=128, **settings), device="cpu", **keys)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in _tokens(workload)]
    began = time.process_time()
    model.quantize(rows, batch_size=1)
    model.save(str(out))
    return time.process_time() - began


TOOLS = {"ptm": ptm, "llmcompressor": llmcompressor, "gptqmodel": gptqmodel}


def _tokens(workload: Path) -> list[list[int]]:
    return json.loads((workload / "tokens.json").read_text())["calibration"]


def _peak_bytes() -> int:
    """The most memory this process ever held, as Linux counts it."""
    status = Path("/proc/self/status").read_text().splitlines()
    words = next(text.split() for text in status if text.startswith("VmHWM"))
    return int(words[1]) * 1024


def main(tool: str, workload: str, out: str, settings: str) -> None:
    found: dict[str, Any]
    try:
        version = importlib.import_module("importlib.metadata").version(tool)
        importlib.import_module("torch").set_num_threads(1)
        seconds = TOOLS[tool](Path(workload), Path(out), json.loads(settings))
        found = {"cpu_s": seconds, "peak_bytes": _peak_bytes(), "version": version}
    except Exception as error:  # of a peer, whatever it is: it becomes its row of the table
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        found = {"error": lines[0][:200]}
    Path(f"{out}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
