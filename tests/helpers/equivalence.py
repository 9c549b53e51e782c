"""A parallel run against the serial one: per-token loss, every gathered gradient, later losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qwen35_mcore.config import Qwen35Config
from tests.helpers.distributed import WorkerPool
from tests.helpers.shards import assemble
from tests.helpers.toys import random_tokens, toy_config
from tests.helpers.training import Batch, Layout, Result, train

BATCH, LENGTH, STEPS = 8, 64, 5


@dataclass(frozen=True)
class Case:
    """``world`` ranks in a ``layout``; the serial side differs in nothing but the layout."""

    name: str
    world: int
    layout: Layout
    model: dict[str, Any] = field(default_factory=dict)  # arguments of toy_config
    micro_batch_size: int = 1
    length: int = LENGTH
    steps: int = STEPS

    @property
    def config(self) -> Qwen35Config:
        return toy_config(**self.model)


@dataclass(frozen=True)
class Difference:
    """Largest absolute loss differences and relative gradient norms of one case."""

    token_loss: float
    gradients: dict[str, float]
    later_loss: float

    @property
    def gradient(self) -> float:
        return largest(self.gradients.values())

    @property
    def worst_gradient(self) -> str:
        return max(self.gradients, key=lambda key: _nan_last(self.gradients[key]))


@dataclass
class Run:
    """One side of a comparison, put together from all ranks."""

    token_loss: torch.Tensor  # [batch, length] at step 0
    gradients: dict[str, torch.Tensor]
    losses: list[float]


def compare(pool: WorkerPool, case: Case) -> Difference:
    """Train both sides from the same weights on the same batches."""
    return difference(run_case(pool, case), serial_run(pool, case))


def difference(run: Run, expected: Run) -> Difference:
    """How far a run is from the one that it should equal."""
    assert run.gradients.keys() == expected.gradients.keys()
    return Difference(
        token_loss=float((run.token_loss - expected.token_loss).abs().max()),
        gradients={
            key: float((run.gradients[key] - value).norm() / value.norm().clamp(min=1e-12))
            for key, value in expected.gradients.items()
        },
        later_loss=largest(abs(a - b) for a, b in zip(run.losses, expected.losses, strict=True)),
    )


def largest(values: Iterable[float]) -> float:
    """The largest value, or NaN where one is: `max` would pass over it."""
    return max(values, key=_nan_last)


def _nan_last(value: float) -> tuple[bool, float]:
    return math.isnan(value), value


def serial_run(pool: WorkerPool, case: Case, train: Callable[..., Result] = train) -> Run:
    """The same model, settings and precision in one process; computed once for all cases."""
    return _serial_run(pool, _key(case), train)


_cases: dict[str, Case] = {}


def _key(case: Case) -> str:
    """Cases with the same serial side share it: model, run settings and precision."""
    serial_layout = Layout(dtype=case.layout.dtype, run=case.layout.run)
    serial = replace(case, name="serial", world=1, layout=serial_layout, micro_batch_size=1)
    key = repr(serial)
    _cases.setdefault(key, serial)
    return key


@functools.lru_cache(maxsize=32)
def _serial_run(pool: WorkerPool, key: str, train: Callable[..., Result]) -> Run:
    return run_case(pool, _cases[key], train)


@functools.lru_cache(maxsize=32)
def initial_weights(pool: WorkerPool, config: Qwen35Config) -> dict[str, torch.Tensor]:
    """Global weights of a serial initialisation, moved off the values that hide mistakes."""
    batch = Batch(random_tokens(config, 1, LENGTH, seed=0))
    layout = Layout(run={"gdn_kernel": "torch"})  # the one that runs in float32 everywhere
    [result] = pool.run(train, 1, hf=config, layout=layout, weights=None, batches=[batch], lr=0.0)
    generator = torch.Generator().manual_seed(9)
    weights = assemble([result.parameters])
    for key, value in weights.items():
        if value.dim() == 1 or key.endswith("router.weight"):
            value += 0.2 * torch.randn(value.shape, generator=generator)
    return weights


def batches(case: Case) -> list[Batch]:
    """One global batch per step; random real numbers, so no two router logits tie."""
    return [
        Batch(random_tokens(case.config, BATCH, case.length, seed=100 + step))
        for step in range(case.steps)
    ]


def run_case(pool: WorkerPool, case: Case, train: Callable[..., Result] = train) -> Run:
    """Train a case and put together what its ranks saw."""
    results: list[Result] = pool.run(
        train,
        case.world,
        hf=case.config,
        layout=case.layout,
        weights=initial_weights(pool, case.config),
        batches=batches(case),
        micro_batch_size=case.micro_batch_size,
    )
    losses = [[float(s[0] / s[1]) for s in result.loss_sums] for result in results]
    assert all(per_rank == losses[0] for per_rank in losses)
    return Run(
        token_loss=_token_loss(results, case),
        gradients=assemble([result.gradients for result in results]),
        losses=losses[0],
    )


def _token_loss(results: list[Result], case: Case) -> torch.Tensor:
    """Per-token losses ``[batch, length]`` in natural order, from the last stages' ranks."""
    from qwen35_mcore.layers.core_attention import zigzag_positions

    positions = zigzag_positions(case.length, case.layout.cp)
    full = torch.full((BATCH, case.length), torch.nan)
    for result in results:
        for (first, cp_rank), loss in result.token_loss.items():
            full[first : first + loss.shape[0], positions[cp_rank]] = loss
    assert not full.isnan().any()
    return full
