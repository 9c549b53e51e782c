"""The split of a model into pipeline stages: what is chosen, and that little is better."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from qwen35_mcore.parallel.stages import (
    parse_pipeline_layout,
    stage_problems,
    write_pipeline_layout,
)
from qwen35_mcore.planner.candidate import Candidate
from qwen35_mcore.planner.prediction import predict
from qwen35_mcore.planner.schedule import Shape, rank_order
from qwen35_mcore.planner.stages import Chain, Cuts, Splits, Unit
from tests.unit.test_planner_search import job_of

MEGATRON = {
    LayerType.embedding: "E",
    LayerType.decoder: "t",
    LayerType.mtp: "m",
    LayerType.loss: "L",
}


def hybrid(layers: int, *, loss: float = 3.5) -> list[Unit]:
    """Every fourth layer is attention; MTP and the loss are as long as three and a half layers."""
    gdn, attention = Unit(1.0, 2.0, 2.0, 0.3), Unit(1.15, 2.3, 2.0, 0.2)
    decoder = [attention if i % 4 == 3 else gdn for i in range(layers)]
    return [Unit(0.05, 0.1, 1.5, 0.05), *decoder, Unit(loss, 2 * loss, 3.7, 0.8)]


def splits_of(
    units: list[Unit],
    pp: int,
    vpp: int = 1,
    microbatches: int = 32,
    p2p_s: float = 0.0,
    capacity_bytes: float = float("inf"),
) -> Splits:
    shape = Shape(pp=pp, vpp=vpp, microbatches=microbatches)
    return Splits(Chain(units), shape, p2p_s, capacity_bytes)


def step_s(splits: Splits, cuts: Cuts) -> float:
    return splits.simulate(cuts).step_s


class TestLayoutText:
    @given(st.lists(st.text("EtmL", max_size=6), min_size=1, max_size=12))
    def test_reads_back(self, stages: list[str]) -> None:
        text = write_pipeline_layout(stages)
        assert parse_pipeline_layout(text) == tuple(stages)
        parsed = PipelineParallelLayerLayout.parse_str_to_list(text)
        assert ["".join(MEGATRON[layer] for layer in stage) for stage in parsed] == stages

    def test_is_compact(self) -> None:
        assert write_pipeline_layout(["Etttt", *["tttt"] * 6, "ttmL"]) == "Et*4|(t*4|)*6ttmL"
        assert write_pipeline_layout(["Ett", "tt", "mL"]) == "Ett|tt|mL"


@pytest.mark.parametrize(
    ("flavor", "pp", "vpp"), [("2b", 1, 1), ("2b", 3, 1), ("35b-a3b", 8, 1), ("35b-a3b", 4, 3)]
)
def test_megatron_reads_the_layout_as_meant(flavor: str, pp: int, vpp: int) -> None:
    job = job_of(flavor, 24, 96)
    plan = predict(job, Candidate(pp=pp, vpp=vpp))
    config = job.model_config
    layers, mtp = config.num_hidden_layers, config.mtp_num_hidden_layers
    assert parse_pipeline_layout(plan.pipeline_layout) == plan.stages
    problems = stage_problems(
        plan.stages, num_layers=layers, num_mtp_layers=mtp, standalone_mtp=False, pp=pp
    )
    assert not list(problems)
    theirs = PipelineParallelLayerLayout(plan.pipeline_layout, pp)
    assert theirs.validate_layer_layout(layers, mtp) is False
    for stage, layer_characters in enumerate(plan.stages):
        held = theirs.layout[stage % pp][stage // pp]
        assert "".join(MEGATRON[layer] for layer in held) == layer_characters


@st.composite
def small_case(draw: st.DrawFn) -> Splits:
    """Layers of two kinds, as a hybrid model has them."""
    pp, vpp = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3)]))
    seconds = st.sampled_from([0.8, 1.0, 1.2])
    size = st.sampled_from([1.0, 1.5, 2.0])
    kinds = [Unit(draw(seconds), 2 * draw(seconds), draw(size), draw(size)) for _ in range(2)]
    layers = [draw(st.sampled_from(kinds)) for _ in range(draw(st.integers(pp * vpp, 9)))]
    tail = draw(st.sampled_from([0.5, 2.0, 4.0]))
    return splits_of(
        [Unit(0.1, 0.1, 1.0, 0.1), *layers, Unit(tail, tail, 2.0, 1.0)],
        pp,
        vpp,
        pp * draw(st.integers(1, 3)),
        draw(st.sampled_from([0.0, 0.1])),
        draw(st.sampled_from([float("inf"), 24.0, 18.0])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(small_case())
def test_the_split_is_near_the_best_of_all(splits: Splits) -> None:
    """It fits where one does, and its step is within a tenth of the shortest that fits."""
    every = list(combinations(range(1, splits.chain.total), splits.shape.stages - 1))
    fitting = [cuts for cuts in every if max(fullest(splits, cuts)) <= splits.capacity_bytes]
    found = splits.best()
    assert splits.rank_bytes(found) == pytest.approx(fullest(splits, found))
    assert all(splits.least_of_all_s <= step_s(splits, c) * (1 + 1e-9) for c in every[:50])
    if not fitting:
        assert splits.missing_bytes(found) > 0
        return
    assert splits.may_fit() or splits.shape.vpp > 1
    assert splits.missing_bytes(found) == 0
    best = min(step_s(splits, cuts) for cuts in fitting)
    assert best <= step_s(splits, found) <= 1.1 * best


@pytest.mark.parametrize(("pp", "vpp"), [(8, 1), (8, 2), (8, 3), (16, 1), (4, 4)])
def test_large_models_are_split_better_than_evenly(pp: int, vpp: int) -> None:
    splits = splits_of(hybrid(48), pp, vpp, p2p_s=0.02)
    found, even = splits.best(), splits.even()
    if even is not None:
        assert step_s(splits, found) < 0.95 * step_s(splits, even)
    assert step_s(splits, found) <= 1.3 * splits.least_of_all_s


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), [(4, 1, 131), (8, 1, 256), (4, 4, 128)])
def test_many_microbatches_are_carried_on_from_few(pp: int, vpp: int, microbatches: int) -> None:
    """What the search compares is the step that the whole simulation has."""
    splits = splits_of(hybrid(48), pp, vpp, microbatches, p2p_s=0.02)
    cuts = splits.first()
    assert splits.step_s(cuts) == pytest.approx(step_s(splits, cuts), rel=1e-9)


def test_equal_layers_are_split_evenly() -> None:
    nothing = Unit(0.0, 0.0, 0.0, 0.0)
    splits = splits_of([nothing, *[Unit(1.0, 2.0, 2.0, 0.3)] * 64, nothing], 8)
    even = splits.even()
    assert even is not None
    assert step_s(splits, splits.best()) == pytest.approx(step_s(splits, even))


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (8, 1), (8, 2)])
def test_a_memory_limit_moves_layers_and_costs_time(pp: int, vpp: int) -> None:
    free = splits_of(hybrid(60), pp, vpp)
    limit = max(free.rank_bytes(free.best())) - 0.5
    tight = splits_of(hybrid(60), pp, vpp, capacity_bytes=limit)
    found = tight.best()
    assert not tight.missing_bytes(found)
    assert found != free.best()
    assert step_s(tight, found) >= step_s(free, free.best())


def test_too_little_memory_gives_the_split_that_lacks_least() -> None:
    splits = splits_of(hybrid(60), 8, capacity_bytes=15.0)
    assert not splits.may_fit()
    assert splits.missing_bytes(splits.best()) > 0
    assert splits.least_missing_bytes > 0


def fullest(splits: Splits, cuts: Cuts) -> list[float]:
    """By counting what every rank holds after each of its passes."""
    static, saved = splits.chain.static_bytes, splits.chain.saved_bytes
    stages, peaks = list(pairwise((0, *cuts, splits.chain.total))), []
    for rank in range(splits.shape.pp):
        held = sum(static[end] - static[begin] for begin, end in stages[rank :: splits.shape.pp])
        peak = held
        for kind, stage, _ in rank_order(splits.shape, rank):
            begin, end = stages[stage]
            held += (saved[end] - saved[begin]) * (1 if kind == "F" else -1)
            peak = max(peak, held)
        peaks.append(peak)
    return peaks
