"""Finds the split of a model into pipeline stages with the shortest simulated step that fits.

Few splits are all tried. Else, without interleaving, a sweep finds the split with the least lower
bound under the memory limit, exactly; interleaved, where the chunks of a rank lie apart, evenly
loaded splits of several kinds are built. The best are then improved by moving layers between stages
as long as the simulator says that the step gets shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
_SMALL = 1e-9
"""Relative difference below which two times are the same."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    cuts: Cuts
    """The best split found: the fastest that fits, or the one nearest to fitting."""
    lower_bound_s: float
    """No split that fits has a shorter step."""


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
    return Found(_improve(splits, fast, bound, passes), bound)


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
        nearest = _descend(splits, min(starts, key=splits.excess_bytes), splits.excess_bytes)
        if splits.excess_bytes(nearest):
            return Found(nearest, float("inf"))
        fitting = [nearest]
    fitting.sort(key=splits.bound_s)
    affordable = max(_STARTS, passes // _passes(splits) // 4)
    timed = sorted((splits.simulate(cuts).step_s, cuts) for cuts in fitting[:affordable])
    left = max(0, passes - len(timed) * _passes(splits)) // _STARTS
    improved = [_improve(splits, cuts, bound, left) for _, cuts in timed[:_STARTS]]
    return Found(min(improved, key=lambda cuts: splits.simulate(cuts).step_s), bound)


def _passes(splits: Splits) -> int:
    """Passes of one simulation."""
    return 2 * splits.shape.stages * splits.shape.microbatches


def _interleaved_bound_s(splits: Splits) -> float:
    """No interleaved split has a shorter step: the ranks together compute everything, each idle
    while the units before its first stage run, and the last rank holds the last unit."""
    pp, microbatches, both = splits.shape.pp, splits.shape.microbatches, splits.both
    ramps = [both[rank] + 2 * rank * splits.p2p_s for rank in range(pp)]
    shared = (microbatches * both[-1] + sum(ramps)) / pp
    last = ramps[-1] + microbatches * (both[-1] - both[-2])
    return max(shared, last)


def _descend(splits: Splits, cuts: Cuts, cost: Callable[[Cuts], float]) -> Cuts:
    """Moves single layers as long as the cost falls."""
    now = cost(cuts)
    while now:
        lowest, moved = min((cost(moved), moved) for moved in _moved(cuts, len(splits.units)))
        if lowest >= now:
            break
        now, cuts = lowest, moved
    return cuts


def _improve(splits: Splits, cuts: Cuts, bound: float, passes: int) -> Cuts:
    """Moves single layers as long as the simulated step gets shorter and the split fits."""
    total, budget = len(splits.units), passes // _passes(splits)
    best = splits.simulate(cuts).step_s
    moves = _moves(splits.shape.stages)
    seen, idle = {cuts}, 0
    for first, last, by in cycle(moves):
        if idle == len(moves) or budget <= 0 or best <= bound * (1 + _SMALL):
            break
        idle += 1
        moved = _shift(cuts, total, first, last, by)
        if moved is None or moved in seen or splits.bound_s(moved) >= best * (1 - _SMALL):
            continue
        seen.add(moved)
        if splits.excess_bytes(moved):
            continue
        budget -= 1
        step = splits.simulate(moved).step_s
        if step < best * (1 - _SMALL):
            best, cuts, idle = step, moved, 0
    return cuts


@lru_cache(maxsize=64)
def _moves(stages: int) -> tuple[tuple[int, int, int], ...]:
    """(first cut, last cut, by): one layer moved between two stages, neighbours first."""
    cuts = range(stages - 1)
    pairs = [(last - first, first, last) for first in cuts for last in cuts[first:]]
    return tuple((first, last, by) for _, first, last in sorted(pairs) for by in (1, -1))


def _moved(cuts: Cuts, total: int) -> Iterator[Cuts]:
    for move in _moves(len(cuts) + 1):
        if (moved := _shift(cuts, total, *move)) is not None:
            yield moved


def _shift(cuts: Cuts, total: int, first: int, last: int, by: int) -> Cuts | None:
    """Some neighbouring cuts shifted, or None where that would empty a stage."""
    if by > 0:
        room = (cuts[last + 1] if last + 1 < len(cuts) else total) - cuts[last]
    else:
        room = cuts[first] - (cuts[first - 1] if first else 0)
    if room <= 1:
        return None
    return (*cuts[:first], *(cut + by for cut in cuts[first : last + 1]), *cuts[last + 1 :])
