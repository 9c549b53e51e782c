"""Which layers each pipeline stage gets, so that the step is shortest and every rank fits.

A split cuts the parts of a model into one run for each virtual stage, none of them empty, because a
stage without layers has empty data-parallel buffers; MTP and loss stay in one stage. It is written
as the index of the first part of every stage but the first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from operator import add
from typing import NamedTuple

from qwen35_mcore.parallel.schedule import STEADY_GROUPS, Shape, Simulation, alive, peak_saved_bytes

Cuts = tuple[int, ...]

MOVES = 1000
"""Moves of a layer that are tried for one layout."""
_HALVINGS = 12
"""Of the interval in which the time of equal stages lies."""
_SMALL = 1e-9
"""Relative difference below which two times are the same."""


class Unit(NamedTuple):
    """What is never cut: a layer, the embedding, or MTP with the loss."""

    forward_s: float
    """Seconds of a microbatch, as the next."""
    backward_s: float
    static_bytes: float
    """Held all the time: parameters, gradients, optimizer state."""
    saved_bytes: float
    """What a microbatch keeps from the forward to the backward pass."""


class Chain:
    """A model's units in order as running sums."""

    def __init__(self, units: Sequence[Unit]) -> None:
        sums = ([0.0, *accumulate(column)] for column in zip(*units, strict=True))
        self.total = len(units)
        self.forward_s, self.backward_s, self.static_bytes, self.saved_bytes = sums
        self.both_s = list(map(add, self.forward_s, self.backward_s))
        self.tail_s = self.both_s[-1] - self.both_s[-2]


@dataclass(frozen=True)
class Splits:
    """The splits of a model for one schedule."""

    chain: Chain
    """At least one unit for every stage."""
    shape: Shape
    p2p_s: float = 0.0
    """Seconds of a transfer between stages."""
    capacity_bytes: float = float("inf")
    """What a rank may hold."""

    def simulate(self, cuts: Cuts) -> Simulation:
        """The step of a split."""
        durations = (*self._of(self.chain.forward_s, cuts), *self._of(self.chain.backward_s, cuts))
        return Simulation(shape=self.shape, durations_s=durations, p2p_s=self.p2p_s)

    def step_s(self, cuts: Cuts) -> float:
        """Nearly the seconds of `simulate`, in fewer passes: once the pipeline is full, every group
        of pp microbatches adds as much as the one before."""
        whole, pp = self.shape.microbatches, self.shape.pp
        few = STEADY_GROUPS * pp + whole % pp
        if whole <= 2 * few + pp:
            return self.simulate(cuts).step_s
        shapes = (replace(self.shape, microbatches=n) for n in (few, few + pp))
        short, longer = (replace(self, shape=one).simulate(cuts).step_s for one in shapes)
        return short + (longer - short) * (whole - few) / pp

    def rank_bytes(self, cuts: Cuts) -> list[float]:
        """What each rank holds at its fullest."""
        spans, pp = tuple(pairwise((0, *cuts, self.chain.total))), self.shape.pp
        return [_held_bytes(self.chain, self.shape, rank, spans[rank::pp]) for rank in range(pp)]

    def missing_bytes(self, cuts: Cuts) -> float:
        """Bytes that the ranks hold above their capacity, all together; 0 if the split fits."""
        return sum(max(0.0, held - self.capacity_bytes) for held in self.rank_bytes(cuts))

    def least_s(self, cuts: Cuts) -> float:
        """No step of this split is shorter: a rank computes all its passes between the first that
        reaches it and the last that leaves it."""
        pp, both = self.shape.pp, self._of(self.chain.both_s, cuts)
        return max(
            self.chain.both_s[begin] + self.shape.microbatches * sum(both[rank::pp])
            for rank, begin in enumerate((0, *cuts)[:pp])
        )

    @property
    def least_of_all_s(self) -> float:
        """No step of any split is shorter. Rank r takes m * t_r + the sum of t before r; over all
        ways to share a total T, the largest of these is least at T / (1 - (1 - 1/m)**p), and at
        T / v / (1 - (1 - 1/(v m))**p) where it waits for one of v chunks only."""
        shape, total = self.shape, self.chain.both_s[-1]
        shared = 1 - (1 - 1 / (shape.vpp * shape.microbatches)) ** shape.pp
        return max(total / shape.vpp / shared, shape.microbatches * self.chain.tail_s)

    def even(self) -> Cuts | None:
        """As many layers in every stage, which is what Megatron takes without a layout string; None
        where the layers do not divide."""
        each, rest = divmod(self.chain.total - 2, self.shape.stages)
        cuts = tuple(1 + each * i for i in range(1, self.shape.stages))
        return None if rest or not each else cuts

    @property
    def least_missing_bytes(self) -> float:
        """What every rank lacks on average, with equal stages and one microbatch at the loss."""
        *_, layers, total = self.chain.saved_bytes
        alive_stages = sum(max(map(sum, moments)) for moments in alive(self.shape))
        saved = alive_stages * layers / self.shape.stages + total - layers
        needed = (self.chain.static_bytes[-1] + saved) / self.shape.pp
        return max(0.0, needed - self.capacity_bytes)

    def may_fit(self) -> bool:
        """Whether some split may fit; without interleaving, whether one does."""
        if self.shape.vpp > 1:
            return not self.least_missing_bytes
        return self._fill(float("inf")) is not None

    def first(self) -> Cuts:
        """A split to begin with: of stages that take equally long, or moved until they fit."""
        cuts = self._equal()
        if cuts is None:
            cuts = replace(self, capacity_bytes=float("inf"))._equal()
            assert cuts is not None
            return self._improved(cuts, lambda cuts, _: self.missing_bytes(cuts))
        return cuts

    def best(self) -> Cuts:
        """The fastest split found that fits, or the one nearest to fitting."""
        cuts = self.first()
        return cuts if self.missing_bytes(cuts) else self._improved(cuts, self._step_below)

    def _improved(self, cuts: Cuts, cost: Callable[[Cuts, float], float]) -> Cuts:
        """A split of which single layers are moved from stage to stage as long as it costs less."""
        least, every = cost(cuts, float("inf")), _moves(self.shape.stages)
        seen, idle = {cuts}, 0
        for turn in range(MOVES):
            if idle == len(every) or not least:
                break
            idle += 1
            moved = _shifted(cuts, self.chain.total, *every[turn % len(every)])
            if moved is None or moved in seen:
                continue
            seen.add(moved)
            found = cost(moved, least)
            if found < least * (1 - _SMALL):
                least, cuts, idle = found, moved, 0
        return cuts

    def _step_below(self, cuts: Cuts, limit_s: float) -> float:
        """Seconds of a step, infinite where it is not below the limit or does not fit."""
        if self.least_s(cuts) >= limit_s or self.missing_bytes(cuts):
            return float("inf")
        return self.step_s(cuts)

    def _equal(self) -> Cuts | None:
        """The split whose longest stage but the last is shortest."""
        high = self.chain.both_s[-1]
        best = self._fill(high)
        low = high / self.shape.stages / 2
        for _ in range(_HALVINGS if best else 0):
            middle = (low + high) / 2
            cuts = self._fill(middle)
            low, high, best = (middle, high, best) if cuts is None else (low, middle, cuts)
        return best

    def _fill(self, limit_s: float) -> Cuts | None:
        """Every stage as long as time and memory allow, each chunk of a rank in an equal part of
        what the tail leaves; None if the last stage cannot take the rest."""
        shape, both_s, total = self.shape, self.chain.both_s, self.chain.total
        held, edges, moments = [0.0] * shape.pp, [0], alive(shape)
        tail_bytes = self._bytes(total - 1, moments[-1][0][-1], total)
        for stage in range(shape.stages):
            chunk, rank = divmod(stage, shape.pp)
            begin, rest = edges[-1], shape.stages - 1 - stage
            size_of = partial(self._bytes, begin, max(moment[chunk] for moment in moments[rank]))
            reserved = tail_bytes if rest and rank == shape.pp - 1 else 0.0
            room = (self.capacity_bytes - reserved) * (chunk + 1) / shape.vpp - held[rank]
            until = both_s[begin] + (limit_s if rest else max(limit_s, self.chain.tail_s))
            end = max(begin + 1, bisect_right(both_s, until, begin, total - rest + 1) - 1)
            if size_of(end) > room:
                end = bisect_right(range(end), room, begin, end, key=size_of) - 1
            if end <= begin:
                return None
            held[rank] += size_of(end)
            edges.append(end)
        return tuple(edges[1:-1]) if edges[-1] == total else None

    def _bytes(self, begin: int, alive: int, end: int) -> float:
        """What units hold with so many microbatches alive."""
        static, saved = self.chain.static_bytes, self.chain.saved_bytes
        return static[end] - static[begin] + alive * (saved[end] - saved[begin])

    @staticmethod
    def _of(sums: Sequence[float], cuts: Cuts) -> list[float]:
        return [sums[end] - sums[begin] for begin, end in pairwise((0, *cuts, len(sums) - 1))]


@lru_cache(maxsize=16384)
def _held_bytes(chain: Chain, shape: Shape, rank: int, chunks: tuple[Cuts, ...]) -> float:
    """What a rank holds at its fullest; a move changes it for few ranks."""
    static, saved = chain.static_bytes, chain.saved_bytes
    kept = [saved[end] - saved[begin] for begin, end in chunks]
    held = sum(static[end] - static[begin] for begin, end in chunks)
    return held + peak_saved_bytes(kept, shape, rank)


@lru_cache(maxsize=64)
def _moves(stages: int) -> tuple[tuple[int, int, int], ...]:
    """(first cut, last cut, by): one layer moved between two stages, neighbours first."""
    cuts = range(stages - 1)
    pairs = [(last - first, first, last) for first in cuts for last in cuts[first:]]
    return tuple((first, last, by) for _, first, last in sorted(pairs) for by in (1, -1))


def _shifted(cuts: Cuts, total: int, first: int, last: int, by: int) -> Cuts | None:
    """Neighbouring cuts moved, or None where that would empty a stage."""
    moved = (*cuts[:first], *(cut + by for cut in cuts[first : last + 1]), *cuts[last + 1 :])
    edges = (0, *moved, total)
    emptied = edges[first] == edges[first + 1] or edges[last + 1] == edges[last + 2]
    return None if emptied else moved
