"""Finds the split of a model into pipeline stages with the shortest simulated step that fits.

Few splits are all tried. Else, without interleaving, a sweep finds the split with the least lower
bound under the memory limit, exactly; interleaved, where the chunks of a rank lie apart, splits
with equal rank sums are built. Either is then improved by moving layers between stages, as long as
the simulator says that the step gets shorter.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

from qwen35_mcore.planner.schedule import alive
from qwen35_mcore.planner.split import Cuts, Splits

ALL_TRIED = 2500
"""Up to this many splits are all tried."""
_SMALL = 1e-9
"""Relative difference below which two times are the same."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    cuts: Cuts
    """The best split found: the fastest that fits, or the one nearest to fitting."""
    lower_bound_s: float
    """No split that fits has a shorter step."""


def search(splits: Splits, *, simulations: int) -> Found:
    """The best split.

    Args:
        simulations: how many splits may be simulated where not all are tried.
    """
    if splits.count <= ALL_TRIED:
        return _try_all(splits)
    if splits.shape.vpp == 1:
        return _search_plain(splits, simulations)
    return _search_interleaved(splits, simulations)


def even_cuts(units: int, stages: int) -> Cuts:
    """Equally many decoder layers per stage, earlier stages one more where it does not come out;
    the embedding is the first unit, MTP and loss the last."""
    each, more = divmod(units - 2, stages)
    return tuple(1 + each * stage + min(stage, more) for stage in range(1, stages))


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


def _search_plain(splits: Splits, simulations: int) -> Found:
    held = [moments[0][0] for moments in alive(splits.shape)]

    def bytes_of(rank: int, begin: int, end: int) -> float:
        static = splits.static[end] - splits.static[begin]
        return static + held[rank] * (splits.saved[end] - splits.saved[begin])

    fitting, _ = _least(splits, bytes_of, lambda rank, begin, end: True)
    if splits.excess_bytes(fitting):
        return Found(fitting, float("inf"))

    def fits(rank: int, begin: int, end: int) -> bool:
        return bytes_of(rank, begin, end) <= splits.capacity_bytes

    fast, bound = _least(splits, splits.stage_bound_s, fits)
    return Found(_improve(splits, fast, bound, simulations), bound)


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


def _search_interleaved(splits: Splits, simulations: int) -> Found:
    bound = _interleaved_bound_s(splits)
    starts = {_with_equal_ranks(splits), even_cuts(len(splits.units), splits.shape.stages)}
    fitting = [_descend(splits, start, splits.excess_bytes) for start in sorted(starts)]
    fitting = [cuts for cuts in fitting if not splits.excess_bytes(cuts)] or fitting[:1]
    if splits.excess_bytes(fitting[0]):
        return Found(fitting[0], float("inf"))
    start = min(fitting, key=lambda cuts: splits.simulate(cuts).step_s)
    return Found(_improve(splits, start, bound, simulations), bound)


def _interleaved_bound_s(splits: Splits) -> float:
    """No interleaved split has a shorter step: the ranks together compute everything, each idle
    while the units before its first stage run, and the last rank holds the last unit."""
    pp, microbatches, both = splits.shape.pp, splits.shape.microbatches, splits.both
    ramps = [both[rank] + 2 * rank * splits.p2p_s for rank in range(pp)]
    shared = (microbatches * both[-1] + sum(ramps)) / pp
    last = ramps[-1] + microbatches * (both[-1] - both[-2])
    return max(shared, last)


def _with_equal_ranks(splits: Splits) -> Cuts:
    """Stage lengths for which every rank computes equally long, as near as whole layers allow."""
    pp, vpp, both = splits.shape.pp, splits.shape.vpp, splits.both
    per_rank = both[-1] / pp
    tail = both[-1] - both[-2]
    rest = max(0.0, per_rank - tail) / (vpp - 1)
    elsewhere = (both[-1] - max(per_rank, tail)) / (pp - 1) / vpp
    cuts: list[int] = []
    target = 0.0
    for stage in range(splits.shape.stages - 1):
        target += rest if stage % pp == pp - 1 else elsewhere
        after = bisect_left(both, target)
        nearest = after if both[after] - target < target - both[after - 1] else after - 1
        lowest = cuts[-1] + 1 if cuts else 1
        highest = len(splits.units) - (splits.shape.stages - 1 - stage)
        cuts.append(min(max(nearest, lowest), highest))
    return tuple(cuts)


def _descend(splits: Splits, cuts: Cuts, cost: Callable[[Cuts], float]) -> Cuts:
    """Moves layers as long as the cost falls."""
    now = cost(cuts)
    while now:
        lowest, moved = min((cost(moved), moved) for moved in _moves(cuts, len(splits.units)))
        if lowest >= now:
            break
        now, cuts = lowest, moved
    return cuts


def _improve(splits: Splits, cuts: Cuts, bound: float, simulations: int) -> Cuts:
    """Moves layers as long as the simulated step gets shorter and the split fits."""
    best = splits.simulate(cuts).step_s
    seen = {cuts}
    improved = True
    while improved and best > bound * (1 + _SMALL):
        improved = False
        moves = sorted((splits.bound_s(m), m) for m in _moves(cuts, len(splits.units)))
        for least, moved in moves:
            if least >= best * (1 - _SMALL) or simulations == 0:
                break
            if moved in seen or splits.excess_bytes(moved):
                continue
            seen.add(moved)
            simulations -= 1
            step = splits.simulate(moved).step_s
            if step < best * (1 - _SMALL):
                best, cuts, improved = step, moved, True
                break
    return cuts


def _moves(cuts: Cuts, total: int) -> Iterator[Cuts]:
    """One layer moved from a stage to another: all boundaries between them shift by one."""
    edges = (0, *cuts, total)
    for first in range(1, len(cuts) + 1):
        for last in range(first, len(cuts) + 1):
            if edges[last] + 1 < edges[last + 1]:
                shifted = tuple(cut + 1 for cut in cuts[first - 1 : last])
                yield (*cuts[: first - 1], *shifted, *cuts[last:])
            if edges[first] - 1 > edges[first - 1]:
                shifted = tuple(cut - 1 for cut in cuts[first - 1 : last])
                yield (*cuts[: first - 1], *shifted, *cuts[last:])
