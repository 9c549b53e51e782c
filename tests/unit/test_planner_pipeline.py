"""The simulated pipeline step is what Megatron's schedule functions do."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import groupby, pairwise
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.pipeline import Simulation, peak_saved_bytes, simulate
from qwen35_mcore.planner.schedule import Operation, Shape, alive, rank_order, warmup_forwards
from qwen35_mcore.planner.transfers import Ask, Transfer, Wait, rank_actions
from tests.helpers.megatron_schedule import Note, Pass, Post, megatron_warmup, play, record
from tests.helpers.megatron_schedule import Wait as WaitNote

PLAIN = [(1, 1, 3), (2, 1, 1), (2, 1, 5), (3, 1, 2), (4, 1, 4), (4, 1, 9), (8, 1, 16)]
INTERLEAVED = [(2, 2, 2), (2, 2, 6), (2, 3, 4), (3, 2, 3), (3, 4, 9), (4, 2, 8), (4, 3, 12)]


def shape(pp: int, vpp: int, microbatches: int, *, group: int = 0, overlap: bool = False) -> Shape:
    return Shape(pp=pp, vpp=vpp, microbatches=microbatches, group=group or pp, overlap=overlap)


@cache
def recorded(of: Shape) -> list[list[Note]]:
    return [
        record(
            rank,
            pp=of.pp,
            vpp=of.vpp,
            microbatches=of.microbatches,
            group=of.group,
            overlap=of.overlap,
        )
        for rank in range(of.pp)
    ]


MEGATRON_SHAPES = [
    *(shape(*one) for one in PLAIN if one[0] > 1),
    *(
        shape(*one, overlap=overlap)
        for one in INTERLEAVED
        for overlap in (True, False)
        if overlap or one[0] > 2
    ),
    shape(2, 2, 8, group=3, overlap=True),
    shape(3, 2, 10, group=6, overlap=True),
    shape(4, 3, 14, group=5),
]


class TestAgainstMegatron:
    @pytest.mark.parametrize("of", MEGATRON_SHAPES, ids=str)
    def test_every_rank_runs_asks_and_waits_in_the_same_order(self, of: Shape) -> None:
        ways = {
            Transfer.SEND_NEXT: ("send", "next"),
            Transfer.RECV_PREV: ("recv", "next"),
            Transfer.SEND_PREV: ("send", "prev"),
            Transfer.RECV_NEXT: ("recv", "prev"),
        }

        def note(action: Operation | Ask | Wait) -> Note:
            if isinstance(action, Operation):
                return Pass(action.kind, action.stage // of.pp, action.microbatch)
            post = Post(*ways[action.transfer], action.number)
            return post if isinstance(action, Ask) else WaitNote(post)

        for rank in range(of.pp):
            ours = [note(action) for action in rank_actions(of, rank)]
            assert together(ours) == together(recorded(of)[rank])

    @pytest.mark.parametrize("of", MEGATRON_SHAPES, ids=str)
    def test_order_of_passes_and_warmup(self, of: Shape) -> None:
        for rank in range(of.pp):
            ours = [(kind, stage // of.pp, micro) for kind, stage, micro in rank_order(of, rank)]
            theirs = [note for note in recorded(of)[rank] if isinstance(note, Pass)]
            assert ours == [(note.kind, note.chunk, note.microbatch) for note in theirs]
            assert warmup_forwards(of, rank) == megatron_warmup(
                rank, pp=of.pp, vpp=of.vpp, microbatches=of.microbatches, group=of.group
            )


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), [*PLAIN, *INTERLEAVED, (16, 1, 64)])
def test_the_bubble_of_equal_stages_is_the_closed_formula(
    pp: int, vpp: int, microbatches: int
) -> None:
    stages = pp * vpp
    result = run(shape(pp, vpp, microbatches, overlap=vpp > 1), [1.0] * stages, [2.0] * stages)
    assert result.bubble_fraction == pytest.approx((pp - 1) / (vpp * microbatches))
    assert result.step_s == pytest.approx(3 * (microbatches * vpp + pp - 1))


def test_exposed_transfers_of_1f1b() -> None:
    """In steady state a forward pass and a backward pass wait for a transfer each."""
    step = [run(shape(4, 1, m), [1.0] * 4, [2.0] * 4, 0.1).step_s for m in (32, 33)]
    assert step[1] - step[0] == pytest.approx(3 + 2 * 0.1)


SHAPES = st.one_of(
    st.builds(shape, st.integers(1, 5), st.just(1), st.integers(1, 12)),
    st.builds(
        lambda pp, vpp, groups, overlap: shape(pp, vpp, pp * groups, overlap=overlap or pp == 2),
        st.integers(2, 4),
        st.integers(2, 4),
        st.integers(1, 4),
        st.booleans(),
    ),
)


@st.composite
def uneven(draw: st.DrawFn) -> tuple[Shape, list[float], list[float], float]:
    of = draw(SHAPES)
    seconds = st.lists(st.floats(0.01, 5), min_size=of.stages, max_size=of.stages)
    return of, draw(seconds), draw(seconds), draw(st.sampled_from([0.0, 0.05, 1.0]))


@settings(max_examples=40, deadline=None)
@given(uneven())
def test_every_pass_begins_and_ends_as_when_megatrons_functions_are_played(
    case: tuple[Shape, list[float], list[float], float],
) -> None:
    of, forward, backward, p2p = case
    played = play(recorded(of), forward, backward, p2p)
    result = run(of, forward, backward, p2p)
    events = {(e.kind, e.stage, e.microbatch): (e.start_s, e.end_s) for e in result.events}
    assert events.keys() == played.passes.keys()
    for which, times in played.passes.items():
        assert events[which] == pytest.approx(times, rel=1e-9, abs=1e-9)
    assert result.step_s == pytest.approx(played.step_s)


@settings(max_examples=40, deadline=None)
@given(uneven())
def test_properties_of_any_step(case: tuple[Shape, list[float], list[float], float]) -> None:
    of, forward, backward, p2p = case
    result = run(of, forward, backward, p2p)
    assert result.step_s >= max(result.busy_s) * (1 - 1e-12)
    assert result.step_s >= (sum(forward) + sum(backward)) * (1 - 1e-12)
    assert run(of, forward, backward, 2 * p2p + 0.01).step_s >= result.step_s
    slower = [*forward[:-1], forward[-1] + 0.5]
    assert run(of, slower, backward, p2p).step_s >= result.step_s

    by_rank = defaultdict(list)
    for event in result.events:
        by_rank[event.rank].append(event)
    for rank, events in by_rank.items():
        assert [(e.kind, e.stage, e.microbatch) for e in events] == list(rank_order(of, rank))
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(events))
        assert sum(e.end_s - e.start_s for e in events) == pytest.approx(result.busy_s[rank])


@settings(max_examples=40, deadline=None)
@given(of=SHAPES, data=st.data())
def test_what_is_alive_at_once(of: Shape, data: st.DataObject) -> None:
    saved = data.draw(st.lists(st.floats(0, 9), min_size=of.stages, max_size=of.stages))
    result = run(of, [1.0] * of.stages, [1.0] * of.stages)
    most, peak = [0] * of.stages, [0.0] * of.pp
    for rank in range(of.pp):
        held = Counter[int]()
        for kind, stage, _ in rank_order(of, rank):
            held[stage] += 1 if kind == "F" else -1
            most[stage] = max(most[stage], held[stage])
            peak[rank] = max(peak[rank], sum(n * saved[s] for s, n in held.items()))
        assert not any(held.values())
        warmup_and_one = min(warmup_forwards(of, rank) + 1, of.microbatches * of.vpp)
        assert max(sum(moment) for moment in alive(of)[rank]) == warmup_and_one
    assert list(result.in_flight) == most
    assert list(peak_saved_bytes(saved, of)) == pytest.approx(peak)
    if of.vpp == 1:
        assert most == [min(of.pp - rank, of.microbatches) for rank in range(of.pp)]


def test_hundreds_of_steps_are_simulated_in_a_second() -> None:
    of = shape(16, 1, 64)
    run(of, [1.0] * 16, [2.0] * 16)
    begin = process_time()
    for _ in range(200):
        run(of, [1.0] * 16, [2.0] * 16)
    assert process_time() - begin < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pp": 2, "forward_s": [1.0]}, "one duration per virtual stage"),
        ({"pp": 0, "forward_s": []}, "pp must be at least 1"),
        ({"pp": 1, "microbatches": 0}, "microbatches must be at least 1"),
        ({"pp": 1, "vpp": 2}, "needs pipeline ranks"),
        ({"pp": 4, "vpp": 2, "microbatches": 2}, "cannot group microbatches"),
        ({"pp": 4, "vpp": 2, "microbatches": 6}, "shorter than the pipeline"),
        ({"pp": 2, "vpp": 2, "overlap_p2p": False}, "between the same two ranks"),
    ],
)
def test_what_megatron_refuses_is_refused(arguments: dict, message: str) -> None:
    stages = arguments["pp"] * arguments.get("vpp", 1)
    defaults = {"microbatches": 8, "forward_s": [1.0] * stages, "backward_s": [1.0] * stages}
    with pytest.raises(PlanError, match=message):
        simulate(**(defaults | arguments))


def together(notes: list[Note]) -> list[Note]:
    """Posts in a row, and waits in a row, in one order: theirs does not matter."""
    return [
        note
        for kind, run in groupby(notes, type)
        for note in (run if kind is Pass else sorted(run, key=repr))
    ]


def run(of: Shape, forward: list[float], backward: list[float], p2p: float = 0.0) -> Simulation:
    return simulate(
        forward,
        backward,
        pp=of.pp,
        vpp=of.vpp,
        microbatches=of.microbatches,
        p2p_s=p2p,
        microbatch_group=of.group,
        overlap_p2p=of.overlap,
    )
