"""The planner of a run that trains the vision tower: what the first stage holds and computes more,
frozen parts, layouts that the tower refuses, and the flags that a plan writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore.config.counts import count_parameters, vision_parameters
from qwen35_mcore.config.flavors import VISION_FLAVORS, vision_flavor
from qwen35_mcore.config.flops import BACKWARD_AND_FORWARD
from qwen35_mcore.config.images import PARTS, Images
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.parallel.parameters import Parameters, part_parameters
from qwen35_mcore.planner.calibration.rows import default_calibration
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.communication import send
from qwen35_mcore.planner.emit import flags, plan_json
from qwen35_mcore.planner.explain import explain
from qwen35_mcore.planner.hardware import get_gpu
from qwen35_mcore.planner.layers import kinds_of
from qwen35_mcore.planner.prediction import Prediction, predict
from qwen35_mcore.planner.search import Space, search
from tests.helpers.ckpt_cli import ok, qwen35, refused

PUBLISHED = VisionConfig.of(vision_flavor("35b-a3b"))


def job_of(
    flavor: str = "35b-a3b", gpus: int = 8, *, mtp: bool = True, seq_length: int = 4096, **run: Any
) -> Job:
    """A job whose sequences have images as ``run`` says; none: text alone."""
    config = vision_flavor(flavor)
    if not mtp:
        config = replace(config, mtp_num_hidden_layers=0)
    return Job(
        model_config=config,
        gpu=get_gpu("h200-141g"),
        gpus=gpus,
        seq_length=seq_length,
        global_batch_size=64,
        calibration=default_calibration("h100-80g"),
        images=Images.of(config, seq_length=seq_length, **run) if run else None,
    )


def predicted(candidate: Candidate, **run: Any) -> Prediction:
    return predict(job_of(**run), candidate)


@pytest.mark.parametrize("flavor", VISION_FLAVORS)
def test_one_rank_holds_the_whole_model(flavor: str) -> None:
    config, images = vision_flavor(flavor), job_of(flavor, patches=1024).images
    kinds = kinds_of(config)
    held = sum((part_parameters(config, Candidate(), k, images) for k in kinds), Parameters())
    assert held.count == held.trained == count_parameters(config, vision=True).total


def test_the_first_stage_alone_holds_the_tower() -> None:
    text, images = (
        predicted(Candidate(pp=2, ep=4, recompute="full"), mtp=False, **run)
        for run in ({}, {"patches": 1024})
    )
    same = replace(images, cuts=text.cuts)
    more = [same.rank_parameters(r).count - text.rank_parameters(r).count for r in range(2)]
    assert more == [vision_parameters(PUBLISHED), 0]
    before, after = text.memory(), same.memory()
    assert after[1] == replace(before[1], workspace=after[1].workspace)
    assert after[0].weights - before[0].weights == 2 * more[0]
    assert after[0].gradients - before[0].gradients == 4 * more[0]
    assert after[0].optimizer - before[0].optimizer == pytest.approx(12 * more[0] / 4)
    assert after[0].activations > before[0].activations


def test_what_a_patch_keeps() -> None:
    """27 blocks of two inputs, two normed inputs, cosines and sines of 72 channels twice, q, k, v,
    attention's output, and twice the inner width; the patch, and what the merger keeps."""
    h, ffn = 1152, 4304
    images = Images(vision=PUBLISHED, patches=1024)
    blocks, ends = 27 * (16 * h + 8 * 72 + 4 * ffn), 2 * 1536 + 8 * h
    assert images.kept_bytes(1, recomputed=False)[0] == blocks + ends
    assert images.kept_bytes(1, recomputed=True)[0] == 27 * 2 * h + ends
    halved, _ = images.kept_bytes(2, recomputed=False)
    assert halved == 27 * (8 * h + 8 * 72 + 8 * h / 2 + 4 * ffn / 2) + 2 * 1536 + 4 * h + 4 * h / 2


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"cp": 2}])
def test_memory_grows_by_the_images(recompute: str, sizes: dict[str, int]) -> None:
    """Every rank of TP and of CP sees all patches, whatever part of the sequence it has."""
    candidate = Candidate(ep=8 // sizes.get("cp", 1), recompute=recompute, **sizes)
    few, many = (
        predicted(candidate, patches=p, per_sequence=2, seq_length=8192) for p in (64, 128)
    )
    assert few.job.images is not None
    kept, _ = few.job.images.kept_bytes(candidate.tp, recomputed=recompute == "full")
    grown = many.memory()[0].activations - few.memory()[0].activations
    assert grown == pytest.approx(2 * 64 * kept)


def test_time_and_operations_grow_by_the_images() -> None:
    """Few patches take as long as the launches of 27 blocks; many, in proportion."""
    candidate = Candidate(ep=8, recompute="none")
    run = {"seq_length": 32768}
    text, *seen = (
        predicted(candidate, **run, **images)
        for images in (
            {},
            {"patches": 64},
            {"patches": 128},
            {"patches": 32768},
            {"patches": 65536},
        )
    )
    launches = seen[0].step_s - text.step_s
    assert launches == pytest.approx(text.microbatches * 27 * 4.5e-3, rel=0.02)
    assert seen[1].step_s == pytest.approx(seen[0].step_s)
    assert seen[3].step_s - text.step_s > 2 * (seen[2].step_s - text.step_s)  # and its square
    for one in seen:
        assert one.job.images is not None
        more = one.model_flops_per_gpu_s * one.step_s - text.model_flops_per_gpu_s * text.step_s
        assert more == pytest.approx(BACKWARD_AND_FORWARD * one.job.images.flops * 64 / 8, rel=1e-6)


def test_recomputation_runs_the_blocks_again() -> None:
    def tower_s(recompute: str) -> tuple[float, float]:
        text, images = (
            predicted(Candidate(ep=8, tp=2, recompute=recompute), **run).model.part["E"]
            for run in ({}, {"patches": 16384})
        )
        return images.forward_s - text.forward_s, images.backward_s - text.backward_s

    (forward, backward), (again, longer) = tower_s("none"), tower_s("full")
    assert forward == pytest.approx(again)
    assert longer == pytest.approx(backward + forward)


def test_stages_are_balanced_with_the_tower() -> None:
    """A first stage that reads many patches gets fewer layers."""
    layers = [
        predicted(Candidate(pp=4, ep=2, recompute="full"), mtp=False, seq_length=16384, **run)
        .stages[0]
        .count("t")
        for run in ({}, {"patches": 4096, "per_sequence": 4}, {"patches": 8192, "per_sequence": 8})
    ]
    assert layers[0] > layers[1] > layers[2]


@pytest.mark.parametrize(
    "frozen",
    [("language",), ("vision",), ("merger",), ("vision", "merger"), ("language", "vision")],
)
def test_what_is_frozen_holds_its_weights_alone(frozen: tuple[str, ...]) -> None:
    candidate = Candidate(ep=8, recompute="none")
    whole, part = (predicted(candidate, patches=1024, frozen=one) for one in ((), frozen))
    counts = {"language": count_parameters(whole.job.model_config).total}
    counts |= Images(vision=PUBLISHED, patches=4).parameters(1)
    held = part.rank_parameters(0)
    assert held.count == whole.rank_parameters(0).count
    trained = sum(counts[name] for name in PARTS if name not in frozen)
    experts = count_parameters(whole.job.model_config).experts.total * 41 / 40 * 7 / 8
    assert held.trained == pytest.approx(trained - (0 if "language" in frozen else experts))
    [before], [after] = whole.memory(), part.memory()
    assert after.weights == before.weights
    assert after.gradients == 4 * held.trained
    assert after.optimizer < before.optimizer
    assert (after.activations < before.activations) == ("vision" in frozen)
    assert part.step_s < whole.step_s


def test_a_frozen_tower_has_no_backward_pass() -> None:
    frozen = predicted(Candidate(ep=8), patches=1024, frozen=("vision", "merger"))
    text = predicted(Candidate(ep=8))
    assert frozen.model.part["E"].backward_s == text.model.part["E"].backward_s
    assert frozen.model.part["E"].kept.saved == 0
    assert frozen.rank_parameters(0).trained == text.rank_parameters(0).trained


def test_layouts_that_the_tower_does_not_run_in() -> None:
    in_fp8 = explain(job_of(patches=1024), Candidate(ep=8, precision="fp8-blockwise"))
    assert [one.rule for one in in_fp8.violations] == ["the vision tower trains without fp8"]
    narrow = replace(PUBLISHED, intermediate_size=4302)
    job = job_of(gpus=32, patches=1024)
    assert job.images is not None
    job = replace(job, images=replace(job.images, vision=narrow))
    rules = [one.rule for one in explain(job, Candidate(tp=4, ep=8)).violations]
    assert rules == ["tp divides the vision tower's intermediate_size"]
    either = Space(ep=(8,), micro_batch_size=(1,), precision=("bf16", "fp8-blockwise"))
    found = search(job_of(patches=1024), either)
    assert {one.candidate.precision for one in found.best} == {"bf16"}


def test_switches_that_the_tower_does_not_run_with(folder: Path) -> None:
    in_graph = explain(job_of(patches=1024), Candidate(ep=8, graphs="parts"))
    assert [one.rule for one in in_graph.violations] == ["the vision tower trains without graphs"]
    done = qwen35("plan", "--hf-config", folder, *SMALL, *IMAGES, "--optimizer", "muon")
    refused(done, "Muon does not train a vision tower", "--optimizer adam")


def test_images_travel_to_mtp() -> None:
    """Through every stage, beside the hidden states."""
    candidate = Candidate(pp=2, ep=4)
    for mtp, times in ((True, 2), (False, 1)):
        text, images = (predicted(candidate, mtp=mtp, **run) for run in ({}, {"patches": 64}))
        latency = send(0, text.model.groups["pp"], text.job.gpu)
        assert images.model.p2p_s - latency == pytest.approx(times * (text.model.p2p_s - latency))


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"patches": 1022}, "whole number"),
        ({"patches": 1024, "per_sequence": 17}, "more tokens than the sequence"),
        ({"patches": 1024, "frozen": ("tower",)}, "no such part"),
        ({"patches": 1024, "frozen": PARTS}, "all parts are frozen"),
    ],
)
def test_images_that_cannot_be(run: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        job_of(**run)


SMALL = ("--gpus", "8", "--gpu", "h200", "--global-batch-size", "64")
IMAGES = ("--vision", "--image-patches", "1024", "--images", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the published model, as far as the planner reads it."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(vision_flavor("35b-a3b").to_hf()))
    return tmp_path / "hf"


def test_a_flavor_is_a_text_model() -> None:
    """Training says the same of it."""
    done = qwen35("plan", "--flavor", "35b-a3b", *SMALL, *IMAGES)
    refused(done, "no vision tower", "--hf-config")


def test_a_plan_says_what_it_counted_and_writes_the_flags(folder: Path, tmp_path: Path) -> None:
    layout = ("--explain", "ep=8,recompute=full", "--freeze", "vision", "--freeze", "language")
    done = ok(
        qwen35("plan", "--hf-config", folder, *SMALL, *IMAGES, *layout, "--emit", tmp_path / "p")
    )
    assert (
        "With the vision tower: 2 x 1,024 image patches a sequence, frozen: language, vision"
        in (" ".join(done.out.split()))
    )
    arguments = (tmp_path / "p" / "layout.args").read_text()
    assert f"--hf-config {folder} --vision --freeze language vision" in arguments
    plan = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert plan["images"] == {"per_sequence": 2, "patches": 1024, "frozen": ["language", "vision"]}
    assert "vision" in plan["not_measured"]


def test_a_plan_of_text_alone_names_no_images() -> None:
    text = predicted(Candidate(ep=8))
    assert "--vision" not in flags(text)
    assert "images" not in json.loads(plan_json(text))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--vision",), "--image-patches"),
        (("--image-patches", "1024"), "--vision"),
        (("--images", "2"), "--vision"),
        (("--freeze", "vision"), "--vision"),
        ((*IMAGES, "--freeze", "tower"), "no such part to freeze"),
    ],
)
def test_flags_that_do_not_belong_together(folder: Path, words: tuple[str, ...], says: str) -> None:
    done = qwen35("plan", "--hf-config", folder, *SMALL, *words)
    assert done.code == 2
    assert says in done.err
