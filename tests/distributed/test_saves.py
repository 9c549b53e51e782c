"""What the log says was saved is on the disk, with these weights, however the run started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen35_mcore.mcore.checkpoint_files import TRACKER, damage, tracked_folder
from tests.helpers.pretrain_runs import Run, script_server, small_dataset
from tests.helpers.run_results import checkpoint_common, checkpoint_tensors

ROOT = Path(__file__).parents[2]


def flags(*more: str) -> list[str]:
    return [
        *("--flavor", "tiny-dense", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "2"),
        *("--lr", "1e-3", "--lr-decay-style", "constant", "--eval-iters", "0"),
        *("--log-interval", "1", "--num-workers", "0", "--use-distributed-optimizer"),
        *("--train-iters", "4", "--save-interval", "2"),
        *more,
    ]


def run(*more: str, world_size: int = 1) -> Run:
    return script_server().run(flags(*more), world_size)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("first")
    run("--save", str(folder))
    return folder


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "run"))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    assert damage(checkpoint) is None
    tensors = checkpoint_tensors(checkpoint)
    return {key: value for key, value in tensors.items() if not key.startswith("optimizer.")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("start", "world_size"),
    [
        (["--finetune"], 1),
        (["--override-ckpt-iteration", "2"], 1),
        (["--no-load-optim", "--no-load-rng", "--ckpt-step", "2", "--seed", "5"], 1),
        (["--finetune", "--tensor-model-parallel-size", "2"], 2),
    ],
    ids=["finetune", "other-iteration", "back-without-state", "other-layout"],
)
def test_a_save_replaces_what_has_its_name(
    folder: Path, first: Path, start: list[str], world_size: int
) -> None:
    """The same run started into another folder, where nothing has that name, saves the same."""
    here = ["--load", str(folder), "--save"]
    elsewhere = folder.with_name("elsewhere")
    run(*here, str(elsewhere), *start, world_size=world_size)
    done = run(*here, str(folder), *start, world_size=world_size)
    assert "successfully saved checkpoint from iteration       4" in done.output()
    saved = weights(folder / "iter_0000004")
    assert not same(saved, weights(first / "iter_0000004"))
    assert same(saved, weights(elsewhere / "iter_0000004"))
    assert tracked_folder(folder) == folder / "iter_0000004"
    assert not list(folder.glob(".*"))


def test_going_back_to_an_earlier_iteration(folder: Path) -> None:
    """The tracker follows the saves; what lies ahead stays until it is replaced."""
    later = weights(folder / "iter_0000004")
    back = ["--load", str(folder), "--save", str(folder), "--ckpt-step", "2", "--seed", "5"]
    run(*back, "--save-interval", "1", "--exit-interval", "3")
    assert (folder / TRACKER).read_text() == "3"
    assert same(weights(folder / "iter_0000004"), later)


def test_weights_of_another_folder(folder: Path) -> None:
    """A pretrained checkpoint whose iteration has the name of a save, in the very same folder."""
    before = weights(folder / "iter_0000004")
    run("--pretrained-checkpoint", str(folder), "--save", str(folder))
    assert not same(weights(folder / "iter_0000004"), before)


def test_nothing_left_to_train(folder: Path) -> None:
    """Nothing is announced as saved, and nothing is written, not even with fewer steps."""
    both = ["--load", str(folder), "--save", str(folder)]
    times = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    for more in (["--save-interval", "3"], ["--train-iters", "3"]):
        done = run(*both, *more)
        assert f"> nothing to train: {folder / 'iter_0000004'} is at iteration 4" in done.output()
        assert "saved checkpoint" not in done.output()
        assert {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()} == times


def test_a_blend_that_is_used_up(tmp_path: Path) -> None:
    """A blend holds exactly the samples asked for: a finished run starts again all the same, and
    so does one whose batches become smaller."""
    blend = ["--data-path", "0.5", small_dataset(), "0.5", small_dataset(), "--eval-iters", "1"]
    both = ["--load", str(tmp_path), "--save", str(tmp_path)]
    run(*blend, *both, "--global-batch-size", "4")
    assert "nothing to train" in run(*blend, *both, "--global-batch-size", "4").output()
    smaller = run(*blend, *both, "--train-iters", "6")
    assert "iteration        6/" in smaller.output()


def test_release_beside_iterations(folder: Path) -> None:
    """``--ckpt-step`` chooses an iteration also where the tracker names the imported weights."""
    shutil.copytree(folder / "iter_0000004", folder / "release")
    (folder / TRACKER).write_text("release")
    both = ["--load", str(folder), "--save", str(folder.with_name("to"))]
    assert "at iteration 2" in run(*both, "--ckpt-step", "2").output()
    assert "at iteration 0" in run(*both, "--exit-interval", "1").output()


def test_without_random_states(folder: Path) -> None:
    both = ["--load", str(folder), "--save", str(folder), "--no-save-rng"]
    run(*both, "--train-iters", "6")
    done = run(*both, "--train-iters", "8")
    assert f"> {folder / 'iter_0000006'} holds no random states" in done.output()


def test_retention_spares_what_was_just_replaced(folder: Path) -> None:
    """Iteration 4, replaced after going back to 2, is not taken for the one before."""
    both = ["--load", str(folder), "--save", str(folder), "--save-retain-interval", "100"]
    run(*both, "--ckpt-step", "2", "--seed", "5")
    assert damage(folder / "iter_0000004") is None
    assert damage(folder / "iter_0000002") is None


def test_saves_beside_the_training(tmp_path: Path) -> None:
    """Asynchronous saves of the real script, the second time over checkpoints of the same name,
    and over what a killed one has left."""
    worker = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    both = ["--load", str(tmp_path), "--save", str(tmp_path)]
    in_background(*worker, *both)
    before = weights(tmp_path / "iter_0000004")
    left = tmp_path / ".iter_0000004.partial"
    left.mkdir()
    (left / "__9_0.distcp").write_text("left by a save that was killed")
    in_background(*worker, *both, "--finetune")
    assert not same(weights(tmp_path / "iter_0000004"), before)
    assert not (tmp_path / "iter_0000004" / "__9_0.distcp").exists()
    assert checkpoint_common(tmp_path / "iter_0000004")["iteration"] == 4
    assert not list(tmp_path.glob(".*"))


def in_background(*more: str) -> None:
    """As a process of its own: the worker starts others, which a fork of ours cannot."""
    command = [sys.executable, "-m", "qwen35_mcore.training.pretrain", *flags(*more)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "successfully saved checkpoint from iteration       4" in done.stdout
