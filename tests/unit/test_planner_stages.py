"""The split of a model into pipeline stages: what is chosen, and that nothing better exists."""

from __future__ import annotations

import re
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from qwen35_mcore.errors import PlanError
from qwen35_mcore.parallel.stages import parse_pipeline_layout, stage_problems
from qwen35_mcore.planner import split_search
from qwen35_mcore.planner.layout_text import write_pipeline_layout
from qwen35_mcore.planner.pipeline import simulate
from qwen35_mcore.planner.schedule import Shape, rank_order
from qwen35_mcore.planner.stages import Element, StagePlan, balance

GIB = 2**30
MEGATRON = {
    LayerType.embedding: "E",
    LayerType.decoder: "t",
    LayerType.mtp: "m",
    LayerType.loss: "L",
}


def hybrid(layers: int, *, loss: float = 2.2, mtp: bool = True) -> list[Element]:
    """Every fourth layer is attention; the loss is as long as two layers, MTP longer than one."""

    def element(kind: str, seconds: float, static: float, saved: float) -> Element:
        return Element(
            kind=kind,
            forward_s=seconds,
            backward_s=2 * seconds,
            static_bytes=static * GIB,
            saved_bytes=saved * GIB,
        )

    decoder = [
        element("t", 1.15 if i % 4 == 3 else 1.0, 2.0, 0.2 if i % 4 == 3 else 0.3)
        for i in range(layers)
    ]
    last = [element("m", 1.3, 2.2, 0.3)] * mtp + [element("L", loss, 1.5, 0.5)]
    return [element("E", 0.05, 1.5, 0.05), *decoder, *last]


class TestLayoutText:
    @given(st.lists(st.text("EtmL", max_size=6), min_size=1, max_size=12))
    def test_reads_back(self, stages: list[str]) -> None:
        text = write_pipeline_layout(stages)
        assert parse_pipeline_layout(text) == tuple(stages)
        assert megatron_stages(text) == stages

    def test_is_compact(self) -> None:
        assert write_pipeline_layout(["Etttt", *["tttt"] * 6, "ttmL"]) == "Et*4|(t*4|)*6ttmL"
        assert write_pipeline_layout(["Ett", "tt", "mL"]) == "Ett|tt|mL"


@pytest.mark.parametrize(
    ("layers", "pp", "vpp", "mtp"),
    [(4, 1, 1, True), (7, 3, 1, True), (60, 8, 1, True), (60, 8, 3, True), (9, 4, 2, False)],
)
def test_megatron_reads_the_layout_as_meant(layers: int, pp: int, vpp: int, mtp: bool) -> None:
    plan = balance(hybrid(layers, mtp=mtp), pp=pp, vpp=vpp, microbatches=16, passes=50_000)
    assert parse_pipeline_layout(plan.layout) == plan.stages
    problems = stage_problems(
        plan.stages, num_layers=layers, num_mtp_layers=int(mtp), standalone_mtp=False, pp=pp
    )
    assert not list(problems)
    theirs = PipelineParallelLayerLayout(plan.layout, pp)
    assert theirs.validate_layer_layout(layers, int(mtp)) is False
    for stage, layer_characters in enumerate(plan.stages):
        held = theirs.layout[stage % pp][stage // pp]
        assert "".join(MEGATRON[layer] for layer in held) == layer_characters


@st.composite
def small_case(draw: st.DrawFn) -> dict:
    pp, vpp = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3)]))
    layers = draw(st.integers(max(1, pp * vpp - 2), 9))
    seconds = st.sampled_from([0.5, 1.0, 1.2, 3.0])
    size = st.sampled_from([1.0, 2.0, 5.0])

    def element(kind: str) -> Element:
        return Element(
            kind=kind,
            forward_s=draw(seconds),
            backward_s=draw(seconds),
            static_bytes=draw(size) * GIB,
            saved_bytes=draw(size) * GIB,
        )

    return {
        "elements": [
            element(kind) for kind in "E" + "t" * layers + draw(st.sampled_from(["mL", "L"]))
        ],
        "pp": pp,
        "vpp": vpp,
        "microbatches": pp * draw(st.integers(1, 3)),
        "p2p_s": draw(st.sampled_from([0.0, 0.1])),
        "capacity_bytes": draw(st.sampled_from([float("inf"), 60.0, 40.0, 25.0])) * GIB,
    }


@settings(max_examples=50, deadline=None)
@given(small_case())
def test_small_models_get_the_best_of_all_splits(case: dict) -> None:
    best = exhaustive(**case)
    if best is None:
        with pytest.raises(PlanError, match=r"the nearest is .* GiB short on pipeline rank"):
            balance(**case)
        return
    plan = balance(**case)
    assert plan.simulation.step_s == pytest.approx(best)
    assert plan.lower_bound_s == pytest.approx(best)
    check(plan, case)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(small_case())
def test_the_search_for_large_models_on_small_ones(case: dict) -> None:
    """It finds a split that fits if there is one, without interleaving the best, else one near it,
    and its lower bound is one."""
    best = exhaustive(**case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_search, "ALL_TRIED", 0)
        if best is None:
            with pytest.raises(PlanError):
                balance(**case)
            return
        plan = balance(**case)
    assert plan.lower_bound_s <= best * (1 + 1e-9)
    assert best <= plan.simulation.step_s * (1 + 1e-9)
    assert plan.simulation.step_s <= best * (1 + 1e-9 if case["vpp"] == 1 else 1.1)
    check(plan, case)


@pytest.mark.parametrize(
    ("layers", "pp", "vpp", "microbatches"),
    [
        (60, 4, 1, 64),
        (60, 4, 3, 64),
        (64, 8, 1, 64),
        (64, 8, 2, 64),
        (64, 8, 4, 64),
        (64, 16, 1, 128),
        (64, 16, 2, 128),
        (48, 16, 3, 64),
        (60, 8, 1, 64),
        (60, 8, 2, 64),
        (60, 8, 3, 64),
        (60, 8, 4, 64),
        (60, 16, 1, 64),
        (60, 16, 2, 64),
        (60, 16, 3, 64),
    ],
)
def test_large_models_gain_at_least_five_percent(
    layers: int, pp: int, vpp: int, microbatches: int
) -> None:
    elements = hybrid(layers)
    plan = balance(elements, pp=pp, vpp=vpp, microbatches=microbatches, p2p_s=0.02, passes=500_000)
    if layers % (pp * vpp) == 0:
        assert plan.even is not None
        even = plan.even.simulation.step_s
    else:
        assert plan.even is None
        even = nearly_even_step(elements, pp, vpp, microbatches, 0.02)
    assert even >= plan.simulation.step_s * 1.05
    assert plan.lower_bound_s <= plan.simulation.step_s


@pytest.mark.parametrize(("pp", "gain"), [(8, 0.012), (16, 0.012)])
def test_without_interleaving_next_to_nothing_is_left(pp: int, gain: float) -> None:
    """The bound covers every split."""
    plan = balance(hybrid(60), pp=pp, microbatches=64, p2p_s=0.02)
    assert plan.simulation.step_s <= plan.lower_bound_s * (1 + gain)


def test_equal_layers_are_split_evenly() -> None:
    layer = hybrid(1)[1]
    nothing = Element(kind="E", forward_s=0, backward_s=0, static_bytes=0, saved_bytes=0)
    loss = Element(kind="L", forward_s=0, backward_s=0, static_bytes=0, saved_bytes=0)
    plan = balance([nothing, *[layer] * 64, loss], pp=8, microbatches=32)
    assert plan.even is not None
    assert plan.simulation.step_s == pytest.approx(plan.even.simulation.step_s)
    assert plan.lower_bound_s == pytest.approx(plan.simulation.step_s)


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (8, 1), (8, 2)])
def test_a_memory_limit_moves_layers_and_costs_time(pp: int, vpp: int) -> None:
    elements = hybrid(60)
    case = {"pp": pp, "vpp": vpp, "microbatches": 32, "passes": 200_000}
    free = balance(elements, **case)
    limit = max(free.stage_bytes) - 0.5 * GIB
    tight = balance(elements, **case, capacity_bytes=limit)
    assert max(tight.stage_bytes) <= limit
    assert tight.layout != free.layout
    assert tight.simulation.step_s >= free.simulation.step_s


@pytest.mark.parametrize(
    ("vpp", "answer"),
    [(1, "no split into 8 stages fits"), (2, "into 16 stages that fits was found")],
)
def test_too_little_memory_names_rank_and_gap(vpp: int, answer: str) -> None:
    with pytest.raises(PlanError) as error:
        balance(hybrid(60), pp=8, vpp=vpp, microbatches=32, capacity_bytes=20 * GIB)
    text = str(error.value)
    assert answer in text
    gap, rank = re.search(r"nearest is (\S+) GiB short on pipeline rank (\d)", text).groups()
    held = re.search(r"got: (\S+) GiB there with layout", text)[1]
    assert float(held) == pytest.approx(20 + float(gap), abs=0.11)
    assert 0 <= int(rank) < 8
    assert "allowed: 20.0 GiB per rank" in text


@pytest.mark.parametrize(
    ("kinds", "pp", "message"),
    [
        ("tEtL", 2, "out of order"),
        ("EtLm", 2, "out of order"),
        ("EtmtL", 2, "out of order"),
        ("EttLL", 2, "out of order"),
        ("", 1, "out of order"),
        ("EttL", 5, "more virtual stages than layers"),
    ],
)
def test_elements_that_are_no_model(kinds: str, pp: int, message: str) -> None:
    elements = [
        Element(kind=kind, forward_s=1, backward_s=1, static_bytes=0, saved_bytes=0)
        for kind in kinds
    ]
    with pytest.raises(PlanError, match=message):
        balance(elements, pp=pp, microbatches=8)


def exhaustive(
    elements: list[Element],
    pp: int,
    vpp: int,
    microbatches: int,
    p2p_s: float,
    capacity_bytes: float,
) -> float | None:
    """The shortest step of all layouts without empty stages, MTP with the loss."""
    tail = sum(element.kind in "mL" for element in elements)
    last_cut = len(elements) - tail
    shape = Shape(pp=pp, vpp=vpp, microbatches=microbatches, group=pp, overlap=vpp > 1)
    steps = []
    for cuts in combinations(range(1, last_cut + 1), pp * vpp - 1):
        edges = [0, *cuts, len(elements)]
        stages = [elements[a:b] for a, b in pairwise(edges)]
        if max(fullest(stages, shape)) <= capacity_bytes:
            steps.append(step_of(stages, pp, vpp, microbatches, p2p_s))
    return min(steps, default=None)


def step_of(
    stages: list[list[Element]], pp: int, vpp: int, microbatches: int, p2p_s: float
) -> float:
    return simulate(
        [sum(e.forward_s for e in stage) for stage in stages],
        [sum(e.backward_s for e in stage) for stage in stages],
        pp=pp,
        vpp=vpp,
        microbatches=microbatches,
        p2p_s=p2p_s,
    ).step_s


def fullest(stages: list[list[Element]], shape: Shape) -> list[float]:
    """By counting what every rank holds after each of its passes."""
    peaks = []
    for rank in range(shape.pp):
        held = sum(e.static_bytes for stage in stages[rank :: shape.pp] for e in stage)
        peak = held
        for kind, stage, _ in rank_order(shape, rank):
            saved = sum(e.saved_bytes for e in stages[stage])
            held += saved if kind == "F" else -saved
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


def check(plan: StagePlan, case: dict) -> None:
    """The plan's numbers are those of its stages."""
    elements = iter(case["elements"])
    stages = [[next(elements) for _ in stage] for stage in plan.stages]
    assert ["".join(e.kind for e in stage) for stage in stages] == list(plan.stages)
    of = plan.simulation.shape
    assert list(plan.stage_bytes) == pytest.approx(fullest(stages, of))
    assert max(plan.stage_bytes) <= case["capacity_bytes"]
    step = step_of(stages, case["pp"], case["vpp"], case["microbatches"], case["p2p_s"])
    assert plan.simulation.step_s == pytest.approx(step)


def nearly_even_step(
    elements: list[Element], pp: int, vpp: int, microbatches: int, p2p_s: float
) -> float:
    """As many layers per stage as comes out, one more in the first stages."""
    layers = len(elements) - 3
    each, more = divmod(layers, pp * vpp)
    counts = [each + (stage < more) for stage in range(pp * vpp)]
    counts[0], counts[-1] = counts[0] + 1, counts[-1] + 2
    rest = iter(elements)
    stages = [[next(rest) for _ in range(count)] for count in counts]
    return step_of(stages, pp, vpp, microbatches, p2p_s)


def megatron_stages(text: str) -> list[str]:
    parsed = PipelineParallelLayerLayout.parse_str_to_list(text)
    return ["".join(MEGATRON[layer] for layer in stage) for stage in parsed]
