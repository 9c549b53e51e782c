"""The demo as a user runs it, with few iterations; its picture; what it says when a step fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.helpers.kinds import kinds

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which `qwen35` and the package are found, installed or not."""
    env = dict(os.environ)
    if shutil.which("qwen35", path=str(Path(sys.executable).parent)) is None:
        folder = tmp_path / "bin"
        folder.mkdir()
        command = folder / "qwen35"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qwen35_mcore.cli "$@"\n')
        command.chmod(0o755)
        env["PATH"] = f"{folder}{os.pathsep}{env['PATH']}"
        env["PYTHONPATH"] = str(ROOT)
    return env


def run_demo(environment: dict[str, str], *flags: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", *map(str, flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.fixture
def loss_curve(examples: None) -> ModuleType:
    import loss_curve

    return loss_curve


@pytest.mark.parametrize("decoder", kinds(("gpt", "hybrid"), ("gpt",)))
def test_trains_resumes_and_draws(
    tmp_path: Path, environment: dict[str, str], loss_curve: ModuleType, decoder: str
) -> None:
    output = tmp_path / "demo"
    few = ("--iters", "4", "--stop-at", "2", "--decoder", decoder)
    done = run_demo(environment, "--output", output, *few)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("[3/4]", "iteration    3   lm loss", "final validation loss", "35b-a3b"):
        assert expected in done.stdout
    assert (output / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "4"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    history = loss_curve.read_history(output / "tensorboard")
    assert history.resumed_after == [2]
    for tag in ("lm loss", "mtp_1 loss"):
        assert list(history.losses[tag]) == [1, 2, 3, 4]
    assert list(history.losses["lm loss validation"]) == [4]
    shown = next(line for line in done.stdout.splitlines() if "final validation loss" in line)
    assert f"{history.last('lm loss validation')[1]:.4f}" in shown


def test_refuses_a_folder_of_somebody_else(tmp_path: Path, environment: dict[str, str]) -> None:
    mine = tmp_path / "data"
    mine.write_text("my own")
    done = run_demo(environment, "--output", tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("error: ")
    assert "holds files that no demo wrote" in done.stdout
    assert mine.read_text() == "my own"


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo noise; echo 'ValueError: wrong'; echo more; exit 3", "ValueError: wrong"),
        ("echo '[rank1]: error: no dataset'; echo more; exit 3", "error: no dataset"),
        ("echo 'error: rank 1 was killed by SIGKILL'; exit 137", "error: rank 1 was killed"),
        ("echo 'no such file'; exit 3", "no such file"),
        ("exit 3", "it printed nothing"),
    ],
)
def test_names_the_cause_of_a_failure(
    tmp_path: Path, examples: None, script: str, cause: str
) -> None:
    import demo

    status, said = demo.run_logged(["bash", "-c", script], tmp_path, lambda line: None)
    assert status in (3, 137)
    assert said.startswith(cause)
    assert script in (tmp_path / "demo.log").read_text()


def test_a_continued_run_replaces_what_was_lost(tmp_path: Path, loss_curve: ModuleType) -> None:
    for second, steps, value in ((100, range(1, 8), 3.0), (200, range(5, 9), 2.0)):
        folder = tmp_path / str(second)
        with SummaryWriter(folder) as writer:
            for step in steps:
                writer.add_scalar("lm loss", value, step)
            writer.add_scalar("lm loss validation", value, max(steps))
            writer.add_scalar("lm loss validation", 9.0, max(steps))  # the test set's
        for file in folder.iterdir():
            parts = file.name.split(".")
            file.rename(tmp_path / ".".join([*parts[:3], str(second), *parts[4:]]))
    history = loss_curve.read_history(tmp_path)
    assert history.losses["lm loss"] == dict.fromkeys(range(1, 5), 3.0) | dict.fromkeys(
        range(5, 9), 2.0
    )
    assert history.losses["lm loss validation"] == {8: 2.0}
    assert history.resumed_after == [4]


def test_no_events_is_an_error(tmp_path: Path, loss_curve: ModuleType) -> None:
    with pytest.raises(FileNotFoundError, match="no training loss"):
        loss_curve.read_history(tmp_path)
