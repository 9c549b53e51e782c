"""The order in which Megatron runs forward and backward passes on each pipeline rank.

Read from megatron-core 0.19.2, `pipeline_parallel/schedules.py`: 1F1B where a rank holds one stage,
interleaved 1F1B where it holds several (`get_pp_rank_microbatches`, `get_schedule_table`). Virtual
stage i belongs to rank i % pp, as its chunk i // pp. The order depends on no duration, so all of
it is computed once per shape and kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import ge
from typing import NamedTuple

from qwen35_mcore.errors import PlanError


class Operation(NamedTuple):
    """A forward ('F') or backward ('B') pass of one microbatch through one virtual stage."""

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the order.

    Raises:
        PlanError: Megatron cannot run this shape.
    """

    pp: int
    """Pipeline ranks."""
    vpp: int
    """Virtual stages per rank; 1 is plain 1F1B."""
    microbatches: int
    """Microbatches of a step, per data parallel rank."""
    group: int
    """``--microbatch-group-size-per-vp-stage``: microbatches that pass through a chunk before the
    next chunk's turn; Megatron's default is pp. Without interleaving it means nothing."""
    overlap: bool = False
    """``--overlap-p2p-communication``, which only the interleaved schedule has."""

    def __post_init__(self) -> None:
        for name in ("pp", "vpp", "microbatches"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1", got=getattr(self, name))
        if self.vpp == 1:
            return
        if self.pp == 1:
            raise PlanError(
                "the interleaved schedule needs pipeline ranks to pass activations between",
                got=f"vpp {self.vpp}, pp 1",
                fix="set vpp to 1",
            )
        if self.pp == 2 and not self.overlap:
            raise PlanError(
                "without overlap, transfers of the interleaved schedule would mix between the same "
                "two ranks",
                got=f"vpp {self.vpp}, pp 2, no overlap",
                fix="let transfers overlap, or use more pipeline ranks",
            )
        self._check_groups()

    def _check_groups(self) -> None:
        allowed = f"{self.pp} (pp) to {self.microbatches} (microbatches)"
        if not self.pp <= self.group <= self.microbatches:
            raise PlanError(
                "the interleaved schedule cannot group microbatches so",
                got=f"groups of {self.group}, {self.microbatches} microbatches",
                allowed=allowed,
                fix="use at least pp microbatches per step, or vpp 1",
            )
        last = self.microbatches % self.group
        if 0 < last < self.pp:
            raise PlanError(
                "the last group of microbatches is shorter than the pipeline",
                got=f"{self.microbatches} microbatches in groups of {self.group} leave {last}",
                allowed=f"no rest, or at least {self.pp} (pp)",
                fix="use a multiple of pp microbatches per step",
            )

    @property
    def stages(self) -> int:
        """Virtual stages in all."""
        return self.pp * self.vpp


def warmup_forwards(shape: Shape, rank: int) -> int:
    """Forward passes of a rank before its first pair of a forward and a backward pass."""
    ranks_after = shape.pp - rank - 1
    if shape.vpp == 1:
        return min(ranks_after, shape.microbatches)
    wanted = 2 * ranks_after + (shape.vpp - 1) * shape.group
    return min(wanted, shape.microbatches * shape.vpp)


def passes(shape: Shape, rank: int) -> tuple[list[Operation], list[Operation]]:
    """The forward passes of a rank and the backward passes of a rank, each in their order."""
    turns = _turns(shape)
    forward = [Operation("F", chunk * shape.pp + rank, micro) for micro, chunk in turns]
    backward = [
        Operation("B", (shape.vpp - 1 - chunk) * shape.pp + rank, micro) for micro, chunk in turns
    ]
    return forward, backward


def rank_order(shape: Shape, rank: int) -> Iterator[Operation]:
    """The passes of a rank, in order: warm-up, pairs of forward and backward, cool-down."""
    forward, backward = passes(shape, rank)
    warmup = warmup_forwards(shape, rank)
    pairs = len(forward) - warmup
    yield from forward[:warmup]
    for one in range(pairs):
        yield forward[warmup + one]
        yield backward[one]
    yield from backward[pairs:]


def _turns(shape: Shape) -> list[tuple[int, int]]:
    """(microbatch, chunk) of the forward passes; backward passes take the chunks in reverse."""
    group = shape.group if shape.vpp > 1 else shape.microbatches
    return [
        (micro, chunk)
        for first in range(0, shape.microbatches, group)
        for chunk in range(shape.vpp)
        for micro in range(first, min(first + group, shape.microbatches))
    ]


_STEADY_GROUPS = 4


@lru_cache(maxsize=512)
def alive(shape: Shape) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each rank, what it can hold at its fullest: microbatches that went forward and not yet
    backward, one number per chunk. Moments that hold no more than another in any chunk are left
    out, so that the maximum over the rest is the peak for any sizes."""
    if shape.microbatches >= (_STEADY_GROUPS + 1) * shape.group:
        # steady state repeats with every group, so the moments of a shorter step are the same
        short = shape.microbatches % shape.group + _STEADY_GROUPS * shape.group
        return alive(replace(shape, microbatches=short))
    return tuple(_fullest(shape, rank) for rank in range(shape.pp))


def _fullest(shape: Shape, rank: int) -> tuple[tuple[int, ...], ...]:
    held = [0] * shape.vpp
    moments = set()
    for operation in rank_order(shape, rank):
        held[operation.stage // shape.pp] += 1 if operation.kind == "F" else -1
        moments.add(tuple(held))
    kept: list[tuple[int, ...]] = []
    for moment in sorted(moments, key=sum, reverse=True):
        if not any(all(map(ge, one, moment)) for one in kept):
            kept.append(moment)
    return tuple(kept)
