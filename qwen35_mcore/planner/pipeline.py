"""A pipeline step simulated as Megatron runs it, pass by pass and transfer by transfer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.program import program
from qwen35_mcore.planner.schedule import Shape, alive


class Event(NamedTuple):
    """One pass: a rank busy from start_s to end_s (seconds from the step's begin)."""

    rank: int
    kind: str
    stage: int
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a step of the pipeline takes and holds."""

    shape: Shape
    step_s: float
    """From the first pass's start to the last one's end."""
    busy_s: tuple[float, ...]
    """Seconds of computing, per rank."""
    durations_s: tuple[float, ...] = field(repr=False)
    """Forward seconds of every virtual stage, then backward seconds of every virtual stage."""
    p2p_s: float
    """Seconds of a transfer between two stages."""

    @property
    def bubble_fraction(self) -> float:
        """Idle time over busy time, all ranks together: (pp - 1) / microbatches for equal stages
        under 1F1B, (pp - 1) / (vpp * microbatches) interleaved."""
        busy = sum(self.busy_s)
        return self.step_s * self.shape.pp / busy - 1 if busy else 0.0

    @cached_property
    def in_flight(self) -> tuple[int, ...]:
        """Most microbatches that are alive at once (forward done, backward not), per stage."""
        return tuple(
            max(moment[chunk] for moment in alive(self.shape)[rank])
            for chunk in range(self.shape.vpp)
            for rank in range(self.shape.pp)
        )

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """Every pass, each after those it waits for."""
        return tuple(self._events())

    def _events(self) -> Iterator[Event]:
        steps, passes = program(self.shape)
        moments = _run(self.shape, self.durations_s, self.p2p_s)
        stages = self.shape.stages
        for moment, rank, microbatch in passes:
            code, end = steps[moment - 1][-1], moments[moment]
            kind, stage = ("F", code) if code < stages else ("B", code - stages)
            yield Event(rank, kind, stage, microbatch, end - self.durations_s[code], end)


def simulate(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    *,
    pp: int,
    vpp: int = 1,
    microbatches: int,
    p2p_s: float = 0.0,
    microbatch_group: int | None = None,
    overlap_p2p: bool = True,
) -> Simulation:
    """Run one step of a pipeline.

    Args:
        forward_s: seconds of one microbatch's forward pass, per virtual stage in forward order
            (pp * vpp of them; stage i runs on rank i % pp as its chunk i // pp).
        backward_s: the same of the backward pass, recomputation included.
        pp: pipeline ranks.
        vpp: virtual stages per rank.
        microbatches: microbatches per step and data parallel rank.
        p2p_s: seconds of a transfer between neighbouring ranks, once both are there for it.
        microbatch_group: microbatches per turn of a chunk; None is pp, as in Megatron.
        overlap_p2p: False is ``--no-overlap-p2p-communication``; without interleaving nothing
            overlaps.

    Raises:
        PlanError: the number of durations is not pp * vpp, or Megatron cannot run the shape.
    """
    group = pp if microbatch_group is None or vpp == 1 else microbatch_group
    shape = Shape(
        pp=pp, vpp=vpp, microbatches=microbatches, group=group, overlap=overlap_p2p and vpp > 1
    )
    for name, given in (("forward_s", forward_s), ("backward_s", backward_s)):
        if len(given) != shape.stages:
            raise PlanError(
                f"{name} must have one duration per virtual stage",
                got=f"{len(given)} durations",
                allowed=f"{shape.stages} (pp {pp} * vpp {vpp})",
            )
    durations = (*forward_s, *backward_s)
    moments = _run(shape, durations, p2p_s)
    busy = tuple(
        microbatches * sum(durations[stage] for stage in range(rank, 2 * shape.stages, pp))
        for rank in range(pp)
    )
    return Simulation(
        shape=shape, step_s=max(moments), busy_s=busy, durations_s=durations, p2p_s=p2p_s
    )


def peak_saved_bytes(saved_bytes: Sequence[float], shape: Shape) -> tuple[float, ...]:
    """The most activation bytes each rank holds at one moment.

    Args:
        saved_bytes: bytes that one microbatch keeps from its forward to its backward pass, per
            virtual stage. The chunks of a rank are not at their fullest at the same time, so the
            peak can be below the sum of `Simulation.in_flight` times this.
    """
    return tuple(
        max(
            sum(n * size for n, size in zip(moment, saved_bytes[rank :: shape.pp], strict=True))
            for moment in moments
        )
        for rank, moments in enumerate(alive(shape))
    )


def _run(shape: Shape, durations_s: Sequence[float], p2p_s: float) -> list[float]:
    """The moments of the program."""
    moments = [0.0]
    add = moments.append
    durations = (*durations_s, 0.0)
    # the planner spends its time here: comparisons are written out, because max() is slower
    for previous, first, second, third, code in program(shape).steps:
        start = moments[previous]
        if first:
            asked = moments[first]
            if moments[second] > asked:
                asked = moments[second]
            if moments[third] > asked:
                asked = moments[third]
            if asked + p2p_s > start:
                start = asked + p2p_s
        add(start + durations[code])
    return moments
