"""What the modes dpo and grpo are made of: batches of pairs, rollouts with rewards, evaluations
(ptm/modes.py). The losses are in ptm/trainer/policy.py.

A rollout is a function of the step and the weights: prompts by the order of rows, each answer drawn
from numbers seeded by (train.seed, step, prompt, sample), in micro-batches of whole groups that are
composed alike on any number of ranks. So nothing of it is kept: after a kill it is made again. It
runs through the model that is trained, shards and all; ranks go on until all of them have ended.
Asked to stop, a rank scores no further answer, and after the micro-batch all ranks leave; what is
made of a step is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptm.common.errors import RecipeError, Requeue, line
from ptm.data.loader import Loader
from ptm.data.pack import Batch
from ptm.data.preferences import Order, Pair, Prompt, Reference, padded
from ptm.data.rewards import Rewarder, RewardError, Scored
from ptm.mesh.mesh import Mesh
from ptm.mesh.peers import Peers
from ptm.model.generate import recorded_routes, row_seed
from ptm.model.transformer import Transformer
from ptm.parts import say
from ptm.recipe import Recipe
from ptm.trainer.objectives import GrpoBatch, PairBatch
from ptm.trainer.policy import advantages, dpo
from ptm.trainer.policy_config import GrpoConfig
from ptm.trainer.signals import StopRequest


def check_rows(recipe: Recipe, mesh: Mesh, *, unit: int) -> int:
    """Units of `unit` rows in a step. Raises: RecipeError unless every rank gets as many whole
    micro-batches."""
    train = recipe.train
    rows, micro = train.batch_tokens // train.seq_len, train.micro_batch_size
    if rows % (micro * mesh.world):
        rule = (
            f"is {rows} rows of train.seq_len={train.seq_len}, which do not give each of "
            f"{mesh.world} ranks as many micro-batches of {micro}"
        )
        whole = max(rows // (micro * mesh.world), 1) * micro * mesh.world * train.seq_len
        raise RecipeError(
            line("train.batch_tokens", train.batch_tokens, rule, f"set train.batch_tokens={whole}")
        )
    return rows // unit


class Pairs:
    """This rank's pairs of a step with their reference; the evaluation of the held-out ones."""

    def __init__(
        self, recipe: Recipe, mesh: Mesh, model: Transformer, sides: Any, *, filler_id: int
    ) -> None:
        self.recipe, self.mesh, self.model, self.filler_id = recipe, mesh, model, filler_id
        self.per_step = check_rows(recipe, mesh, unit=2)
        self.train: list[Pair] = sides.train
        self.held_out: list[Pair] = sides.held_out[: recipe.dpo.eval_pairs]
        self.pairs = [*self.train, *self.held_out]
        self.micro = recipe.train.micro_batch_size // 2
        self.reference = Reference(recipe.run_dir / "reference.f32", self.pairs)
        self.loader = Loader(
            Order(self.train, recipe.train.seed),  # type: ignore[arg-type]
            rows_per_step=self.per_step,
            rank=mesh.rank,
            world=mesh.world,
            micro_batch_size=self.micro,
        )

    def micro_batches(self, step: int) -> list[PairBatch]:
        return [self.batch(numbers) for numbers in self.loader.micro_batches(step)]  # type: ignore

    def batch(self, numbers: Sequence[int]) -> PairBatch:
        answers = [a for n in numbers for a in (self.pairs[n].chosen, self.pairs[n].rejected)]
        batch = on_device(padded(answers, self.filler_id), self.mesh.device)
        rows = [row for n in numbers for row in (2 * n, 2 * n + 1)]
        reference = self.reference.rows(rows, batch.labels.shape[1])
        return PairBatch(batch, reference.to(self.mesh.device))

    def refer(self, *, is_new: bool) -> None:
        """Have the reference: of the weights as they are in a new run, else the kept one."""
        if not is_new:
            self.reference.load()
            return
        values = torch.from_numpy(self.reference.values)
        for numbers, is_counted in self._parts(range(len(self.pairs))):
            found = self._log_probs(self.batch(numbers).batch).cpu().numpy()
            if not is_counted:
                continue
            for i, row in enumerate(row for n in numbers for row in (2 * n, 2 * n + 1)):
                self.reference.put(row, found[i])
        # Each rank has filled its part, and the others' are zero.
        values.copy_(self.mesh.sum_counts(values.to(self.mesh.device)).cpu())
        if self.mesh.is_main:
            self.reference.save()

    def evaluate(self) -> dict[str, float]:
        """Of held-out pairs: loss, accuracy (share with a margin above 0), mean margin."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.mesh.device)
        first = len(self.train)
        for numbers, is_counted in self._parts(range(first, len(self.pairs))):
            pairs = self.batch(numbers)
            config = self.recipe.dpo
            found = dpo(
                self._log_probs(pairs.batch),
                pairs.reference_RL,
                pairs.batch.loss_mask,
                beta=config.beta,
                length_normalised=config.length_normalised,
            )
            one = torch.ones_like(found.losses_P)
            right = (found.margins_P > 0).double()
            columns = [found.losses_P, right, found.margins_P, one]
            sums += torch.stack([column.double().sum() for column in columns]) * is_counted
        loss, right, margin, count = self.mesh.sum_counts(sums).tolist()
        values = {"eval_dpo_loss": loss, "eval_accuracy": right, "eval_margin": margin}
        return {name: total / max(count, 1.0) for name, total in values.items()}

    def _parts(self, numbers: range) -> list[tuple[list[int], bool]]:
        """This rank's micro-batches of some pairs, composed alike on any number of ranks, and
        whether to count them: every rank has as many, so that the last may be of no use."""
        parts = [list(numbers[i : i + self.micro]) for i in range(0, len(numbers), self.micro)]
        mine = parts[self.mesh.rank :: self.mesh.world]
        is_short = len(mine) < -(-len(parts) // self.mesh.world)
        return [(part, True) for part in mine] + [(parts[0], False)] * is_short

    @torch.no_grad()
    def _log_probs(self, batch: Batch) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        found = self.model.log_probs(batch)
        self.model.train(was_training)
        return found


def on_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(tensor.to(device) for tensor in batch))


class Drawn(NamedTuple):
    """Answers to prompts: the rows as the update reads them, (B, L), and their log-probabilities
    when drawn, the routes, and the answers' tokens up to their end."""

    batch: Batch
    log_probs_BL: Tensor
    routes_BLNA: Tensor
    answers: list[list[int]]
    ended: list[bool]


@torch.no_grad()
def draw(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new: int,
    temperature: float,
    eod_id: int,
    mesh: Mesh,
) -> Drawn:
    """One answer to each prompt, of at most `max_new` tokens."""
    longest = max(map(len, prompts))
    ids_BL = torch.full((len(prompts), longest), eod_id)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
    ids_BL, mask_BL = ids_BL.to(mesh.device), mask_BL.to(mesh.device)

    def agree(is_going_on: bool) -> bool:
        if mesh.world == 1:
            return is_going_on
        return bool(mesh.sum_counts(torch.tensor(float(is_going_on), device=mesh.device)))

    with recorded_routes(model) as routes:
        steps = model.steps(
            ids_BL,
            max_new,
            temperature=temperature,
            eos_id=eod_id,
            attention_mask=mask_BL,
            seed=seeds,
            agree=agree,
        )
        picked = list(steps)
    new_BN = torch.stack([p.ids_B for p in picked], dim=1)
    log_probs_BN = torch.stack([p.log_probs_B for p in picked], dim=1)
    is_end_BN = new_BN == eod_id
    real_BN = is_end_BN.long().cumsum(1) - is_end_BN.long() == 0  # up to the first end, with it
    tokens_BS = torch.cat([ids_BL, new_BN], dim=1)
    real_BS = torch.cat([mask_BL.bool(), real_BN], dim=1)
    learned_BS = torch.cat([torch.zeros_like(mask_BL, dtype=torch.bool), real_BN], dim=1)
    positions_BS = real_BS.long().cumsum(1).sub(1).clamp(min=0)
    batch = Batch(
        tokens_BS[:, :-1],
        tokens_BS[:, 1:],
        learned_BS[:, 1:],
        positions_BS[:, :-1],
        real_BS[:, :-1].long() - 1,
    )
    before = log_probs_BN.new_zeros(len(prompts), longest - 1)
    log_probs_BL = torch.cat([before, log_probs_BN * real_BN], dim=1)
    by_layer = [
        torch.cat([ids.view(len(prompts), -1, ids.shape[1]) for ids in layer], dim=1)
        for layer in routes
    ]
    answers = [row[keep].tolist() for row, keep in zip(new_BN, real_BN & ~is_end_BN)]
    ended = is_end_BN.any(1).tolist()
    return Drawn(batch, log_probs_BL, torch.stack(by_layer, dim=2), answers, ended)


class Rollouts:
    """This rank's rollouts of a step with rewards; the evaluation by held-out prompts."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        model: Transformer,
        sides: Any,
        *,
        tokenizer: Any,
        rewarder: Rewarder,
        reference: Transformer | None,
        stop: StopRequest | None = None,
    ) -> None:
        """reference: what the KL term is to, where there is one; stop: looked at between two
        answers of training."""
        self.recipe, self.mesh, self.model, self.tokenizer = recipe, mesh, model, tokenizer
        self.config: GrpoConfig = recipe.grpo
        self.rewarder, self.reference = rewarder, reference
        self.stop = StopRequest() if stop is None else stop
        size = self.config.group_size
        groups = check_rows(recipe, mesh, unit=size)
        self.train: list[Prompt] = sides.train
        self.held_out: list[Prompt] = sides.held_out[: self.config.eval_prompts]
        self.micro = recipe.train.micro_batch_size
        self.loader = Loader(
            Order(self.train, recipe.train.seed),  # type: ignore[arg-type]
            rows_per_step=groups,
            rank=mesh.rank,
            world=mesh.world,
            micro_batch_size=self.micro // size,
        )
        self._made: tuple[int, list[GrpoBatch]] | None = None
        self.has_warned, self.last_error = False, ""

    def micro_batches(self, step: int) -> list[GrpoBatch]:
        """Raises on all ranks: Requeue when one was asked to stop, RewardError when no answer of
        the step, of more than one, could be scored."""
        if self._made is None or self._made[0] != step:
            made, scored, failed, of_all, failed_of_all = [], 0, 0, 0, 0
            for numbers in self.loader.micro_batches(step):
                made.append(self._rollout(step, numbers))  # type: ignore
                found = made[-1].metrics
                scored += int(found["rows"] - found["unended"])
                failed += int(found["reward_raised"] + found["reward_hung"])
                sums = torch.tensor([bool(self.stop), scored, failed], device=self.mesh.device)
                is_stopped, of_all, failed_of_all = self.mesh.sum_counts(sums).tolist()
                if is_stopped:
                    rule = f"stopped within the answers of step {step + 1}"
                    raise Requeue(f"{rule}; the same command goes on from there")
            if failed_of_all == of_all > 1:
                self._refuse(step, failed_of_all)
            self._made = step, made
        return self._made[1]

    def _refuse(self, step: int, count: int) -> None:
        told = Peers(self.mesh.background).gather(self.last_error)
        rule = f"failed for all {count:,} answers of step {step + 1} ({next(filter(None, told))})"
        log = self.rewarder.log
        printed = f" (it printed to {log})" if log is not None and log.stat().st_size else ""
        remedy = f"mend it{printed}, and give the same command again"
        raise RewardError(line("grpo.reward", self.config.reward, rule, remedy))

    def tokens(self, step: int) -> int:
        """Tokens of all answers of a step, over all ranks."""
        mine = sum(int(b.batch.loss_mask.sum()) for b in self.micro_batches(step))
        return int(self.mesh.sum_counts(torch.tensor(mine, device=self.mesh.device)))

    def _rollout(self, step: int, numbers: Sequence[int]) -> GrpoBatch:
        size, seed = self.config.group_size, self.recipe.train.seed
        prompts = [self.train[n] for n in numbers for _ in range(size)]
        seeds = [row_seed(seed, step, n, sample) for n in numbers for sample in range(size)]
        drawn = self._draw(prompts, seeds)
        rewards_B, counts = self._rewards(prompts, drawn, lambda: bool(self.stop))
        groups = rewards_B.view(-1, size)
        equal = (groups == groups[:, :1]).all(1).sum()
        metrics = {
            "reward": rewards_B.sum(),
            "rows": torch.tensor(len(prompts)),
            "groups": torch.tensor(len(numbers)),
            "equal_groups": equal,
            **{name: torch.tensor(count) for name, count in counts.items()},
        }
        reference_BL = None
        if self.reference is not None:
            with torch.no_grad():
                reference_BL = self.reference.log_probs(
                    drawn.batch, temperature=self.config.temperature
                )
        return GrpoBatch(
            drawn.batch,
            drawn.log_probs_BL,
            advantages(rewards_B, size).float().to(self.mesh.device),
            reference_BL,
            drawn.routes_BLNA,
            metrics,
        )

    def evaluate(self) -> dict[str, float]:
        """Mean reward of held-out prompts, one answer each, drawn as in training from numbers that
        are the same at every evaluation."""
        sums = torch.zeros(3, dtype=torch.float64)
        per_rank = -(-len(self.held_out) // (self.micro * self.mesh.world))
        for part in range(per_rank):
            first = (part * self.mesh.world + self.mesh.rank) * self.micro
            numbers = list(range(first, min(first + self.micro, len(self.held_out))))
            some = numbers or [0]  # as many forwards on every rank
            prompts = [self.held_out[n] for n in some]
            drawn = self._draw(prompts, [row_seed("held out", n) for n in some])
            if numbers:
                rewards_B, counts = self._rewards(prompts, drawn)
                mine = [float(rewards_B.sum()), counts["unended"], len(numbers)]
                sums += torch.tensor(mine, dtype=torch.float64)
        reward, unended, rows = self.mesh.sum_counts(sums.to(self.mesh.device)).tolist()
        rows = max(rows, 1.0)
        mean = reward / rows
        return {"eval_reward": mean, "eval_cost": -mean, "eval_unended": unended / rows}

    def _draw(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Drawn:
        return draw(
            self.model,
            [prompt.ids for prompt in prompts],
            seeds,
            max_new=self.config.max_new_tokens,
            temperature=self.config.temperature,
            eod_id=self.tokenizer.eod_id,
            mesh=self.mesh,
        )

    def _rewards(
        self,
        prompts: Sequence[Prompt],
        drawn: Drawn,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[Tensor, Mapping[str, int]]:
        """(B,) fp64, 0 for an answer that has not ended, and what went wrong."""
        whole = [i for i, is_ended in enumerate(drawn.ended) if is_ended]
        rows = [
            (prompts[i].question, prompts[i].answer, self.tokenizer.decode(drawn.answers[i]))
            for i in whole
        ]
        scored = self.rewarder.score(rows, is_stopped)
        self.last_error = scored.first_error or self.last_error
        if scored.first_error and not self.has_warned:
            self.has_warned = True
            say(self._warning(scored, len(rows)))
        rewards_B = torch.zeros(len(prompts), dtype=torch.float64)
        rewards_B[whole] = torch.tensor(scored.rewards, dtype=torch.float64)
        counts = {
            "unended": len(prompts) - len(whole),
            "reward_raised": scored.raised,
            "reward_hung": scored.hung,
        }
        return rewards_B, counts

    def _warning(self, scored: Scored, asked: int) -> str:
        """One line for the first failures of a rank."""
        rule = f"{scored.raised} of {asked} answers raised, {scored.hung} took too long"
        remedy = "mend it; each counts as 0, and from now on failures are counted without a word"
        return line("grpo.reward", self.config.reward, f"{rule} ({scored.first_error})", remedy)
