"""examples/README.md followed in order: every section does what it says after the ones before."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.run_results import logged_scalars

ROOT = Path(__file__).parents[2]
SHORTER = 20
"""Iterations are divided by this; the numbers of the text with them."""


def section(number: int) -> list[str]:
    """The commands of a section, but for those that need the user's own data or install."""
    text = (ROOT / "examples" / "README.md").read_text()
    body = re.split(r"^## ", text, flags=re.M)[number]
    assert body.startswith(f"{number}. ")
    blocks = re.findall(r"```bash\n(.*?)```", body, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    others = ("corpus/", "chats.jsonl", "pip install")
    return [line for line in lines if not any(word in line for word in others)]


def shortened(line: str) -> str:
    counts = r"(--train-iters|--exit-interval) (\d+)"
    line = re.sub(counts, lambda found: f"{found[1]} {int(found[2]) // SHORTER}", line)
    if "train" not in line:
        return line
    iterations = "" if "--train-iters" in line else f" --train-iters {160 // SHORTER}"
    return f"{line}{iterations} --log-interval 1 --eval-iters 1 --lr-warmup-iters 0"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root, in which nothing has run."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    tools = folder / "tools"
    tools.mkdir()
    commands = {"qwen35": "-m qwen35_mcore.cli", "torchrun": "-m torch.distributed.run"}
    for name, flags in (commands | {"python": ""}).items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {flags} "$@"\n')
        (tools / name).chmod(0o755)
    return folder


def run(clone: Path, line: str) -> str:
    path = f"{clone / 'tools'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        shlex.split(shortened(line)),
        cwd=clone,
        env=os.environ
        | {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        | {"PET_STANDALONE": "1"},  # torchrun takes a free port, not 29500
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (line, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def saved(run_folder: Path) -> str:
    return (run_folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()


@pytest.mark.exhaustive
def test_each_section_does_what_it_says(clone: Path) -> None:
    demo, stopped = clone / "runs" / "demo", clone / "runs" / "stopped"
    [data] = section(1)
    run(clone, data)
    assert (demo / "data" / "stdlib.bin").exists()

    first, slow, alone = section(2)
    run(clone, first)
    assert saved(demo) == "8"
    run(clone, first)  # finished: it only evaluates
    assert list(logged_scalars(demo / "tensorboard")["lm loss"]) == list(range(1, 9))
    run(clone, slow)
    assert saved(clone / "runs" / "slow") == "20"
    run(clone, alone)

    stop, resume, curve = section(3)
    assert "exiting program at iteration 5" in run(clone, stop)
    assert saved(stopped) == "5"
    said = run(clone, resume)
    where = "successfully loaded checkpoint from runs/stopped/checkpoints"
    assert re.search(rf"{where} .* at iteration 5$", said, flags=re.M)
    assert re.findall(r"iteration +(\d+)/ +8 ", said) == ["6", "7", "8"]
    assert saved(stopped) == "8"
    losses = [logged_scalars(one / "tensorboard")["lm loss"] for one in (demo, stopped)]
    assert losses[0] == losses[1]
    run(clone, curve)
    assert (clone / "loss.png").read_bytes().startswith(b"\x89PNG")
