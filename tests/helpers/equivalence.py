"""A parallel run against the serial one: per-token loss, every gathered gradient, later losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.distributed import WorkerPool
from tests.helpers.shards import assemble
from tests.helpers.toys import random_tokens, toy_config
from tests.helpers.training import Batch, Layout, Result, train
from tests.helpers.vision import Grid, VisionBatch, row, row_of_documents, vision_toy_config

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
    masked: bool = False  # unequal parts of the samples count

    @property
    def replicas(self) -> int:
        """Data parallel ranks."""
        return self.world // (self.layout.tp * self.layout.pp * self.layout.cp)

    @property
    def config(self) -> Qwen35Config:
        return (vision_toy_config if self.layout.vision else toy_config)(**self.model)


@dataclass(frozen=True)
class Difference:
    """Largest absolute loss differences and relative gradient norms of one case."""

    token_loss: float
    gradients: dict[str, float]
    later_loss: float
    logged: float = 0.0

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
    logged: dict[str, float]  # other losses in megatron's log, at step 0


def compare(pool: WorkerPool, case: Case) -> Difference:
    """Train both sides from the same weights on the same batches."""
    return difference(run_case(pool, case), serial_run(pool, case))


def difference(run: Run, expected: Run) -> Difference:
    """How far a run is from the one that it should equal."""
    assert run.gradients.keys() == expected.gradients.keys()
    assert run.logged.keys() == expected.logged.keys()
    return Difference(
        token_loss=float((run.token_loss - expected.token_loss).abs().max()),
        gradients={
            key: float((run.gradients[key] - value).norm() / value.norm().clamp(min=1e-12))
            for key, value in expected.gradients.items()
        },
        later_loss=largest(abs(a - b) for a, b in zip(run.losses, expected.losses, strict=True)),
        logged=largest([0.0, *(abs(run.logged[k] - v) for k, v in expected.logged.items())]),
    )


def largest(values: Iterable[float]) -> float:
    """The largest value, or NaN where one is: `max` would pass over it."""
    return max(values, key=_nan_last)


def _nan_last(value: float) -> tuple[bool, float]:
    return math.isnan(value), value


def serial_run(pool: WorkerPool, case: Case, train: Callable[..., Result] = train) -> Run:
    """The same model, settings and precision in one process; computed once for all cases."""
    return _serial_run(pool, _key(case), train)


EXCHANGE = (
    "moe_token_dispatcher_type",
    "moe_flex_dispatcher_backend",
    "moe_expert_rank_capacity_factor",
    "moe_shared_expert_overlap",
)
"""Settings of how ranks exchange tokens, of which one process knows nothing."""

_cases: dict[str, Case] = {}


def _key(case: Case) -> str:
    """Cases with the same serial side share it: model, run settings, data and precision.

    The global balancing loss counts experts over the samples that all ranks forward at once, so
    there one process takes them at once, too; nothing else depends on it.
    """
    layout = case.layout
    run = {name: value for name, value in layout.run.items() if name not in EXCHANGE}
    serial_layout = Layout(
        dtype=layout.dtype,
        run=run,
        packed=layout.packed,
        vision=layout.vision,
        frozen=layout.frozen,
    )
    balancing = layout.run.get("moe_router_load_balancing_type", "global_aux_loss")
    at_once = case.micro_batch_size * case.replicas if balancing == "global_aux_loss" else 1
    at_once = at_once if case.config.is_moe else 1
    serial = replace(case, name="serial", world=1, layout=serial_layout, micro_batch_size=at_once)
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
    run = {"gdn_kernel": "torch"}  # the one that runs in float32 everywhere
    layout = Layout(run=run, vision=config.is_vision_language)
    [result] = pool.run(
        train, 1, model_config=config, layout=layout, weights=None, batches=[batch], lr=0.0
    )
    generator = torch.Generator().manual_seed(9)
    weights = assemble([result.parameters])
    for key, value in weights.items():
        if value.dim() == 1 or key.endswith("router.weight"):
            value += 0.2 * torch.randn(value.shape, generator=generator)
    return weights


DOCUMENTS = [
    [64],
    [1, 63],
    [3, 1, 2, 58],
    [17, 30, 17],
    [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 4],
    [33, 31],
    [50, 7, 7],
    [8, 8, 16, 32],
]
"""A row's documents: odd ones, ones shorter than the parts that they are cut into, whole ones."""


IMAGES: list[tuple[list[Grid], list[Grid]]] = [
    ([(1, 4, 6), (1, 2, 2)], []),
    ([], []),
    ([(1, 8, 8)], [(2, 2, 4)]),
    ([], []),
    ([], [(3, 4, 4)]),
    ([], []),
    ([(1, 2, 12)], []),
    ([], []),
]
"""Images and videos of each row: one of two data-parallel ranks has them all."""

VISION_DOCUMENTS: list[list[tuple[int, list[Grid], list[Grid]]]] = [
    [(30, [(1, 4, 6), (1, 2, 2)], []), (3, [], []), (31, [(1, 2, 4)], [(2, 2, 4)])],
    [(64, [], [])],
    [(33, [(1, 8, 8)], []), (7, [], [(1, 2, 2)]), (24, [(1, 4, 4)], [])],
    [(1, [], []), (63, [], [])],
    [(9, [(1, 2, 2)], []), (55, [], [(3, 4, 4)])],
    [(17, [], []), (30, [], []), (17, [], [])],
    [(64, [(1, 2, 12)], [])],
    [(50, [], []), (14, [], [])],
]
"""Lengths, images and videos of the documents of each row, where rows are packed."""


def batches(case: Case) -> Sequence[Batch]:
    """One global batch per step; random real numbers, so no two router logits tie."""
    if case.layout.vision:
        return [_vision_batch(case, step) for step in range(case.steps)]
    documents = DOCUMENTS if case.layout.packed else None
    mask = unequal_mask(case.length) if case.masked else None
    return [
        Batch(random_tokens(case.config, BATCH, case.length, seed=100 + step), mask, documents)
        for step in range(case.steps)
    ]


def _vision_batch(case: Case, step: int) -> VisionBatch:
    seeds = range(100 * step, 100 * step + BATCH)
    if case.layout.packed:
        rows = [
            row_of_documents(case.config, documents, seed)
            for documents, seed in zip(VISION_DOCUMENTS, seeds, strict=True)
        ]
        lengths = [[length for length, _, _ in documents] for documents in VISION_DOCUMENTS]
        return VisionBatch(case.config, rows, lengths)
    rows = [
        row(case.config, case.length, *images, seed=seed)
        for images, seed in zip(IMAGES, seeds, strict=True)
    ]
    return VisionBatch(case.config, rows)


def unequal_mask(length: int) -> torch.Tensor:
    """``[batch, length]``: most positions of some samples and few of others count, none of one,
    and of another none in the middle half, which one of two context-parallel ranks holds."""
    generator = torch.Generator().manual_seed(17)
    share = torch.linspace(0.3, 1.0, BATCH)[:, None]
    mask = torch.rand(BATCH, length, generator=generator) < share
    mask[2] = True
    mask[2, length // 4 : 3 * length // 4] = False
    mask[5] = False
    return mask


def run_case(pool: WorkerPool, case: Case, train: Callable[..., Result] = train) -> Run:
    """Train a case and put together what its ranks saw."""
    results: list[Result] = pool.run(
        train,
        case.world,
        model_config=case.config,
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
        logged=_logged(results),
    )


def _logged(results: list[Result]) -> dict[str, float]:
    logged: dict[str, float] = {}
    for result in results:
        for name, value in result.logged.items():
            assert value == logged.setdefault(name, value)
    return logged


def _token_loss(results: list[Result], case: Case) -> torch.Tensor:
    """Per-token losses ``[batch, length]`` in natural order, from the last stages' ranks."""
    full = torch.full((BATCH * case.length,), torch.nan)
    for result in results:
        for (first, _), (places, loss) in result.token_loss.items():
            is_token = places >= 0
            full[first * case.length + places[is_token]] = loss[is_token]
    assert not full.isnan().any()
    return full.view(BATCH, case.length)
