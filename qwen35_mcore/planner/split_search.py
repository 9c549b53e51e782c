"""Finds the split of a model into pipeline stages with the shortest simulated step that fits.

Few splits are all tried. Else, without interleaving, a sweep finds the split with the least lower
bound under the memory limit, exactly; interleaved, where the chunks of a rank lie apart, evenly
loaded splits of several kinds are built. The best are then improved by moving layers between stages
as long as the simulator says that the step gets shorter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, cycle, pairwise

from qwen35_mcore.planner.schedule import alive
from qwen35_mcore.planner.split import Cuts, Splits
from qwen35_mcore.planner.split_starts import even_cuts, interleaved_starts

ALL_TRIED = 2500
"""Up to this many splits are all tried."""
_STARTS = 3
"""Interleaved splits that are improved, out of all that are built."""
_LOOK, _WEIGH = 50, 400
"""What looking at a split and adding up its bytes cost, in simulated passes."""
_SMALL = 1e-9
"""Relative difference below which two times are the same."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    cuts: Cuts
    """The best split found: the fastest that fits, or the one nearest to fitting."""
    lower_bound_s: float
    """No split that fits has a shorter step."""
    all_weighed: bool = True
    """Whether it is certain that no split fits where this one does not."""


def search(splits: Splits, *, passes: int) -> Found:
    """The best split.

    Args:
        passes: forward and backward passes to simulate at most where not all splits are tried.
    """
    if splits.count <= ALL_TRIED:
        return _try_all(splits)
    if splits.shape.vpp == 1:
        return _search_plain(splits, passes)
    return _search_interleaved(splits, passes)


def _try_all(splits: Splits) -> Found:
    every = combinations(range(1, len(splits.units)), splits.shape.stages - 1)
    by_bound = sorted((splits.bound_s(cuts), cuts) for cuts in every)
    best, chosen = float("inf"), None
    for bound, cuts in by_bound:
        if bound >= best:
            break
        if splits.excess_bytes(cuts):
            continue
        step = splits.simulate(cuts).step_s
        if step < best:
            best, chosen = step, cuts
    if chosen is None:
        return Found(min((cuts for _, cuts in by_bound), key=splits.excess_bytes), best)
    return Found(chosen, best)


def _search_plain(splits: Splits, passes: int) -> Found:
    bytes_of = _stage_bytes(splits)
    lightest, _ = _least(splits, bytes_of, lambda rank, begin, end: True)
    if splits.excess_bytes(lightest):
        return Found(lightest, float("inf"))

    def fits(rank: int, begin: int, end: int) -> bool:
        return bytes_of(rank, begin, end) <= splits.capacity_bytes

    fast, bound = _least(splits, splits.stage_bound_s, fits)
    starts = {fast, even_cuts(len(splits.units), splits.shape.stages)}
    fitting = [cuts for cuts in sorted(starts) if not splits.excess_bytes(cuts)]
    start = min(fitting, key=lambda cuts: splits.simulate(cuts).step_s)
    return Found(_Faster(splits, start, passes, bound).climb(), bound)


def _stage_bytes(splits: Splits) -> Callable[[int, int, int], float]:
    """What a stage holds when most of its microbatches are alive."""
    held = [
        max(moment[chunk] for moment in moments)
        for chunk in range(splits.shape.vpp)
        for moments in alive(splits.shape)
    ]

    def bytes_of(stage: int, begin: int, end: int) -> float:
        static = splits.static[end] - splits.static[begin]
        return static + held[stage] * (splits.saved[end] - splits.saved[begin])

    return bytes_of


def _least(
    splits: Splits,
    cost: Callable[[int, int, int], float],
    allowed: Callable[[int, int, int], bool],
) -> tuple[Cuts, float]:
    """The split whose largest cost(rank, begin, end) is least, and a number that this largest cost
    is not below for any allowed split (equal to it but for rounding).

    Both functions must fall when a stage begins later and rise (or turn false) when it ends later:
    then a stage that takes all it can leaves the best rest, and one sweep decides whether a limit
    can be kept.
    """
    stages, total = splits.shape.stages, len(splits.units)

    def within(limit: float) -> Cuts | None:
        return _sweep(stages, total, lambda *run: cost(*run) <= limit and allowed(*run))

    low, best = 0.0, within(float("inf"))
    if best is None:
        return even_cuts(total, stages), float("inf")
    high = _largest(cost, best, total)
    while high - low > _SMALL * high:
        cuts = within(limit := (low + high) / 2)
        if cuts is None:
            low = limit
        else:
            best, high = cuts, _largest(cost, cuts, total)
    return best, low


def _largest(cost: Callable[[int, int, int], float], cuts: Cuts, total: int) -> float:
    return max(cost(stage, *run) for stage, run in enumerate(pairwise((0, *cuts, total))))


def _sweep(stages: int, total: int, keeps: Callable[[int, int, int], bool]) -> Cuts | None:
    """Every stage as long as it may be, or None if the last one does not reach the end."""
    cuts, begin = [], 0
    for stage in range(stages):
        longest = total - (stages - 1 - stage)
        end = begin
        while end < longest and keeps(stage, begin, end + 1):
            end += 1
        if end == begin:
            return None
        cuts.append(end)
        begin = end
    return tuple(cuts[:-1]) if begin == total else None


def _search_interleaved(splits: Splits, passes: int) -> Found:
    bound = _interleaved_bound_s(splits)
    starts = interleaved_starts(splits)
    fitting = [cuts for cuts in starts if not splits.excess_bytes(cuts)]
    if not fitting:
        starts.append(_least(splits, _stage_bytes(splits), lambda *_: True)[0])
        starts = sorted(starts, key=splits.excess_bytes)[:_STARTS]
        near = [_Lighter(splits, cuts, passes // _STARTS).climb() for cuts in starts]
        fitting = [cuts for cuts in near if not splits.excess_bytes(cuts)]
        if not fitting:
            return Found(min(near, key=splits.excess_bytes), float("inf"), all_weighed=False)
    fitting.sort(key=splits.bound_s)
    affordable = max(_STARTS, passes // _passes(splits) // 4)
    timed = sorted((splits.simulate(cuts).step_s, cuts) for cuts in fitting[:affordable])
    left = max(0, passes - len(timed) * _passes(splits)) // _STARTS
    improved = [_Faster(splits, cuts, left, bound).climb() for _, cuts in timed[:_STARTS]]
    return Found(min(improved, key=lambda cuts: splits.simulate(cuts).step_s), bound)


def _passes(splits: Splits) -> int:
    """Passes of one simulation."""
    return 2 * splits.shape.stages * splits.shape.microbatches


def _interleaved_bound_s(splits: Splits) -> float:
    """No interleaved split has a shorter step: the ranks together compute everything, each idle
    while the units before its first stage run, and the last rank holds the last unit and at least
    one layer in each of its other chunks."""
    pp, vpp, microbatches = splits.shape.pp, splits.shape.vpp, splits.shape.microbatches
    both = splits.both
    ramps = [both[rank] + 2 * rank * splits.p2p_s for rank in range(pp)]
    shared = (microbatches * both[-1] + sum(ramps)) / pp
    shortest = min(end - begin for begin, end in pairwise(both[1:-1]))
    last = both[-1] - both[-2] + (vpp - 1) * shortest
    return max(shared, ramps[-1] + microbatches * last)


class _Climb(ABC):
    """A split that is improved by moving layers: one at a time, and two at a time where that leads
    nowhere, as long as its cost falls and the effort, counted in passes, lasts."""

    def __init__(self, splits: Splits, cuts: Cuts, effort: int, cost: float, goal: float) -> None:
        self.splits, self.cuts, self.left = splits, cuts, effort
        self.cost, self.goal = cost, goal
        self.seen = {cuts}
        self.moves = _moves(splits.shape.stages)

    @abstractmethod
    def cost_of(self, cuts: Cuts) -> float:
        """The cost of a split, or infinity where it is not worth knowing."""

    def climb(self) -> Cuts:
        """The best split reached."""
        while self._by_one() or self._by_two():
            pass
        return self.cuts

    def _by_one(self) -> bool:
        """Until no single move helps; whether one did."""
        before, idle = self.cost, 0
        for move in cycle(self.moves):
            if idle == len(self.moves) or self._over():
                break
            idle = 0 if self._try([move]) else idle + 1
        return self.cost < before

    def _by_two(self) -> bool:
        """Whether two moves together helped."""
        for pair in combinations(self.moves, 2):
            if self._over():
                return False
            if self._try(pair):
                return True
        return False

    def _over(self) -> bool:
        return self.left <= 0 or self.cost <= self.goal

    def _try(self, moves: Iterable[tuple[int, int, int]]) -> bool:
        moved = _shifted(self.cuts, len(self.splits.units), moves)
        self.left -= _LOOK
        if moved is None or moved in self.seen:
            return False
        cost = self.cost_of(moved)
        if cost >= self.cost * (1 - _SMALL):
            return False
        self.cost, self.cuts = cost, moved
        return True


class _Faster(_Climb):
    """Towards a shorter step, among splits that fit."""

    def __init__(self, splits: Splits, cuts: Cuts, effort: int, bound: float) -> None:
        step = splits.simulate(cuts).step_s
        super().__init__(splits, cuts, effort, step, bound * (1 + _SMALL))

    def cost_of(self, cuts: Cuts) -> float:
        worth = self.cost * (1 - _SMALL)
        if self.splits.bound_s(cuts) >= worth or self.splits.excess_bytes(cuts):
            return float("inf")
        self.seen.add(cuts)
        self.left -= _passes(self.splits)
        return self.splits.simulate(cuts).step_s


class _Lighter(_Climb):
    """Towards a split that fits."""

    def __init__(self, splits: Splits, cuts: Cuts, effort: int) -> None:
        super().__init__(splits, cuts, effort, splits.excess_bytes(cuts), 0.0)

    def cost_of(self, cuts: Cuts) -> float:
        self.left -= _WEIGH
        return self.splits.excess_bytes(cuts)


@lru_cache(maxsize=64)
def _moves(stages: int) -> tuple[tuple[int, int, int], ...]:
    """(first cut, last cut, by): one layer moved between two stages, neighbours first."""
    cuts = range(stages - 1)
    pairs = [(last - first, first, last) for first in cuts for last in cuts[first:]]
    return tuple((first, last, by) for _, first, last in sorted(pairs) for by in (1, -1))


def _shifted(cuts: Cuts, total: int, moves: Iterable[tuple[int, int, int]]) -> Cuts | None:
    """The moves one after the other, or None where one would empty a stage."""
    moved: Cuts | None = cuts
    for move in moves:
        if moved is None:
            break
        moved = _shift(moved, total, *move)
    return moved


def _shift(cuts: Cuts, total: int, first: int, last: int, by: int) -> Cuts | None:
    """Some neighbouring cuts shifted, or None where that would empty a stage."""
    if by > 0:
        room = (cuts[last + 1] if last + 1 < len(cuts) else total) - cuts[last]
    else:
        room = cuts[first] - (cuts[first - 1] if first else 0)
    if room <= 1:
        return None
    return (*cuts[:first], *(cut + by for cut in cuts[first : last + 1]), *cuts[last + 1 :])
