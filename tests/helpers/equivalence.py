"""A parallel run against the serial one: per-token loss, every gathered gradient, later losses."""

from __future__ import annotations

import functools
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

    @property
    def config(self) -> Qwen35Config:
        return toy_config(**self.model)


@dataclass(frozen=True)
class Difference:
    """Largest absolute loss differences and relative gradient norms of one case."""

    token_loss: float
    gradient: float
    worst_gradient: str
    later_loss: float


@dataclass
class Run:
    """One side of a comparison, put together from all ranks."""

    token_loss: torch.Tensor  # [batch, length] at step 0
    gradients: dict[str, torch.Tensor]
    losses: list[float]


def compare(pool: WorkerPool, case: Case) -> Difference:
    """Train both sides from the same weights on the same batches."""
    serial = _serial_run(pool, _key(case))
    run = _run(pool, case.world, case)
    assert run.gradients.keys() == serial.gradients.keys()
    gradients = {
        key: float((run.gradients[key] - value).norm() / value.norm().clamp(min=1e-12))
        for key, value in serial.gradients.items()
    }
    worst = max(gradients, key=lambda key: gradients[key])
    return Difference(
        token_loss=float((run.token_loss - serial.token_loss).abs().max()),
        gradient=gradients[worst],
        worst_gradient=worst,
        later_loss=max(abs(a - b) for a, b in zip(run.losses, serial.losses, strict=True)),
    )


_cases: dict[str, Case] = {}


def _key(case: Case) -> str:
    """Cases with the same serial side share it: model, run settings and precision."""
    serial_layout = Layout(dtype=case.layout.dtype, run=case.layout.run)
    serial = replace(case, name="serial", world=1, layout=serial_layout, micro_batch_size=1)
    key = repr(serial)
    _cases.setdefault(key, serial)
    return key


@functools.lru_cache(maxsize=32)
def _serial_run(pool: WorkerPool, key: str) -> Run:
    return _run(pool, 1, _cases[key])


@functools.lru_cache(maxsize=32)
def initial_weights(pool: WorkerPool, config: Qwen35Config) -> dict[str, torch.Tensor]:
    """Global weights of a serial initialisation, moved off the values that hide mistakes."""
    batch = Batch(random_tokens(config, 1, LENGTH, seed=0))
    [result] = pool.run(train, 1, hf=config, layout=Layout(), weights=None, batches=[batch], lr=0.0)
    generator = torch.Generator().manual_seed(9)
    weights = assemble([result.parameters])
    for key, value in weights.items():
        if value.dim() == 1 or key.endswith("router.weight"):
            value += 0.2 * torch.randn(value.shape, generator=generator)
    return weights


def batches(config: Qwen35Config) -> list[Batch]:
    """One global batch per step; random real numbers, so no two router logits tie."""
    return [Batch(random_tokens(config, BATCH, LENGTH, seed=100 + step)) for step in range(STEPS)]


def _run(pool: WorkerPool, world: int, case: Case) -> Run:
    config = case.config
    results: list[Result] = pool.run(
        train,
        world,
        hf=config,
        layout=case.layout,
        weights=initial_weights(pool, config),
        batches=batches(config),
        micro_batch_size=case.micro_batch_size,
    )
    losses = [[float(s[0] / s[1]) for s in result.loss_sums] for result in results]
    assert all(per_rank == losses[0] for per_rank in losses)
    return Run(
        token_loss=_token_loss(results, case.layout.cp),
        gradients=assemble([result.gradients for result in results]),
        losses=losses[0],
    )


def _token_loss(results: list[Result], cp_size: int) -> torch.Tensor:
    """Per-token losses ``[batch, length]`` in natural order, from the last stages' ranks."""
    from qwen35_mcore.layers.core_attention import zigzag_positions

    positions = zigzag_positions(LENGTH, cp_size)
    full = torch.full((BATCH, LENGTH), torch.nan)
    for result in results:
        for (first, cp_rank), loss in result.token_loss.items():
            full[first : first + loss.shape[0], positions[cp_rank]] = loss
    assert not full.isnan().any()
    return full
