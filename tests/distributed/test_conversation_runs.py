"""Runs on the shards of `qwen35 data images`: packed, resumed with the next sample, and of text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.data.images.convert import convert
from tests.distributed.test_vision_runs import CP2, PP2, iteration, saved_in
from tests.helpers.conversations import SPECIAL, make_processor, write_digits
from tests.helpers.image_rows import write_config
from tests.helpers.pretrain_runs import Run, script_server
from tests.helpers.run_results import assert_same_tensors, logged_scalars
from tests.helpers.vision import vision_toy_config

EP2 = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"]

LAYOUTS = {"cp2": (2, CP2), "cp2-pp2": (4, [*CP2, *PP2])}


def model_config() -> Qwen35Config:
    config = vision_toy_config(vocab_size=512, mtp_num_hidden_layers=1)
    ids = {f"{kind}_token_id": SPECIAL.index(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return replace(config, carried_outer=config.carried_outer | ids)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_processor(tmp_path_factory.mktemp("model"))
    return write_config(folder, model_config())


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    corpus = write_digits(folder, 48)
    shards = folder / "shards"
    convert(inputs=[corpus], output_dir=shards, processor=str(model), split="50,50,0", quiet=True)
    return shards


def start(model: Path, data: Path, world_size: int, *more: object) -> Run:
    flags = [
        *("--hf-config", model, "--vision", "--image-data", data, "--seq-length", 256),
        *("--micro-batch-size", 1, "--global-batch-size", 4, "--train-iters", 2),
        *("--lr", "1e-3", "--lr-decay-style", "constant", "--log-interval", 1),
        *("--eval-interval", 1, "--eval-iters", 1, "--num-workers", 1, "--save-interval", 1),
        *more,
    ]
    return script_server().start([str(flag) for flag in flags], world_size)


def run(model: Path, data: Path, world_size: int, *more: object) -> Run:
    run = start(model, data, world_size, *more)
    statuses = run.wait()
    assert not any(statuses), f"{statuses}\n{run.output()}"
    return run


@pytest.mark.parametrize("packing", [["--pack-samples"], []], ids=["packed", "padded"])
@pytest.mark.exhaustive
def test_a_run_that_resumes_goes_on_with_the_next_sample(
    model: Path, data: Path, tmp_path: Path, packing: list[str]
) -> None:
    """Of training and of validation data."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(model, data, 2, *EP2, *packing, *saved_in(whole))
    run(model, data, 2, *EP2, *packing, *saved_in(parts), "--exit-interval", 1)
    run(model, data, 2, *EP2, *packing, *saved_in(parts))
    assert_same_tensors(iteration(whole, 2), iteration(parts, 2))
    assert logged_scalars(whole / "log") == logged_scalars(parts / "log")


@pytest.fixture(scope="module")
def packed(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, two steps."""
    folder = tmp_path_factory.mktemp("packed")
    run(model, data, 1, "--pack-samples", *saved_in(folder))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.exhaustive
def test_packed_samples_train_the_same_in_parallel(
    model: Path, data: Path, packed: Path, tmp_path: Path, layout: str
) -> None:
    """Of the second step, with the position of one process: each axis of the positions is shared
    document by document, as the tokens are."""
    world, flags = LAYOUTS[layout]
    source = ["--load", packed, "--ckpt-step", 1, "--tensorboard-dir", tmp_path / "log"]
    run(model, data, world, "--pack-samples", *flags, *source, "--save", tmp_path)
    expected, got = logged_scalars(packed / "log"), logged_scalars(tmp_path / "log")
    for name in ("lm loss", "mtp_1 loss", "lm loss validation", "grad-norm"):
        tolerance = 2e-5 if name == "grad-norm" else 2e-6
        assert got[name][2] == pytest.approx(expected[name][2], rel=tolerance), name


@pytest.mark.exhaustive
def test_data_that_cannot_go_on_begin_anew_and_say_so(
    model: Path, data: Path, tmp_path: Path
) -> None:
    run(model, data, 2, *EP2, *saved_in(tmp_path), "--exit-interval", 1)
    resumed = run(model, data, 1, "--use-distributed-optimizer", *saved_in(tmp_path))
    assert "> conversations: they begin anew in another order" in resumed.output()
    assert "--data-parallel-size 1 (the checkpoint's: 2)" in resumed.output()


@pytest.mark.exhaustive
def test_other_data_under_the_same_name(model: Path, data: Path, tmp_path: Path) -> None:
    """Training data are refused with a way to go on that works; validation begins anew."""
    folder, other = (shutil.copytree(data, tmp_path / name) for name in ("data", "other"))
    alike = (other / ".nv-meta/index.uuid").read_text()[::-1]
    (other / ".nv-meta/index.uuid").write_text(alike)
    run(model, folder, 1, *saved_in(tmp_path), "--exit-interval", 1)
    resumed = run(model, folder, 1, *saved_in(tmp_path), "--image-valid-data", other)
    assert "> validation begins anew: data " in resumed.output()
    (folder / ".nv-meta/index.uuid").write_text(alike)
    longer = [*saved_in(tmp_path), "--train-iters", 3]
    refused = start(model, folder, 1, *longer)
    assert refused.wait() == [2]
    assert "fix: put the data back" in refused.output()
    assert "iteration        3/" in run(model, folder, 1, *longer, "--seed", 5).output()


@pytest.mark.exhaustive
def test_conversations_without_images_train_the_text_model(model: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = write_digits(tmp_path / "all", 48).read_text().splitlines()
    corpus.write_text("".join(f"{line}\n" for line in lines[3::4]))
    shards = tmp_path / "shards"
    convert(inputs=[corpus], output_dir=shards, processor=str(model), split="50,50,0", quiet=True)
    flags = [
        *("--hf-config", model, "--image-data", shards, "--pack-samples", "--seq-length", 256),
        *("--micro-batch-size", 1, "--train-iters", 2, "--lr", "1e-2", "--log-interval", 1),
        *("--eval-iters", 1, "--num-workers", 0, "--tensorboard-dir", tmp_path / "log"),
    ]
    script_server().run([str(flag) for flag in flags])
    losses = logged_scalars(tmp_path / "log")["lm loss"]
    assert losses[2] < losses[1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--image-data", "nowhere"], "nowhere is no dataset of conversations with images"),
        (["--num-workers", "99"], "has fewer samples of the split train than there are readers"),
        (["--seq-length", "32"], "a conversation has more tokens than a sequence holds"),
    ],
    ids=["no dataset", "too few samples", "too long"],
)
@pytest.mark.exhaustive
def test_refused(model: Path, data: Path, more: list[str], says: str) -> None:
    refused = start(model, data, 1, "--global-batch-size", 1, *more)
    assert refused.wait() == [2]
    assert refused.output().count("error: ") == 1
    assert says in refused.output()


@pytest.mark.exhaustive
def test_data_that_are_damaged_end_the_run(model: Path, data: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(data, tmp_path / "data")
    [path] = damaged.glob("train-*.tar")
    path.write_bytes(path.read_bytes().replace(b'{"messages"', b'x"messages"'))
    refused = start(model, damaged, 1, "--global-batch-size", 1)
    assert refused.wait() == [2]
    assert refused.output().count("error: ") == 1
    assert "the text of a sample is damaged" in refused.output()
    assert "Traceback" not in refused.output()
