"""Small paged engines, and the numbers of one process that they must come to."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptm.data.pack import Batch
from ptm.engine.config import EngineConfig
from ptm.engine.engine import PagedEngine
from ptm.engine.layout import Held, Layout, PageMap
from ptm.engine.open_store import TierOpener, Tiers
from ptm.engine.stream import Streams
from ptm.mesh.mesh import Mesh
from ptm.mesh.peers import Peers
from ptm.model.adapter import add_adapter, use_adapter
from ptm.model.config import ModelConfig
from ptm.model.init import new_weight
from ptm.model.lora_config import ALL_WEIGHTS, AdapterConfig
from ptm.model.transformer import Transformer
from ptm.optim.adamw import AdamW
from ptm.optim.config import OptimConfig
from ptm.parallel.apply import materialize_buffers, share_experts, units_of
from ptm.parallel.recompute import recompute_blocks

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    attention_projection_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    max_position_embeddings=64,
    initializer_range=0.1,
)
ROWS, LENGTH = 8, 16
OPTIM = OptimConfig()


def in_memory(pages: PageMap, layout: Layout, compute_bytes: int) -> Tiers:
    return Tiers(PlainStore(pages))


class PlainStore:
    """Every page in memory, nothing moves."""

    def __init__(self, pages: PageMap) -> None:
        self.pages = [
            torch.zeros(pages.page_bytes, dtype=torch.uint8) for _ in range(pages.num_pages)
        ]

    def hold(self, page: int, *, write: bool = False) -> Tensor:
        return self.pages[page]

    def release(self, page: int, *, dirty: bool = False) -> None:
        pass

    def discard(self, pages: Any) -> None:
        pass

    def note(self, what: str) -> None:
        pass

    def commit(self, step: int, meta: dict[str, Any]) -> None:
        raise AssertionError("there is no disk")

    def wait_commit(self) -> None:
        pass

    def undo(self) -> None:
        raise AssertionError("there is no disk")

    def report(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def batch(step: int, rows: slice = slice(None), model: ModelConfig = MODEL) -> Batch:
    """Rows of the batch of a step, which is the same on any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, model.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.9
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous()
    whole = Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=mask,
        position_ids=positions,
        document_ids=torch.zeros(ROWS, LENGTH, dtype=torch.int64),
    )
    return Batch(*(tensor[rows] for tensor in whole))


def make_engine(
    mesh: Mesh,
    *,
    zero: int = 1,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    config: EngineConfig | None = None,
    model: ModelConfig = MODEL,
    open_tiers: Any = in_memory,
    clip: float = 1.0,
    num_exact: int = 0,
    streams: Streams | None = None,
    adapter: AdapterConfig = ALL_WEIGHTS,
    held: Held | None = None,
    initial: Callable[[str, torch.Size], Tensor | None] = lambda name, shape: None,
) -> PagedEngine:
    """An engine with the weights of seed 1, or `initial` ones. streams: of a device, or of what
    stands in for one."""
    transformer = Transformer(model, dtype=dtype, device="meta")
    add_adapter(transformer, adapter)
    units = units_of(transformer, held)
    materialize_buffers(transformer, mesh.device)
    config = config or EngineConfig(page_mib=1, ep=mesh.ep.size())
    share_experts(transformer, mesh, config.chunks)
    if recompute:
        recompute_blocks(transformer.model.layers)
    if config.cpu_bytes or config.gpu_bytes or config.ssd_path or streams:
        peers = Peers(mesh.background)
        open_tiers = TierOpener(config, mesh, peers, zero=zero, run_id="test", streams=streams)
    engine = PagedEngine(
        transformer,
        units,
        mesh=mesh,
        config=config,
        zero=zero,
        dtype=dtype,
        update=AdamW(OPTIM),
        clip=clip,
        num_exact=num_exact,
        open_tiers=open_tiers,
    )
    use_adapter(transformer, adapter)
    named = dict(transformer.named_parameters())
    missing = list(named)
    if engine.restored is not None:
        engine.restore()
        engine.updates = engine.restored[1]["updates"]
        missing = [n for n, p in named.items() if not (engine.has_frozen or p.requires_grad)]
    for name, shape in engine.shapes().items():
        if name in missing:
            given = initial(name, torch.Size(shape))
            engine.fill(name, new_weight(model, name, shape, seed=1) if given is None else given)
    engine.publish()
    return engine


def backward(
    engine: PagedEngine, mesh: Mesh, step: int, micro_batches: int = 1, lr: float = 1e-2
) -> Any:
    """Forward and backward of this rank's rows of a step; returns (nll sum, tokens)."""
    engine.model.train()
    per_rank = ROWS // mesh.world
    per_batch = -(-per_rank // micro_batches)
    nll, tokens = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for i in range(micro_batches):
        first = mesh.rank * per_rank + i * per_batch
        last = min(first + per_batch, (mesh.rank + 1) * per_rank)
        rows = batch(step, slice(first, max(first, last)))
        loss = engine.model.loss(Batch(*(tensor.to(mesh.device) for tensor in rows)))
        nll, tokens = nll + loss.nll_sum.detach(), tokens + loss.tokens
        engine.backward(loss.total, is_last=i == micro_batches - 1, tokens=tokens, lr=lr)
    return nll, tokens


def run_steps(
    engine: PagedEngine,
    mesh: Mesh,
    steps: range,
    *,
    micro_batches: int = 1,
    lr: float = 1e-2,
    commit: bool = True,
) -> list[Any]:
    outcomes = []
    for step in steps:
        nll, tokens = backward(engine, mesh, step, micro_batches, lr)
        outcomes.append(engine.step(nll_sum=nll, tokens=tokens, lr=lr, flags=[]))
        if commit:
            engine.commit(step + 1, {"updates": engine.updates})
    return outcomes


def whole_state(engine: PagedEngine) -> dict[str, tuple[int, np.ndarray]]:
    """This rank's rows of every tensor: name -> (first row, rows), as a pipe can send them."""
    return {name: (rows.first_row, rows.read().numpy()) for name, rows in engine.state().items()}


def assemble(states: list[dict[str, tuple[int, np.ndarray]]]) -> dict[str, Tensor]:
    """Whole tensors as stored, from all ranks' rows."""
    whole = {}
    for name in states[0]:
        parts = sorted((s[name] for s in states if len(s[name][1])), key=lambda part: part[0])
        at = 0
        for first, rows in parts:
            assert first == at, f"{name}: rows {at} to {first} are on no rank"
            at += len(rows)
        whole[name] = torch.from_numpy(np.concatenate([rows for _, rows in parts]))
    return whole


def reference(steps: range, lr: float = 1e-2, clip: float = 1.0) -> tuple[list[Any], Any]:
    """(loss, gradient norm) of each step and the model after them: plain autograd and AdamW."""
    model = Transformer(MODEL)
    for name, param in model.named_parameters():
        param.data.copy_(new_weight(MODEL, name, param.shape, seed=1))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": OPTIM.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
        foreach=False,
    )
    found = []
    for step in steps:
        model.train()
        loss = model.loss(batch(step))
        mean = loss.nll_sum / loss.tokens
        optimizer.zero_grad()
        mean.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        found.append((mean.item(), norm.item()))
    return found, model
