"""A pipeline step: the order of Megatron's passes, when each runs, and what a rank then holds.

Read from megatron-core 0.19.2, `pipeline_parallel/schedules.py`. Virtual stage i belongs to rank
i % pp, as its chunk i // pp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from operator import ge, mul
from typing import NamedTuple

STEADY_GROUPS = 4
"""Groups of pp microbatches after which a pipeline is full: what follows repeats."""
_NOTHING = -1


class Operation(NamedTuple):
    """A forward ('F') or backward ('B') pass of one microbatch through one virtual stage."""

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the order, within the rules of `parallel`."""

    pp: int
    vpp: int
    microbatches: int
    """Of a step, per data parallel rank."""

    @property
    def stages(self) -> int:
        """Virtual stages in all."""
        return self.pp * self.vpp


def rank_order(shape: Shape, rank: int) -> Iterator[Operation]:
    """The passes of a rank, in order: warm-up, pairs of forward and backward, cool-down."""
    pp, vpp, microbatches = shape.pp, shape.vpp, shape.microbatches
    group, ranks_after = (pp if vpp > 1 else microbatches), pp - 1 - rank
    turns = [
        (chunk * pp + rank, micro)
        for first in range(0, microbatches, group)
        for chunk in range(vpp)
        for micro in range(first, min(first + group, microbatches))
    ]
    forward = [Operation("F", stage, micro) for stage, micro in turns]
    # the chunks in reverse
    last = shape.stages - pp + 2 * rank
    backward = [Operation("B", last - stage, micro) for stage, micro in turns]
    warmup = min(len(turns), ranks_after if vpp == 1 else 2 * ranks_after + (vpp - 1) * pp)
    yield from forward[:warmup]
    for pair in zip(forward[warmup:], backward, strict=False):
        yield from pair
    yield from backward[len(turns) - warmup :]


def _neighbour(shape: Shape, operation: Operation | None, by: int) -> Operation | None:
    """The same microbatch one stage on (1) or back (-1) in the direction of the pass."""
    if operation is None:
        return None
    stage = operation.stage + (by if operation.kind == "F" else -by)
    return operation._replace(stage=stage) if 0 <= stage < shape.stages else None


@lru_cache(maxsize=64)
def _program(shape: Shape) -> tuple[tuple[tuple[int, int, int, int], ...], tuple[Operation, ...]]:
    """All passes, each after those it waits for: the pass before it on its rank; the one at whose
    end the output of that is taken; the one whose output it needs; its stage, of a backward pass
    stages + stage. Passes count from 1 on, 0 is the step's begin. And what the passes are."""
    orders = [list(rank_order(shape, rank)) for rank in range(shape.pp)]
    asked_after: dict[Operation | None, Operation | None] = {}
    for order in orders:
        # what a rank waits to hand over: interleaved, gradients are not among it
        asked = [one for one in order if shape.vpp == 1 or one.kind == "F"]
        asked_after |= zip(asked, (None, *asked), strict=False)
    done, last = [0] * shape.pp, [0] * shape.pp
    number: dict[Operation | None, int] = {None: 0}
    steps: list[tuple[int, int, int, int]] = []
    while len(steps) < sum(map(len, orders)):
        for rank, order in enumerate(orders):
            while done[rank] < len(order):
                own = order[done[rank]]
                before = order[done[rank] - 1] if done[rank] else None
                needed, receiver = _neighbour(shape, own, -1), _neighbour(shape, before, 1)
                taken = asked_after.get(receiver)
                if needed not in number or taken not in number:
                    break
                handed = number[taken] if receiver in asked_after else _NOTHING
                awaited = number[needed] if needed else _NOTHING
                code = own.stage if own.kind == "F" else shape.stages + own.stage
                steps.append((last[rank], handed, awaited, code))
                done[rank] += 1
                last[rank] = number[own] = len(steps)
    return tuple(steps), tuple(operation for operation in number if operation)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A step of the pipeline."""

    shape: Shape
    durations_s: tuple[float, ...] = field(repr=False)
    """Forward seconds of every virtual stage, then backward seconds of every virtual stage."""
    p2p_s: float = 0.0
    """Seconds of a transfer between two stages."""

    @cached_property
    def _ends_s(self) -> list[float]:
        """When every pass of the program ends, after a 0 for the step's begin."""
        ends = [0.0]
        add, durations, p2p_s = ends.append, self.durations_s, self.p2p_s
        # the planner spends its time here: comparisons are written out, because max() is slower
        for previous, handed, awaited, code in _program(self.shape)[0]:
            start = ends[previous]
            if handed >= 0:
                if ends[handed] > start:
                    start = ends[handed]
                start += p2p_s
            if awaited >= 0 and ends[awaited] + p2p_s > start:
                start = ends[awaited] + p2p_s
            add(start + durations[code])
        return ends

    @cached_property
    def step_s(self) -> float:
        """From the first pass's start to the last one's end."""
        return max(self._ends_s)

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds of computing, per rank."""
        pp, times = self.shape.pp, self.shape.microbatches
        return tuple(times * sum(self.durations_s[rank::pp]) for rank in range(pp))

    @property
    def events(self) -> Iterator[tuple[Operation, float, float]]:
        """Every pass with its begin and end in seconds, each after those it waits for."""
        steps, operations = _program(self.shape)
        for step, operation, end in zip(steps, operations, self._ends_s[1:], strict=True):
            yield operation, end - self.durations_s[step[-1]], end


@lru_cache(maxsize=512)
def alive(shape: Shape) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each rank its fullest moments: microbatches that went forward and not yet backward, one
    number per chunk. What holds no more than another moment in any chunk is left out."""
    most = STEADY_GROUPS * shape.pp + shape.microbatches % shape.pp
    if shape.microbatches > most:
        return alive(replace(shape, microbatches=most))
    return tuple(_fullest(shape, rank) for rank in range(shape.pp))


def _fullest(shape: Shape, rank: int) -> tuple[tuple[int, ...], ...]:
    held, moments = [0] * shape.vpp, set()
    for operation in rank_order(shape, rank):
        held[operation.stage // shape.pp] += 1 if operation.kind == "F" else -1
        moments.add(tuple(held))
    kept: list[tuple[int, ...]] = []
    for moment in sorted(moments, key=sum, reverse=True):
        if not any(all(map(ge, one, moment)) for one in kept):
            kept.append(moment)
    return tuple(kept)


def peak_saved_bytes(saved_bytes: Sequence[float], shape: Shape, rank: int) -> float:
    """The most activation bytes a rank holds at one moment, where a microbatch keeps so many per
    chunk. The chunks of a rank are not at their fullest at the same time."""
    return max(sum(map(mul, moment, saved_bytes)) for moment in alive(shape)[rank])
