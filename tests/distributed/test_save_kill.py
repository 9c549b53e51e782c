"""Whatever ends a run, and whenever: there is a complete checkpoint to resume from."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save

from qwen35_mcore.mcore import checkpoint_files
from qwen35_mcore.mcore.checkpoint_files import (
    TRACKER,
    complete_checkpoints,
    damage,
    partial_folder,
    publish,
    recover,
    remove_leftovers,
    tracked_folder,
)
from tests.helpers.pretrain_runs import Run, script_server, small_dataset

KILLS = [2, pytest.param(10, marks=pytest.mark.exhaustive)]


def flags(folder: Path, *more: str) -> list[str]:
    return [
        *("--flavor", "tiny-moe", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "2"),
        *("--train-iters", "1000", "--lr", "1e-3", "--eval-iters", "0", "--log-interval", "1"),
        *("--num-workers", "0", "--use-distributed-optimizer", "--save-interval", "1"),
        *("--expert-model-parallel-size", "2", "--save", str(folder), "--load", str(folder)),
        *more,
    ]


def wait_for(pattern: str, run: Run, seconds: float = 600) -> re.Match[str]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = re.search(pattern, run.output())
        if found:
            return found
        run.poll()
        assert not run.statuses, run.output()
        time.sleep(0.005)
    raise AssertionError(f"no {pattern!r} in {seconds} s:\n{run.output()}")


@pytest.mark.parametrize("kills", KILLS)
def test_killed_while_saving(tmp_path: Path, kills: int) -> None:
    """Each run resumes from what the one before left, and dies at a random moment of a save.

    Every other moment lies anywhere in a save, or a little after it; the others lie soon after its
    first file has appeared, because writing is only a small part of it here.
    """
    chance = random.Random(0)
    reached, kill, killed_while_writing = 0, 0, 0
    while kill < kills or not killed_while_writing:
        assert kill < 5 * kills, "the moments missed every save"
        run = script_server().start(flags(tmp_path), world_size=2)
        if reached:
            wait_for(rf"successfully loaded checkpoint .* at iteration {reached}\b", run)
        wait_for(rf"successfully saved checkpoint from iteration +{reached + 2} ", run)
        wait_for(rf"saving checkpoint at iteration +{reached + 3} ", run)
        share = chance.random() * 1.2
        kill += 1
        if kill % 2 == 0:
            wait_until(lambda: any(tmp_path.glob(".iter_*.partial/*")))
            share *= 0.1
        time.sleep(share * save_seconds(run, reached + 2))
        run.kill()
        run.wait()

        tracked = tracked_folder(tmp_path)
        assert tracked is not None
        assert damage(tracked) is None
        assert int(tracked.name.removeprefix("iter_")) >= reached + 2
        reached = int(tracked.name.removeprefix("iter_"))
        for folder in tmp_path.glob("iter_*"):
            assert not any(folder.iterdir()) or damage(folder) is None
        killed_while_writing += any(tmp_path.glob(".iter_*.partial/*"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("in_flight", [1, 2])
def test_killed_while_saving_beside_the_training(tmp_path: Path, in_flight: int) -> None:
    """A node dies: the run and the processes that write for it, with one save begun or two."""
    command = [sys.executable, "-m", "qwen35_mcore.training.pretrain"]
    command += flags(tmp_path, "--expert-model-parallel-size", "1", "--async-save")
    command += ["--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_until(
                lambda: (
                    run.poll() is not None
                    or (
                        tracked_folder(tmp_path) is not None
                        and len(list(tmp_path.glob(".iter_*.partial"))) >= in_flight
                    )
                )
            )
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert run.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    tracked = tracked_folder(tmp_path)
    assert tracked is not None
    begun = [folder for folder in tmp_path.glob("iter_*") if any(folder.iterdir())]
    assert all(damage(folder) is None for folder in begun)

    reached = int(tracked.name.removeprefix("iter_"))
    end = ["--exit-interval", str(reached + 1)]
    resumed = script_server().run(flags(tmp_path, "--expert-model-parallel-size", "1", *end), 1)
    assert f"at iteration {reached}" in resumed.output()
    assert damage(tmp_path / f"iter_{reached + 1:07d}") is None
    assert not list(tmp_path.glob(".iter_*"))


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def save_seconds(run: Run, iteration: int) -> float:
    """How long a save took, from the times in the log."""
    times = [
        datetime.fromisoformat(re.search(rf"\[([^]]+)\] {what} +{iteration} ", run.output())[1])  # type: ignore[index]
        for what in (
            "saving checkpoint at iteration",
            "successfully saved checkpoint from iteration",
        )
    ]
    return (times[1] - times[0]).total_seconds()


def test_sigterm_saves_and_exits_cleanly(tmp_path: Path) -> None:
    run = script_server().start(
        flags(tmp_path, "--exit-signal-handler", "--save-interval", "1000"), world_size=2
    )
    wait_for(r"iteration +2/", run)
    run.kill(signal.SIGTERM)
    assert run.wait() == [0, 0]
    assert "exiting program after receiving SIGTERM" in run.output()
    tracked = tracked_folder(tmp_path)
    assert tracked is not None
    assert damage(tracked) is None

    reached = int(tracked.name.removeprefix("iter_"))
    resumed = script_server().run(flags(tmp_path, "--exit-interval", str(reached + 1)), 2)
    assert f"at iteration {reached}" in resumed.output()
    samples = re.search(rf"iteration +{reached + 1}/.*consumed samples: +(\d+)", resumed.output())
    assert samples is not None
    assert int(samples[1]) == 2 * (reached + 1)


def test_starting_a_finished_run_again_leaves_its_checkpoint(tmp_path: Path) -> None:
    finished = flags(tmp_path, "--train-iters", "2", "--save-interval", "1000")
    script_server().run(finished, 2)
    files = contents(tmp_path)
    script_server().run(finished, 2)
    assert contents(tmp_path) == files


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of every file but the tracker."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != TRACKER]
    return {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


class Died(BaseException):
    """The process dies here."""


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Let the n-th change to the file system raise instead, and all after it."""
    state = {"left": 0}

    def counting(change: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if state["left"] == 0:
                raise Died
            state["left"] -= 1
            return change(*args, **kwargs)

        return call

    def arm(changes: int) -> None:
        state["left"] = changes
        for owner, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, counting(getattr(owner, name)))

    yield arm
    monkeypatch.undo()


def write_checkpoint(folder: Path, value: float) -> None:
    folder.mkdir(parents=True)
    save({"x": torch.full((4,), value)}, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')


@pytest.mark.parametrize("changes", range(5))
@pytest.mark.parametrize("linked", [False, True])
def test_replacing_the_tracked_checkpoint(
    tmp_path: Path, die_at: Callable[[int], None], changes: int, linked: bool
) -> None:
    """A run that went back to an earlier iteration saves one again that the tracker names, or what
    a link of that name points to: whenever it dies, one of the two comes back, whole."""
    target = tmp_path / "iter_0000020"
    old = tmp_path / "elsewhere" if linked else target
    write_checkpoint(old, 1.0)
    if linked:
        target.symlink_to(old)
    (tmp_path / TRACKER).write_text("20")
    write_checkpoint(partial_folder(target), 2.0)

    died = dies(die_at, changes, partial_folder(target), target)
    assert died == (changes < 3)  # old away, new in place, old removed
    recover(tmp_path)
    assert tracked_folder(tmp_path) == target
    assert damage(target) is None
    assert value_in(target) == (1.0 if changes == 0 else 2.0)
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*"))
    if linked:
        assert value_in(old) == 1.0  # only the link was ours to replace


def dies(die_at: Callable[[int], None], changes: int, partial: Path, target: Path) -> bool:
    with pytest.MonkeyPatch.context() as undone:
        undone.setattr(checkpoint_files, "sync", lambda path: None)
        die_at(changes)
        try:
            publish(partial, target)
        except Died:
            return True
        else:
            return False
        finally:
            die_at(1000)


def value_in(folder: Path) -> float:
    state = {"x": torch.zeros(4)}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return float(state["x"][0])


def test_a_new_checkpoint_that_is_not_whole_gives_way_to_the_old(tmp_path: Path) -> None:
    target = tmp_path / "iter_0000020"
    write_checkpoint(target.with_name(".iter_0000020.replaced"), 1.0)
    partial_folder(target).mkdir()
    remove_leftovers(tmp_path)
    assert value_in(target) == 1.0
    assert not list(tmp_path.glob(".*"))


def test_the_tracker_changes_in_one_step(tmp_path: Path, die_at: Callable[[int], None]) -> None:
    tracker = tmp_path / TRACKER
    tracker.write_text("10")
    with checkpoint_files.replaced_when_closed(tracker) as file:
        file.write("20")
        file.flush()
        assert tracker.read_text() == "10"
    assert tracker.read_text() == "20"
    die_at(0)
    with pytest.raises(Died), checkpoint_files.replaced_when_closed(tracker) as file:
        file.write("30")
    assert tracker.read_text() == "20"


def test_damage_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001"
    write_checkpoint(folder, 1.0)
    assert damage(folder) is None
    data = next(folder.glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert "bytes" in str(damage(folder))
    data.unlink()
    assert "missing" in str(damage(folder))
    data.write_bytes(whole)
    (folder / ".metadata").write_bytes(b"x")
    assert "cannot be read" in str(damage(folder))
    (folder / "metadata.json").unlink()
    assert "metadata.json is missing" in str(damage(folder))
    assert checkpoint_files.complete_checkpoints(tmp_path) == []


@pytest.mark.parametrize("ranks", [["--pipeline-model-parallel-size", "2"], []], ids=["pp2", "dp2"])
def test_nan_stops_with_one_message(tmp_path: Path, ranks: list[str]) -> None:
    """Weights of 1e30 give no finite gradient; without pipeline parallelism all ranks see it."""
    broken = flags(tmp_path, *ranks, "--override", "initializer_range=1e30")
    if ranks:
        broken += ["--expert-model-parallel-size", "1"]
    run = script_server().start(broken, 2)
    assert all(status == 1 for status in run.wait())
    output = run.output()
    assert len(re.findall(r"^error:", output, re.MULTILINE)) == 1
    assert "Traceback" not in output
    assert re.search(r"error: training stopped at iteration 1 on rank \d: found NaN", output)
    assert "lower --lr" in output
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """Megatron's other way to validate results lets the first step pass, and then saves."""
    run = script_server().start(
        flags(
            tmp_path,
            *("--override", "initializer_range=1e30", "--rerun-mode", "validate_results"),
            "--no-check-for-nan-in-loss-and-grad",
        ),
        2,
    )
    assert all(status == 1 for status in run.wait())
    assert len(re.findall(r"^error:", run.output(), re.MULTILINE)) == 1
    assert "the weights are not finite, so no checkpoint was written" in run.output()
    assert tracked_folder(tmp_path) is None
    assert not complete_checkpoints(tmp_path)
