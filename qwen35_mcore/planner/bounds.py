"""What no split of a model's layers into stages can beat, without trying any: memory and time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qwen35_mcore.planner.elements import Model
from qwen35_mcore.planner.prediction import capacity_bytes
from qwen35_mcore.planner.schedule import Shape, alive


@dataclass(frozen=True)
class Bounds:
    """Limits of one candidate."""

    room: tuple[int, ...]
    """Decoder layers that each pipeline rank can hold, if all were the smallest."""
    step_s: float
    """Seconds of the pipeline at least; infinite where the layers do not fit."""
    excess_bytes: float
    """Memory missing per rank on average; 0 where it may suffice."""


def bounds(model: Model, *, vpp: int) -> Bounds:
    """Bounds of a candidate; the model may have been built for another ``vpp``."""
    candidate = model.candidate
    pp, microbatches = candidate.pp, candidate.microbatches(model.job)
    shape = Shape(pp=pp, vpp=vpp, microbatches=microbatches, group=pp, overlap=vpp > 1)
    layers = [(part, count) for part, count in model.counted if part.kind == "t"]
    wanted = sum(count for _, count in layers)
    smallest_static = min(part.memory.static.total for part, _ in layers)
    smallest_saved = min(part.memory.saved for part, _ in layers)
    capacity = capacity_bytes(model)
    room, missing = [], 0.0
    for rank, held in enumerate(_in_flight(shape)):
        each = smallest_static + held * smallest_saved
        free = capacity - _fixed_bytes(model, rank)
        room.append(max(0, int(free // each)))
        missing += each * wanted / pp - free
    if sum(room) < wanted:
        return Bounds(tuple(room), float("inf"), max(missing / pp, 1.0))
    return Bounds(tuple(room), _step_s(model, vpp, room), 0.0)


@lru_cache(maxsize=4096)
def _in_flight(shape: Shape) -> tuple[float, ...]:
    """Microbatches in flight of a layer at least, in whichever chunks of a rank the layers are."""
    return tuple(_least_in_flight(moments) for moments in alive(shape))


def _least_in_flight(moments: tuple[tuple[int, ...], ...]) -> float:
    chunks = range(len(moments[0]))
    average = min(sum(moment[c] for moment in moments) / len(moments) for c in chunks)
    return max(average, *(min(moment) for moment in moments), 0)


def _fixed_bytes(model: Model, rank: int) -> float:
    """What the embedding, or MTP and loss, take on their rank."""
    kinds = ("E" if rank == 0 else "") + ("mL" if rank == model.candidate.pp - 1 else "")
    return sum(
        count * (part.memory.static.total + model.saved_bytes(part))
        for part, count in model.counted
        if part.kind in kinds
    )


def _step_s(model: Model, vpp: int, room: list[int]) -> float:
    """The larger of two bounds.

    Rank r computes every microbatch, after the first one's forward and before the last one's
    backward passes of the ranks before it: m * t_r + sum of t before r. Over all ways to share a
    total T between p ranks, the largest of these is smallest at T / (1 - (1 - 1/m)**p). Interleaved
    stages wait for one of v chunks only: T / v / (1 - (1 - 1/(v m))**p), for equal chunks.

    And a rank computes no more than it has room for, so that the others compute the rest.
    """
    pp, microbatches = model.candidate.pp, model.candidate.microbatches(model.job)
    total = sum(count * part.seconds for part, count in model.counted)
    tail = sum(count * part.seconds for part, count in model.counted if part.kind in "mL")
    rounds = vpp * microbatches
    shared = total / vpp / (1 - (1 - 1 / rounds) ** pp)
    last = (microbatches - 1) * tail + total if vpp == 1 else microbatches * tail
    if min(room) >= sum(count for part, count in model.counted if part.kind == "t"):
        return max(shared, last)  # memory does not keep any rank from its share
    return max(shared, last, microbatches * _fullest_s(model, room, tail))


def _fullest_s(model: Model, room: list[int], tail: float) -> float:
    """Seconds of a microbatch on the slowest rank, when each takes what it has room for."""
    layers = [(part, count) for part, count in model.counted if part.kind == "t"]
    longest = max(part.seconds for part, _ in layers)
    wanted = sum(count * part.seconds for part, count in layers)
    head = model.embedding.seconds
    fixed = [0.0] * len(room)
    fixed[0] += head
    fixed[-1] += tail
    low, high = max(fixed), sum(fixed) + wanted
    for _ in range(14):
        middle = (low + high) / 2
        taken = sum(
            min(count * longest, max(0.0, middle - own))
            for count, own in zip(room, fixed, strict=True)
        )
        low, high = (low, middle) if taken >= wanted else (middle, high)
    return low
