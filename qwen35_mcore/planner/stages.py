"""Which layers each pipeline stage gets, so that the step is shortest and every rank fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.layout_text import write_pipeline_layout
from qwen35_mcore.planner.pipeline import Simulation
from qwen35_mcore.planner.schedule import Shape
from qwen35_mcore.planner.split import Cuts, Element, Splits
from qwen35_mcore.planner.split_search import Found, search
from qwen35_mcore.planner.split_starts import even_cuts

__all__ = ["Element", "StagePlan", "StageSplit", "balance"]

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class StageSplit:
    """A model cut into virtual stages."""

    layout: str
    """The ``--pipeline-model-parallel-layout`` string."""
    stages: tuple[str, ...]
    """The layer characters of every virtual stage, in forward order."""
    simulation: Simulation
    """A step of it."""
    static_bytes: tuple[float, ...]
    """Per rank, what all its chunks hold all the time."""
    stage_bytes: tuple[float, ...]
    """Per rank, the most it holds at one moment: static and the activations of what is in flight.
    The chunks of a rank are not at their fullest at the same moment."""


@dataclass(frozen=True, kw_only=True)
class StagePlan(StageSplit):
    """The chosen split."""

    capacity_bytes: float
    """What a rank may hold."""
    lower_bound_s: float
    """No split that fits has a shorter step; equal to step_s where the choice is proven best."""
    even: StageSplit | None
    """What Megatron would take without a layout string, fitting or not; None where the layers do
    not divide by the stages."""


def balance(
    elements: Sequence[Element],
    *,
    pp: int,
    vpp: int = 1,
    microbatches: int,
    p2p_s: float = 0.0,
    capacity_bytes: float = float("inf"),
    microbatch_group: int | None = None,
    passes: int = 2_000_000,
) -> StagePlan:
    """Cut a model into pp * vpp stages.

    Args:
        elements: the model in order: E, the decoder layers t, MTP layers m if any, L.
        pp: pipeline ranks.
        vpp: virtual stages per rank.
        microbatches: microbatches per step and data parallel rank.
        p2p_s: seconds of a transfer between neighbouring ranks, once both are there for it.
        capacity_bytes: what the elements may hold on one rank.
        microbatch_group: microbatches per turn of a chunk; None is pp, as in Megatron.
        passes: forward and backward passes to simulate at most, where there are too many splits to
            try all: the effort of the search, about 4 million a second.

    Raises:
        PlanError: the elements are in another order, are fewer than the stages, fit in no split
            found (the message says on which rank the nearest one is short, and of how much), or
            Megatron cannot run the schedule.
    """
    group = pp if microbatch_group is None or vpp == 1 else microbatch_group
    shape = Shape(pp=pp, vpp=vpp, microbatches=microbatches, group=group, overlap=vpp > 1)
    units = _units(elements, shape)
    splits = Splits(units, shape, p2p_s, capacity_bytes)
    found = search(splits, passes=passes)
    if splits.excess_bytes(found.cuts):
        raise _too_full(splits, found)
    layers = len(units) - 2
    even = None
    if layers and layers % shape.stages == 0:
        even = _split(splits, even_cuts(len(units), shape.stages))
    return StagePlan(
        **vars(_split(splits, found.cuts)),
        capacity_bytes=capacity_bytes,
        lower_bound_s=found.lower_bound_s,
        even=even,
    )


def _units(elements: Sequence[Element], shape: Shape) -> list[Element]:
    """The elements, MTP and loss joined."""
    kinds = "".join(element.kind for element in elements)
    layers = kinds.strip("EL").rstrip("m")
    if kinds != "E" + layers + "m" * kinds.count("m") + "L" or layers.strip("t"):
        raise PlanError(
            "the elements of the model are out of order",
            got=kinds,
            allowed="E, decoder layers t, MTP layers m, L",
        )
    if len(layers) + 2 < shape.stages:
        raise PlanError(
            "there are more virtual stages than layers for them",
            got=f"pp {shape.pp} * vpp {shape.vpp} = {shape.stages} stages, {len(layers)} layers",
            allowed=f"up to {len(layers) + 2} stages: embedding and loss can stand alone",
            fix="lower pp or vpp",
        )
    last = elements[1 + len(layers) :]
    tail = Element(
        kind="".join(element.kind for element in last),
        forward_s=sum(element.forward_s for element in last),
        backward_s=sum(element.backward_s for element in last),
        static_bytes=sum(element.static_bytes for element in last),
        saved_bytes=sum(element.saved_bytes for element in last),
    )
    return [*elements[: 1 + len(layers)], tail]


def _split(splits: Splits, cuts: Cuts) -> StageSplit:
    stages = tuple(
        "".join(unit.kind for unit in splits.units[begin:end])
        for begin, end in pairwise(splits.edges(cuts))
    )
    static, pp = splits.of_stages(splits.static, cuts), splits.shape.pp
    return StageSplit(
        layout=write_pipeline_layout(stages),
        stages=stages,
        simulation=splits.simulate(cuts),
        static_bytes=tuple(sum(static[rank::pp]) for rank in range(pp)),
        stage_bytes=splits.rank_bytes(cuts),
    )


def _too_full(splits: Splits, found: Found) -> PlanError:
    held = splits.rank_bytes(found.cuts)
    fullest = max(held)
    shape, split = splits.shape, _split(splits, found.cuts)
    short = (fullest - splits.capacity_bytes) / _GIB
    answer = "fits" if found.all_weighed else "that fits was found"
    return PlanError(
        f"no split into {shape.stages} stages {answer}: the nearest is {short:.1f} GiB "
        f"short on pipeline rank {held.index(fullest)}",
        got=f"{fullest / _GIB:.1f} GiB there with layout {split.layout}",
        allowed=f"{splits.capacity_bytes / _GIB:.1f} GiB per rank",
        fix="recompute more, or raise pp, tp, ep or cp",
    )
