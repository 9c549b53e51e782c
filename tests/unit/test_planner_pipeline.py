"""The simulated pipeline step is what Megatron's schedule functions do."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_mcore.parallel.schedule import Shape, Simulation, alive, peak_saved_bytes, rank_order
from tests.helpers.megatron_schedule import Note, Pass, play, record

PLAIN = [(1, 1, 3), (2, 1, 1), (2, 1, 5), (3, 1, 2), (4, 1, 4), (4, 1, 9), (8, 1, 16)]
INTERLEAVED = [(2, 2, 2), (2, 2, 6), (2, 3, 4), (3, 2, 3), (3, 4, 9), (4, 2, 8), (4, 3, 12)]


def shape(pp: int, vpp: int, microbatches: int) -> Shape:
    return Shape(pp=pp, vpp=vpp, microbatches=microbatches)


@cache
def recorded(of: Shape) -> list[list[Note]]:
    """As the flags of a plan make Megatron run it: interleaved with overlapping transfers."""
    sizes = {"pp": of.pp, "vpp": of.vpp, "microbatches": of.microbatches}
    return [record(rank, **sizes, overlap=of.vpp > 1) for rank in range(of.pp)]


def run(of: Shape, forward: list[float], backward: list[float], p2p_s: float = 0.0) -> Simulation:
    return Simulation(shape=of, durations_s=(*forward, *backward), p2p_s=p2p_s)


@pytest.mark.parametrize("of", [shape(*one) for one in (*PLAIN[1:], *INTERLEAVED)], ids=str)
def test_order_of_passes(of: Shape) -> None:
    for rank in range(of.pp):
        ours = [(kind, stage // of.pp, micro) for kind, stage, micro in rank_order(of, rank)]
        theirs = [note for note in recorded(of)[rank] if isinstance(note, Pass)]
        assert ours == [(note.kind, note.chunk, note.microbatch) for note in theirs]


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), [*PLAIN, *INTERLEAVED, (16, 1, 64)])
def test_the_step_of_equal_stages_is_the_closed_formula(
    pp: int, vpp: int, microbatches: int
) -> None:
    stages = pp * vpp
    result = run(shape(pp, vpp, microbatches), [1.0] * stages, [2.0] * stages)
    assert result.step_s == pytest.approx(3 * (microbatches * vpp + pp - 1))


def test_exposed_transfers_of_1f1b() -> None:
    """In steady state a forward pass and a backward pass wait for a transfer each."""
    step = [run(shape(4, 1, m), [1.0] * 4, [2.0] * 4, 0.1).step_s for m in (32, 33)]
    assert step[1] - step[0] == pytest.approx(3 + 2 * 0.1)


SHAPES = st.one_of(
    st.builds(shape, st.integers(1, 5), st.just(1), st.integers(1, 12)),
    st.builds(
        lambda pp, vpp, groups: shape(pp, vpp, pp * groups),
        st.integers(2, 4),
        st.integers(2, 4),
        st.integers(1, 4),
    ),
)


@st.composite
def uneven(draw: st.DrawFn) -> tuple[Shape, list[float], list[float], float]:
    of = draw(SHAPES)
    seconds = st.lists(st.floats(0.5, 1.5), min_size=of.stages, max_size=of.stages)
    return of, draw(seconds), draw(seconds), draw(st.sampled_from([0.0, 0.02, 0.1]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(uneven())
def test_the_step_is_that_of_megatrons_functions_played(
    case: tuple[Shape, list[float], list[float], float],
) -> None:
    """1F1B exactly but for transfers in the cool-down; interleaved, where the simulation leaves out
    that ranks wait for a gradient to be taken, within a twentieth."""
    of, forward, backward, p2p_s = case
    played = play(recorded(of), forward, backward, p2p_s).step_s
    step = run(of, forward, backward, p2p_s).step_s
    assert step <= played * (1 + 1e-9)
    assert step >= played * (1 - 1e-9 if of.vpp == 1 and not p2p_s else 0.95)


@settings(max_examples=40, deadline=None)
@given(uneven())
def test_properties_of_any_step(case: tuple[Shape, list[float], list[float], float]) -> None:
    of, forward, backward, p2p_s = case
    result = run(of, forward, backward, p2p_s)
    assert result.step_s >= max(result.busy_s) * (1 - 1e-12)
    assert result.step_s >= (sum(forward) + sum(backward)) * (1 - 1e-12)
    assert run(of, forward, backward, 2 * p2p_s + 0.01).step_s >= result.step_s
    slower = [*forward[:-1], forward[-1] + 0.5]
    assert run(of, slower, backward, p2p_s).step_s >= result.step_s

    by_rank = defaultdict(list)
    for operation, begin_s, end_s in result.events:
        by_rank[operation.stage % of.pp].append((operation, begin_s, end_s))
    for rank, events in by_rank.items():
        assert [operation for operation, _, _ in events] == list(rank_order(of, rank))
        assert all(end <= begin + 1e-9 for (_, _, end), (_, begin, _) in pairwise(events))
        assert sum(end - begin for _, begin, end in events) == pytest.approx(result.busy_s[rank])


@settings(max_examples=40, deadline=None)
@given(of=SHAPES, data=st.data())
def test_what_is_alive_at_once(of: Shape, data: st.DataObject) -> None:
    saved = data.draw(st.lists(st.floats(0, 9), min_size=of.stages, max_size=of.stages))
    peak = [0.0] * of.pp
    for rank in range(of.pp):
        held = Counter[int]()
        for kind, stage, _ in rank_order(of, rank):
            held[stage] += 1 if kind == "F" else -1
            peak[rank] = max(peak[rank], sum(n * saved[s] for s, n in held.items()))
        assert not any(held.values())
    held = [peak_saved_bytes(saved[rank :: of.pp], of, rank) for rank in range(of.pp)]
    assert held == pytest.approx(peak)
    if of.vpp == 1:
        assert alive(of) == tuple(((min(of.pp - r, of.microbatches),),) for r in range(of.pp))
