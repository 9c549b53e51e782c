"""A model cut into pipeline stages: what each cut costs, holds and cannot go below.

The elements of a model in order, MTP and loss taken together because Megatron wants them in one
stage, are its units. A split cuts the units into one run per virtual stage, none of them empty:
Megatron takes a stage without layers, but its data-parallel buffers would be empty. A split is
written as the index of the first unit of every stage but the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import comb

from qwen35_mcore.planner.pipeline import Simulation, peak_saved_bytes, simulate
from qwen35_mcore.planner.schedule import Shape, warmup_forwards

Cuts = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Element:
    """One layer of the model, as a pipeline rank sees it."""

    kind: str
    """E embedding, t decoder layer, m MTP layer, L output layer and loss."""
    forward_s: float
    """Seconds of one microbatch's forward pass."""
    backward_s: float
    """Seconds of its backward pass, with what is recomputed."""
    static_bytes: float
    """Bytes held all the time: parameters, gradients, optimizer state."""
    saved_bytes: float
    """Bytes one microbatch keeps from its forward to its backward pass."""


class Splits:
    """The splits of a model for one schedule.

    Args:
        units: the model in order, see the module's text; at least one per stage.
        shape: the schedule.
        p2p_s: seconds a tensor needs between stages.
        capacity_bytes: what a rank may hold.
    """

    def __init__(
        self, units: Sequence[Element], shape: Shape, p2p_s: float, capacity_bytes: float
    ) -> None:
        self.units, self.shape = units, shape
        self.p2p_s, self.capacity_bytes = p2p_s, capacity_bytes
        self.forward = _sums(unit.forward_s for unit in units)
        self.backward = _sums(unit.backward_s for unit in units)
        self.both = _sums(unit.forward_s + unit.backward_s for unit in units)
        self.static = _sums(unit.static_bytes for unit in units)
        self.saved = _sums(unit.saved_bytes for unit in units)

    @cached_property
    def count(self) -> int:
        """Number of splits."""
        return comb(len(self.units) - 1, self.shape.stages - 1)

    def edges(self, cuts: Cuts) -> tuple[int, ...]:
        """First unit of every stage, and the end."""
        return (0, *cuts, len(self.units))

    def of_stages(self, sums: Sequence[float], cuts: Cuts) -> list[float]:
        """A quantity per virtual stage, from its running sums over the units."""
        return [sums[end] - sums[begin] for begin, end in pairwise(self.edges(cuts))]

    def simulate(self, cuts: Cuts) -> Simulation:
        """The step of a split."""
        shape = self.shape
        return simulate(
            self.of_stages(self.forward, cuts),
            self.of_stages(self.backward, cuts),
            pp=shape.pp,
            vpp=shape.vpp,
            microbatches=shape.microbatches,
            p2p_s=self.p2p_s,
            microbatch_group=shape.group,
            overlap_p2p=shape.overlap,
        )

    def rank_bytes(self, cuts: Cuts) -> tuple[float, ...]:
        """What each rank holds at its fullest."""
        static = self.of_stages(self.static, cuts)
        saved = peak_saved_bytes(self.of_stages(self.saved, cuts), self.shape)
        pp = self.shape.pp
        return tuple(sum(static[rank::pp]) + saved[rank] for rank in range(pp))

    def excess_bytes(self, cuts: Cuts) -> float:
        """Bytes that the ranks hold above their capacity, all together; 0 if the split fits."""
        return sum(max(0.0, held - self.capacity_bytes) for held in self.rank_bytes(cuts))

    def bound_s(self, cuts: Cuts) -> float:
        """No step of this split is shorter; far quicker than the simulation.

        A rank computes all its passes between the first forward pass that reaches it and the last
        backward pass that leaves it.
        """
        edges, both, shape = self.edges(cuts), self.both, self.shape
        pp, microbatches = shape.pp, shape.microbatches
        costs = [both[end] - both[begin] for begin, end in pairwise(edges)]
        delay = 2 * self.p2p_s
        return max(
            both[edges[rank]] + rank * delay + microbatches * sum(costs[rank::pp])
            for rank in range(pp)
        )

    def stage_bound_s(self, rank: int, begin: int, end: int) -> float:
        """Without interleaving: no step is shorter whose rank holds these units.

        The largest of three paths: the rank's own passes between the way there and back; the first
        microbatch to the loss and back, then the rank's passes after it; the rank's passes up to
        its last forward pass, then that microbatch to the loss and back.
        """
        shape, p2p = self.shape, self.p2p_s
        forward = self.forward[end] - self.forward[begin]
        backward = self.backward[end] - self.backward[begin]
        others = shape.microbatches - 1
        overlapping = max(0, others - warmup_forwards(shape, rank))
        around = self.both[-1] + 2 * (shape.pp - 1) * p2p
        return max(
            self.both[begin] + 2 * rank * p2p + shape.microbatches * (forward + backward),
            around + others * backward + overlapping * forward,
            around + others * forward + overlapping * backward,
        )


def _sums(values: Iterable[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))
