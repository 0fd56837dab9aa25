"""Which way to run a recipe wins, why the others lose, and what fits where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ptm.common.units import GIB
from ptm.model.config import ModelConfig, Scale, num_parameters
from ptm.planner import states
from ptm.planner.hardware import Hardware, load
from ptm.planner.job import Job
from ptm.planner.memory import memory
from ptm.planner.price import plan_of, price, stages
from tests.planner.test_states import full

FOLDERS = [Path(__file__).parents[2] / "recipes" / "hardware"]
MACHINES = sorted(path.stem for path in FOLDERS[0].glob("*.yaml"))


def machine(name: str, **more: Any) -> Hardware:
    return replace(load(name, folders=FOLDERS), **more)


def test_the_fastest_that_fits_is_chosen() -> None:
    h200 = machine("8xH200")
    found = price(full(8, zero=0), h200)
    fitting = [other for other in stages(full(8, zero=0), h200) if other.memory.fits]
    assert found.step_s == min(other.step_s for other in fitting)  # type: ignore[type-var]
    assert price(full(8, zero=0), machine("8xH100")).job.zero == 3
    assert price(full(8, zero=2), machine("8xH100")).job.zero == 2  # what the recipe says is kept


def test_without_speeds_the_lowest_stage_that_fits() -> None:
    box = machine("h200-8", speed=None)
    assert price(full(64, 8, zero=0), box).job.zero == 1
    plan = plan_of(full(64, 8, zero=0), box, is_compared=True)
    assert plan.step_s is None and plan.spent == () and "a step takes" not in plan.text()


def test_no_clock_chooses_among_stages_that_add_in_different_orders() -> None:
    h200 = machine("8xH200")
    assert h200.speed is not None
    job = replace(full(64, 8, zero=0), batch_tokens=64 * 4096)  # one micro-batch
    ranked = sorted(stages(job, h200), key=lambda found: found.rank)
    measured = replace(h200, speed=replace(h200.speed, is_measured=True))
    assert ranked[0].job.zero != 1  # a clock would choose another
    assert price(job, measured).job.zero == 1
    plan = plan_of(job, measured, is_compared=True)
    assert plan.step_s is not None and any("faster" in o.verdict for o in plan.options)


def test_options_say_what_they_lose_by() -> None:
    plan = plan_of(full(8, zero=0), machine("8xH100"), is_compared=True)
    by_words = {option.words: option for option in plan.options}
    assert "more than is there" in by_words["engine.zero=2"].verdict
    assert any("faster" in option.verdict for option in plan.options)
    for option in plan.options:
        assert option.words in plan.text().replace("\n", " ") or "engine" in option.words


def test_more_ranks_of_ep_send_fewer_weights() -> None:
    sent = [plan_of(full(8, ep, zero=2), machine("8xH200")).wire_bytes for ep in (1, 2, 4, 8)]
    assert sent == sorted(sent, reverse=True)


@pytest.mark.parametrize("name", MACHINES)
def test_every_shipped_machine_has_times(name: str) -> None:
    hardware = machine(name)
    job = full(8, device=hardware.device)
    plan = plan_of(replace(job, zero=0), hardware)
    assert plan.step_s is not None and plan.step_s > 0
    assert plan.tokens_per_s == pytest.approx(job.batch_tokens / plan.step_s)
    assert sum(spent.seconds for spent in plan.spent) >= plan.step_s * 0.999


def test_bytes_per_tier() -> None:
    """Pages fill the GPU, then the host's memory, then the disk, and are all somewhere."""
    hardware = machine("h200-8", host_bytes=100 * GIB, ssd_bytes=2000 * GIB)
    job = full(1, has_ssd=True)
    plan = plan_of(job, hardware)
    pages = states.page_map(job)
    assert plan.fits and plan.tier_bytes["ssd"] == states.ssd_bytes(job)
    assert plan.tier_bytes["cpu"] == 100 * GIB // job.page_bytes * job.page_bytes
    assert plan.tier_bytes["gpu"] + plan.tier_bytes["cpu"] < pages.num_pages * job.page_bytes
    assert not plan_of(full(1), hardware).fits


def test_budgets_of_the_recipe_bind() -> None:
    """engine.cpu_bytes counts frames of weights and gradients too, as the engine does."""
    box = machine("laptop")
    job = replace(small_job(), cpu_bytes=64 * 2**20)
    found = memory(job, box)
    assert found.fits and {tier.name for tier in found.tiers} == {"cpu", "budget"}
    tight = memory(replace(job, cpu_bytes=8 * 2**20), box)
    assert not tight.fits and tight.worst.name == "budget"
    assert memory(replace(job, cpu_bytes=16 * 2**20, has_ssd=True), box).fits


def small_job() -> Job:
    from tests.planner.test_memory import make_job

    return make_job("debug", "bf16", "none")


def test_capacity_of_a_server_of_angelptm() -> None:
    """8 x A100-40G and 1 TB of RAM hold states of 55 B parameters (GPT) and 58 B (T5) there. Ours
    in RAM only, with as many bytes a parameter, 60.5 B; with the GPUs' memory, 69 B. Not known: how
    much of the RAM they could use, and the width of their models."""
    server = machine("a100-40g", host_bytes=int(0.97 * 1e12) // 8)
    in_ram = most_parameters(server, gpu_bytes=0)
    assert in_ram == pytest.approx(58e9, rel=0.05)
    assert in_ram == pytest.approx(55e9, rel=0.11)
    assert most_parameters(server, gpu_bytes=None) > 1.1 * in_ram


def most_parameters(hardware: Hardware, gpu_bytes: int | None) -> int:
    """The largest dense model of width 8192 that fits on eight ranks with ZeRO 3."""
    most = 0
    for layers in range(20, 120):
        model = ModelConfig(
            scale=Scale.full,
            vocab_size=50_304,
            hidden_size=8192,
            num_hidden_layers=layers,
            num_attention_heads=64,
            attention_projection_size=8192,
            num_experts=1,
            num_experts_per_tok=1,
            moe_intermediate_size=21_845,
        )
        job = replace(
            full(8), model=model, seq_len=2048, batch_tokens=8 * 2048, gpu_bytes=gpu_bytes
        )
        if memory(job, hardware).fits:
            most = num_parameters(model)
    return most
