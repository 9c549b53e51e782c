"""Splits for an interleaved schedule to start a search from: evenly loaded, each in its own sense.

The schedule keeps the ranks of a chunk in step, so ranks should compute equally long within every
chunk, not only in all. A heavy loss makes that impossible for the last chunk; how to share the rest
best is not known beforehand, so several ways are built.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, product

from qwen35_mcore.planner.split import Cuts, Splits


def even_cuts(units: int, stages: int) -> Cuts:
    """Equally many decoder layers per stage, earlier stages one more where it does not come out;
    the embedding is the first unit, MTP and loss the last."""
    each, more = divmod(units - 2, stages)
    if not each:
        return tuple(range(1, stages))
    return tuple(1 + each * stage + min(stage, more) for stage in range(1, stages))


def interleaved_starts(splits: Splits) -> list[Cuts]:
    """All of them, each once, in a fixed order."""
    units, stages = len(splits.units), splits.shape.stages
    starts = [even_cuts(units, stages)]
    starts += [_equal_loads(splits, share / 4) for share in range(5)]
    starts += _equal_counts(splits)
    return list(dict.fromkeys(starts))


def _equal_loads(splits: Splits, by_chunk: float) -> Cuts:
    """Whole layers nearest to equal times. By_chunk 0: every rank computes equally long in all;
    1: so do the ranks in each chunk, in the last one as long as the loss; between: a mixture."""
    pp, stages, both = splits.shape.pp, splits.shape.stages, splits.both
    loss = both[-1] - both[-2]
    per_rank = max(loss, both[-1] / pp)
    last_rank = (per_rank - loss) / (splits.shape.vpp - 1)
    other_ranks = (both[-1] - per_rank) / (pp - 1) / splits.shape.vpp
    last_chunk = max(loss, both[-1] / stages)
    other_chunks = max(0.0, both[-1] - pp * last_chunk) / (stages - pp)
    cuts: list[int] = []
    target = 0.0
    for stage in range(stages - 1):
        rank_share = last_rank if stage % pp == pp - 1 else other_ranks
        chunk_share = last_chunk if stage >= stages - pp else other_chunks
        target += (1 - by_chunk) * rank_share + by_chunk * chunk_share
        after = min(bisect_left(both, target), len(both) - 1)
        nearest = after if both[after] - target < target - both[after - 1] else after - 1
        lowest = cuts[-1] + 1 if cuts else 1
        highest = len(splits.units) - (stages - 1 - stage)
        cuts.append(min(max(nearest, lowest), highest))
    return tuple(cuts)


def _equal_counts(splits: Splits) -> Iterator[Cuts]:
    """The same number of layers on every rank of a chunk, one more or less in some chunks, the loss
    alone; what does not come out is given to, or taken from, the first or the last stages."""
    pp, vpp, stages = splits.shape.pp, splits.shape.vpp, splits.shape.stages
    layers = len(splits.units) - 2
    each = layers // stages
    heights = [height for height in (each - 1, each, each + 1) if height > 0]
    for chunks in product(heights, repeat=vpp):
        counts = [height for height in chunks for _ in range(pp)]
        counts[-1] = 0
        rest = layers - sum(counts)
        if abs(rest) >= pp:
            continue
        for order in (range(stages - 1), range(stages - 2, -1, -1)):
            shared = _spread(counts, rest, order)
            if shared is not None:
                yield tuple(accumulate(shared[:-1], initial=1))[1:]


def _spread(counts: Sequence[int], rest: int, order: Sequence[int]) -> list[int] | None:
    shared, by = list(counts), 1 if rest > 0 else -1
    changeable = [stage for stage in order if shared[stage] + by > 0]
    if len(changeable) < abs(rest):
        return None
    for stage in changeable[: abs(rest)]:
        shared[stage] += by
    return shared
