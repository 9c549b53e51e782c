"""The search: exact on small spaces, honest about bounds, one clear error for impossible jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.errors import PlanError
from qwen35_mcore.parallel.check import check_layout
from qwen35_mcore.planner.calibration.rows import default_calibration
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.explain import explain, parse_layout
from qwen35_mcore.planner.hardware import get_gpu
from qwen35_mcore.planner.prediction import predict
from qwen35_mcore.planner.search import Space, candidates, search


def job_of(flavor: str, gpus: int, batch: int, gpu: str = "h100-80g") -> Job:
    return Job(
        model_config=get_flavor(flavor),
        gpu=get_gpu(gpu),
        gpus=gpus,
        seq_length=4096,
        global_batch_size=batch,
        calibration=default_calibration("h100-80g"),
        model_name=flavor,
    )


SMALL = [
    (job_of("2b", 8, 64), Space(tp=(1, 2), micro_batch_size=(1, 2), vpp=(1, 2))),
    (job_of("35b-a3b", 16, 64), Space(tp=(1,), pp=(2, 4), micro_batch_size=(2,), vpp=(1, 2))),
    (job_of("35b-a3b", 32, 64), Space(pp=(4,), tp=(1, 2), etp=(1,), vpp=(1,))),
]


@pytest.mark.parametrize(("job", "space"), SMALL)
def test_the_choice_is_the_best_of_all(job: Job, space: Space) -> None:
    """Every allowed layout balanced and simulated: none is faster, and none below its bound."""
    everything = []
    for candidate in candidates(job, space):
        prediction = predict(job, candidate)
        if prediction.missing_bytes:
            continue
        bound = prediction.splits.least_of_all_s
        assert prediction.splits.may_fit()
        assert bound <= prediction.simulation.step_s * (1 + 1e-9)
        everything.append(prediction.step_s)
    found = search(job, space)
    assert found.best[0].step_s == pytest.approx(min(everything), rel=1e-9)
    assert [p.step_s for p in found.best] == sorted(p.step_s for p in found.best)


def test_the_same_job_has_the_same_plan_again() -> None:
    """Work is counted, not timed: nothing depends on the machine or on what it did before."""
    job = job_of("122b-a10b", 128, 1024)
    first, second = (search(job, Space()) for _ in range(2))
    for one, other in zip(first.best, second.best, strict=True):
        assert (one.candidate, one.cuts, one.step_s) == (other.candidate, other.cuts, other.step_s)
    assert first.simulated == second.simulated
    alone = predict(job, first.best[0].candidate)
    assert (alone.cuts, alone.step_s) == (first.best[0].cuts, first.best[0].step_s)


@pytest.mark.parametrize(
    ("flavor", "gpus", "batch"), [("35b-a3b", 16, 512), ("122b-a10b", 128, 1024)]
)
def test_plans_obey_every_rule_and_fit(flavor: str, gpus: int, batch: int) -> None:
    job = job_of(flavor, gpus, batch)
    for prediction in search(job, Space(), top=3).best:
        candidate = prediction.candidate
        assert not check_layout(
            job.model_config,
            candidate.layout(prediction.pipeline_layout),
            seq_length=4096,
            world_size=gpus,
            micro_batch_size=candidate.micro_batch_size,
            global_batch_size=batch,
        )
        assert all(memory.total <= job.gpu.memory_bytes for memory in prediction.memory())
        assert sum(prediction.breakdown().values()) == pytest.approx(prediction.step_s, rel=0.05)


def test_the_stages_are_better_than_even_ones() -> None:
    """MTP and the loss cost as much as many layers: an even split waits for the last stage, or
    does not fit there."""
    fits = predict(job_of("122b-a10b", 128, 1024), Candidate(tp=2, pp=8, ep=8, micro_batch_size=2))
    even = fits.even_split_step_s
    assert even is not None
    assert fits.step_s < 0.75 * even

    candidate = Candidate(pp=4, ep=4, micro_batch_size=8, recompute="full")
    too_large = predict(job_of("35b-a3b", 16, 512), candidate)
    assert not too_large.missing_bytes
    assert too_large.even_split_step_s is None
    even_cuts = too_large.splits.even()
    assert even_cuts is not None
    assert too_large.splits.missing_bytes(even_cuts) > 0


SWITCHES = [
    ({"dispatcher": "ncclep"}, "spreads experts in a node"),
    ({"ep": 16, "dispatcher": "ncclep"}, "spreads experts in a node"),
    ({"ep": 8, "graphs": "full"}, "has no all-to-all"),
    ({"pp": 2, "ep": 8, "dispatcher": "ncclep", "graphs": "full"}, "tp, cp and pp of 1"),
    ({"cp": 2, "ep": 8, "dispatcher": "ncclep", "graphs": "full"}, "tp, cp and pp of 1"),
    ({"pp": 2, "ep": 8, "graphs": "parts", "recompute": "full"}, "without recompute=full"),
]


@pytest.mark.parametrize(("sizes", "rule"), SWITCHES)
def test_what_training_refuses_is_no_plan(sizes: dict[str, Any], rule: str) -> None:
    job = job_of("35b-a3b", 16, 512)
    [violation] = explain(job, Candidate(**sizes)).violations
    assert rule in violation.rule
    pinned = {name: (value,) for name, value in sizes.items()}
    ones = dict.fromkeys(("tp", "pp", "vpp", "cp", "ep", "etp"), (1,))
    space = Space(**ones | pinned)
    assert not list(candidates(job, space))


def test_nccl_ep_and_no_graphs_are_tried_where_they_are_asked_for() -> None:
    job = replace(job_of("35b-a3b", 8, 64), gpu=get_gpu("h200-141g"))
    sizes = {"tp": (1,), "cp": (1,), "micro_batch_size": (1,), "recompute": ("none",)}
    best = search(job, Space(**sizes, dispatcher=("alltoall", "ncclep")), top=1).best[0]
    usual = search(job, Space(**sizes), top=1).best[0]
    plain = search(job, Space(**sizes, graphs=("none",)), top=1).best[0]
    assert best.step_s <= usual.step_s < 0.95 * plain.step_s
    assert (best.candidate.dispatcher, best.candidate.graphs) == ("ncclep", "parts")
    assert (usual.candidate.dispatcher, usual.candidate.graphs) == ("alltoall", "full")
    assert plain.candidate.graphs == "none"


@pytest.mark.parametrize(
    ("flavor", "sizes", "graphs"),
    [
        ("2b", {}, {"none": ["full", "parts"], "full": ["full", "none"]}),
        ("2b", {"pp": (2,)}, {"none": ["full", "parts"], "full": ["full", "none"]}),
        ("2b", {"tp": (2,)}, {"none": ["full", "parts"], "full": ["full", "none"]}),
        ("35b-a3b", {"pp": (2,), "ep": (4,)}, {"none": ["parts"], "full": ["none"]}),
        (
            "35b-a3b",
            {"ep": (8,), "dispatcher": ("ncclep",)},
            {"none": ["full", "parts"], "full": ["full", "none"]},
        ),
    ],
)
def test_a_candidate_has_the_best_graphs_it_can_have(
    flavor: str, sizes: dict[str, Any], graphs: dict[str, list[str]]
) -> None:
    """Beside one graph of the step, whose pool takes memory, the next best."""
    ones = dict.fromkeys(("tp", "cp", "pp", "vpp", "etp", "micro_batch_size"), (1,))
    for recompute, expected in graphs.items():
        space = Space(**ones | sizes | {"recompute": (recompute,)})
        assert [one.graphs for one in candidates(job_of(flavor, 8, 64), space)] == expected


def test_pinned_sizes_are_kept() -> None:
    found = search(job_of("35b-a3b", 16, 512), Space(pp=(2,), ep=(8,), recompute=("full",)))
    assert {(p.candidate.pp, p.candidate.ep, p.candidate.recompute) for p in found.best} == {
        (2, 8, "full")
    }


def test_every_virtual_stage_has_a_layer() -> None:
    """24 layers, embedding and loss make 26 stages at most."""
    job = job_of("2b", 16, 256)
    found = search(job, Space(tp=(1,), vpp=(4,), micro_batch_size=(1,)))
    assert all(one.candidate.pp * 4 <= 26 for one in found.best)
    [violation] = explain(job, Candidate(pp=8, vpp=4)).violations
    assert violation.rule == "every virtual stage has a layer"
    with pytest.raises(PlanError, match=r"every virtual stage has a layer(.|\n)*fix: lower pp"):
        search(job, Space(pp=(8,), vpp=(4,)))


def test_more_memory_is_not_slower() -> None:
    """What fits on an H100 fits on an H200 too."""
    h100, h200 = (search(job_of("35b-a3b", 16, 512, gpu), Space()) for gpu in ("h100", "h200"))
    assert h200.best[0].step_s < h100.best[0].step_s


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (job_of("397b-a17b", 8, 512), ["fits on 8 h100-80g in no layout", "pass --gpus 96"]),
        (job_of("35b-a3b", 7, 512), ["fits on 7 h100-80g", "short on every GPU", "--gpus 16"]),
    ],
)
def test_a_model_that_does_not_fit(job: Job, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        search(job, Space())
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_named_number_of_gpus_works_and_fewer_nodes_do_not() -> None:
    job = job_of("397b-a17b", 96, 960)
    assert search(job, Space(), top=1).best
    with pytest.raises(PlanError):
        search(replace(job, gpus=88), Space(), top=1)


def test_a_batch_that_nothing_divides() -> None:
    with pytest.raises(PlanError) as caught:
        search(job_of("35b-a3b", 16, 509), Space(tp=(1,), pp=(2,)))
    assert "504 or 512" in str(caught.value)
    for batch in (504, 512):
        assert search(job_of("35b-a3b", 16, batch), Space(tp=(1,), pp=(2,)), top=1).best


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="did you mean h200-141g"):
        get_gpu("h220-141g")
    assert get_gpu("H200") is get_gpu("h200_141g")


@pytest.mark.parametrize(
    ("layout", "reasons"),
    [
        ("tp=3", ["tp divides num_attention_heads", "tp fits num_key_value_heads"]),
        ("tp=2,ep=16,pp=2", ["ep * etp * pp divides the world size"]),
        ("pp=2,ep=3", ["ep divides num_experts"]),
        ("pp=2,ep=8,layout=Et*20m|t*20L", ["m (MTP) must be in the last virtual stage"]),
        ("pp=2,ep=8,mbs=3", ["micro batch * dp divides the global batch"]),
        ("etp=64,precision=fp8-blockwise", ["fp8 width of the experts"]),
    ],
)
def test_explaining_a_layout_names_the_rules(layout: str, reasons: list[str]) -> None:
    gpus = 64 if "etp=64" in layout else 16
    explanation = explain(job_of("35b-a3b", gpus, 512), *parse_layout(layout))
    assert explanation.prediction is None
    text = "\n".join(map(str, explanation.violations))
    assert all(reason in text for reason in reasons), text


def test_explaining_memory_names_the_stage_and_what_is_missing() -> None:
    job = job_of("35b-a3b", 16, 512)
    explanation = explain(job, *parse_layout("pp=2,ep=8,mbs=4,layout=Et*20|t*20mL"))
    assert explanation.prediction is None
    assert "GiB on stage 0" in explanation.memory
    assert "activations" in explanation.memory
    balanced = explain(job, Candidate(pp=2, ep=8, micro_batch_size=4))
    assert "memory over by" in balanced.memory


def test_explaining_a_layout_that_runs_predicts_it() -> None:
    job = job_of("35b-a3b", 16, 512)
    searched = explain(job, *parse_layout("pp=2,ep=8,recompute=full"))
    assert searched.prediction is not None
    layout = searched.prediction.pipeline_layout
    given = explain(job, *parse_layout(f"pp=2,ep=8,recompute=full,layout={layout}"))
    assert given.prediction is not None
    assert given.prediction.step_s == pytest.approx(searched.prediction.step_s)
    for one, other in zip(given.prediction.memory(), searched.prediction.memory(), strict=True):
        assert one.total == pytest.approx(other.total)


@pytest.mark.parametrize("text", ["tp", "tp=0", "tpp=2", "recompute=some", "tp=two"])
def test_a_layout_that_cannot_be_read(text: str) -> None:
    with pytest.raises(PlanError, match="cannot read the layout"):
        parse_layout(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the layout is empty"),
        (" , ", "the layout is empty"),
        ("tp=2,pp=2,tp=4", "names tp more than once"),
        ("layout=E|tL,layout=E|tL", "names layout more than once"),
    ],
)
def test_a_layout_that_says_nothing_or_too_much(text: str, problem: str) -> None:
    with pytest.raises(PlanError, match=problem) as caught:
        parse_layout(text)
    assert "\n  fix: name " in str(caught.value)


def test_a_layout_is_read_in_any_order() -> None:
    stages = "Et*12|t*28mL"
    last = parse_layout(f"pp=2,ep=8,layout={stages}")
    assert last == (Candidate(pp=2, ep=8), stages)
    assert parse_layout(f"layout={stages},pp=2,ep=8") == last
    assert parse_layout(f"pp=2, layout={stages}, ep=8") == last
    with_comma = "E,t*12|t*28,mL"
    assert parse_layout(f"layout={with_comma},pp=2") == (Candidate(pp=2), with_comma)
