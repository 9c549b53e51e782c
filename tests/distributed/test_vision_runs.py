"""Training with images through the script: the same in every layout, stopped and resumed exactly,
parts frozen, and what is exported is the model that transformers runs.

The rows of a microbatch have images on the first of two data-parallel ranks, and none on the other.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.ckpt_cli import ckpt, ok
from tests.helpers.hf_reference import load_pretrained
from tests.helpers.image_rows import model_folder, use_memory, write
from tests.helpers.kinds import kinds
from tests.helpers.pretrain_runs import Run, script_server
from tests.helpers.reference_model import mean_loss
from tests.helpers.run_results import (
    assert_same_tensors,
    checkpoint_common,
    checkpoint_tensors,
    logged_scalars,
)
from tests.helpers.vision import IMAGE, VisionBatch, row, token_types, vision_toy_config

STEPS, HALF, ROWS, LENGTH = 4, 2, 8, 64
CONFIG = vision_toy_config(vocab_size=512, mtp_num_hidden_layers=1)
ONE: list[str] = []
TP2, PP2, EP2, CP2 = (
    [flag, "2"]
    for flag in (
        "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size",
        "--expert-model-parallel-size",
        "--context-parallel-size",
    )
)
VPP2 = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
DISTRIBUTED = "--use-distributed-optimizer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = [[(1, 4, 4), (1, 2, 6)], [], [(1, 6, 4)], [], [(1, 2, 2)], [], [(1, 4, 2)], []]
    videos = [[], [], [(2, 4, 2)], [], [], [], [(2, 2, 2)], []]
    rows = [
        row(CONFIG, LENGTH, *given, seed=seed)
        for seed, given in enumerate(zip(images, videos, strict=True))
    ]
    assert len(rows) == ROWS
    return write(tmp_path_factory.mktemp("data") / "rows.pt", VisionBatch(CONFIG, rows))


def start(model: Path, data: Path, world_size: int, *more: object) -> Run:
    flags = [
        *("--hf-config", model, "--vision", "--image-data", data, "--image-valid-data", data),
        *("--seq-length", LENGTH, "--micro-batch-size", 1, "--global-batch-size", ROWS // 2),
        *("--train-iters", STEPS, "--lr", "1e-3", "--lr-decay-style", "constant"),
        *("--log-interval", 1, "--eval-interval", 100, "--eval-iters", 2, "--num-workers", 0),
        *("--save-interval", HALF, *more),
    ]
    return script_server().start([str(flag) for flag in flags], world_size, before=use_memory)


def run(model: Path, data: Path, world_size: int, *more: object) -> Run:
    run = start(model, data, world_size, *more)
    statuses = run.wait()
    assert not any(statuses), f"{statuses}\n{run.output()}"
    return run


def saved_in(folder: Path) -> list[str]:
    return ["--save", str(folder), "--load", str(folder), "--tensorboard-dir", str(folder / "log")]


def iteration(folder: Path, number: int) -> Path:
    return folder / f"iter_{number:07d}"


@pytest.fixture(scope="module")
def straight(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, all steps; the second half reads the rows of the first half again."""
    folder = tmp_path_factory.mktemp("straight")
    run(model, data, 1, DISTRIBUTED, *saved_in(folder))
    return folder


LAYOUTS = {
    "dp2": (2, ONE),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "vpp2": (2, VPP2),
    "cp2": (2, CP2),
    "tp2-pp2-ep2": (4, [*TP2, *PP2, *EP2, "--expert-tensor-parallel-size", "1"]),
}


@pytest.mark.parametrize("layout", kinds(LAYOUTS, ("tp2-pp2-ep2",)))
def test_equals_one_process(
    model: Path, data: Path, straight: Path, tmp_path: Path, layout: str
) -> None:
    world, flags = LAYOUTS[layout]
    source = ["--load", straight, "--ckpt-step", HALF, "--save", tmp_path]
    run(model, data, world, DISTRIBUTED, *flags, *source, "--tensorboard-dir", tmp_path / "log")
    expected, got = logged_scalars(straight / "log"), logged_scalars(tmp_path / "log")
    for name, tolerance in (("lm loss", 2e-6), ("mtp_1 loss", 2e-6), ("grad-norm", 2e-5)):
        for step in range(HALF + 1, STEPS + 1):
            assert got[name][step] == pytest.approx(expected[name][step], rel=tolerance), name
    validation = "lm loss validation"
    assert got[validation][STEPS] == pytest.approx(expected[validation][STEPS], rel=2e-6)


def test_resume_is_exact(model: Path, data: Path, tmp_path: Path) -> None:
    """The next sample comes next: the second step reads other rows than the first."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [DISTRIBUTED, *EP2, "--train-iters", "2", "--save-interval", "1"]
    run(model, data, 2, *common, *saved_in(whole))
    run(model, data, 2, *common, *saved_in(parts), "--exit-interval", "1")
    run(model, data, 2, *common, *saved_in(parts))
    assert_same_tensors(iteration(whole, 2), iteration(parts, 2))
    assert logged_scalars(whole / "log") == logged_scalars(parts / "log")


def test_tokens_that_do_not_fit_the_images_end_the_run(
    model: Path, data: Path, tmp_path: Path
) -> None:
    batch = torch.load(data, weights_only=False)
    batch.tokens[0, batch.tokens[0].tolist().index(IMAGE)] = 1
    refused = start(model, write(tmp_path / "rows.pt", batch), 1, DISTRIBUTED)
    assert refused.wait() == [2]
    assert refused.output().count("error: ") == 1
    assert "error: the text has other numbers of image tokens" in refused.output()
    assert "Traceback" not in refused.output()


PARTS = {
    "language": lambda name: not name.startswith("vision_model."),
    "vision": lambda name: name.startswith("vision_model.") and ".merger." not in name,
    "merger": lambda name: name.startswith("vision_model.merger."),
}
FROZEN = {
    "language, EP2": (["language"], 2, [DISTRIBUTED, *EP2]),
    "language and vision, TP2 x PP2": (["language", "vision"], 4, [DISTRIBUTED, *TP2, *PP2]),
    "vision and merger, PP2": (["vision", "merger"], 2, [DISTRIBUTED, *PP2]),
    "merger, plain optimizer": (["merger"], 1, []),
    "language and merger, plain optimizer, PP2": (["language", "merger"], 2, PP2),
}


@pytest.mark.parametrize("case", FROZEN)
@pytest.mark.exhaustive
def test_frozen_parts_stay_and_the_others_train(
    model: Path, data: Path, straight: Path, tmp_path: Path, case: str
) -> None:
    """Without clipping, the first step of a part does not depend on what else is trained."""
    frozen, world, flags = FROZEN[case]
    start = ["--pretrained-checkpoint", straight, "--clip-grad", "0", "--train-iters", "1"]
    save = ["--save-interval", "1", "--eval-iters", "0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(model, data, world, *flags, *start, *save, "--save", whole)
    run(model, data, world, *flags, *start, *save, "--save", parts, "--freeze", *frozen)
    before = checkpoint_tensors(iteration(straight, STEPS))
    trained = checkpoint_tensors(iteration(whole, 1))
    after = checkpoint_tensors(iteration(parts, 1))
    names = {name for name in before if not name.startswith("optimizer.")}
    stay = {name for name in names if any(PARTS[part](name) for part in frozen)}
    assert 0 < len(stay) < len(names)
    for name in stay:
        assert after[name].equal(before[name]), name
    moments = [f"optimizer.state.exp_avg.{name}" for name in names - stay]  # gradients, tenthed
    got, expected = (torch.cat([x[m].flatten() for m in moments]) for x in (after, trained))
    assert (got - expected).norm() <= 2e-5 * expected.norm()
    assert not any(after[name].equal(before[name]) for name in names - stay)
    states = {name.split(".", 3)[-1] for name in after if name.startswith("optimizer.state.")}
    assert states == names - stay
    assert checkpoint_common(iteration(parts, 1))["args"].freeze == frozen


@pytest.mark.exhaustive
def test_other_frozen_parts_need_fresh_moments(
    model: Path, data: Path, straight: Path, tmp_path: Path
) -> None:
    """The refusal's advice works, and what the run saves can be resumed."""
    source = ["--load", straight, "--ckpt-step", HALF, "--save", tmp_path, DISTRIBUTED]
    more = [*source, "--freeze", "vision", "--exit-interval", "3", "--save-interval", "1"]
    refused = start(model, data, 1, *more)
    assert refused.wait() == [2]
    assert "pass --no-load-optim to go on with fresh moments, or drop --freeze" in refused.output()
    run(model, data, 1, *more, "--no-load-optim")
    run(model, data, 1, DISTRIBUTED, "--freeze", "vision", *saved_in(tmp_path))
    assert iteration(tmp_path, STEPS).is_dir()


@pytest.mark.exhaustive
def test_the_exported_model_has_the_loss_that_was_logged(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """After five steps at TP2 x PP2 x EP2, of eight validation rows in transformers."""
    world, flags = LAYOUTS["tp2-pp2-ep2"]
    steps = ["--train-iters", 5, "--save-interval", 5]
    run(model, data, world, DISTRIBUTED, *flags, *steps, *saved_in(tmp_path))
    ok(ckpt("export", tmp_path, tmp_path / "hf"))
    exported = load_pretrained(tmp_path / "hf")
    batch = torch.load(data, weights_only=False)
    tokens, images = batch.tokens[:, :-1], batch.images(0, ROWS)
    with torch.no_grad():
        logits = exported(input_ids=tokens, mm_token_type_ids=token_types(tokens), **images).logits
    expected = float(mean_loss(logits, batch.tokens[:, 1:]))
    logged = logged_scalars(tmp_path / "log")["lm loss validation"][5][0]
    assert logged == pytest.approx(expected, abs=1e-6)
