"""launch/: a plan starts by its run.sh, on as many GPUs as it is planned for."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35_mcore.config.flavors import get_flavor, vision_flavor
from qwen35_mcore.planner.calibration.rows import default_calibration
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.emit import emit
from qwen35_mcore.planner.hardware import get_gpu
from qwen35_mcore.planner.prediction import predict
from tests.helpers.ckpt_cli import ok, qwen35
from tests.helpers.slurm import ROOT, Slurm, train_sh

LAUNCH = ROOT / "launch"


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan of two GPUs, in a folder whose name has a space."""
    return emitted(tmp_path / "a plan", gpus=2)


def emitted(folder: Path, *, gpus: int, per_node: int = 8) -> Path:
    gpu = get_gpu("h100-80g").in_nodes_of(per_node)
    job = Job(
        model_config=get_flavor("tiny-moe"),
        gpu=gpu,
        gpus=gpus,
        seq_length=64,
        global_batch_size=2 * gpus,
        calibration=default_calibration("h100-80g"),
        model_name="tiny-moe",
        model_flags=("--flavor", "tiny-moe"),
    )
    emit(predict(job, Candidate()), folder)
    return folder


def run_sh(
    script: Path, *words: str, cwd: Path, sbatch: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a plan's run.sh; sbatch prints REPO and the words that it gets, and Python its own."""
    tools = cwd / "tools"
    tools.mkdir(exist_ok=True)
    if sbatch:
        (tools / "sbatch").write_text('#!/bin/sh\necho "$REPO"; for word; do echo "$word"; done\n')
        (tools / "sbatch").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [script, *words],
        cwd=cwd,
        env=os.environ
        | {"PATH": path, "PYTHON": "echo", "DATA": "mock", "SAVE": "run"}
        | {"CUDA_VISIBLE_DEVICES": ""}
        | env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("preset", sorted((LAUNCH / "presets").iterdir()), ids=lambda p: p.name)
def test_run_sh_submits_from_anywhere_with_options_for_sbatch(preset: Path, tmp_path: Path) -> None:
    link = tmp_path / "go"
    link.symlink_to(preset / "run.sh")
    options, flags = ["--time=1:00:00", "--comment=two words"], ["--lr", "1 e-4"]
    done = run_sh(link, *options, "--", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    repo, nodes, each, *words = done.stdout.splitlines()
    assert repo == str(ROOT)
    sizes = [int(word.partition("=")[2]) for word in (nodes, each)]
    assert sizes[0] * sizes[1] == json.loads((preset / "plan.json").read_text())["gpus"]
    assert words == [*options, str(LAUNCH / "slurm.sbatch"), str(preset), *flags]
    without = run_sh(link, *flags, cwd=tmp_path).stdout.splitlines()
    assert without[3:] == [str(LAUNCH / "slurm.sbatch"), str(preset), *flags]


def test_run_sh_of_one_node_trains_here_or_is_submitted(plan: Path, tmp_path: Path) -> None:
    here = run_sh(plan / "run.sh", "--lr", "1", cwd=tmp_path)
    trained = "--nproc-per-node 2 -m qwen35_mcore.training.pretrain --flavor tiny-moe"
    assert trained in here.stdout
    assert here.stdout.endswith("--lr 1\n")
    submitted = run_sh(plan / "run.sh", "--time=5", "--", "--lr", "1", cwd=tmp_path)
    assert submitted.stdout.splitlines()[1:4] == ["--nodes=1", "--gpus-per-node=2", "--time=5"]


def test_run_sh_that_was_moved_asks_for_the_repository(tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(LAUNCH / "presets" / "35b-a3b-16xh100", moved)
    for env in ({}, {"REPO": "/nowhere"}):
        done = run_sh(moved / "run.sh", cwd=tmp_path, **env)
        assert done.returncode == 2
        assert done.stderr.startswith("error: the repository of qwen35_mcore is not there")
        assert "fix: set REPO" in done.stderr
    assert run_sh(moved / "run.sh", cwd=tmp_path, REPO=str(ROOT)).returncode == 0


def test_a_preset_for_another_number_of_gpus_is_refused(
    plan: Path, tmp_path: Path, slurm: Slurm
) -> None:
    """And what the error advises is accepted."""
    env = {"DATA": "mock", "SAVE": "run", "PYTHON": "echo", "cwd": tmp_path}
    wrong = train_sh(plan, **env, NPROC="4")
    visible = train_sh(plan, **env, CUDA_VISIBLE_DEVICES="0,1,2")
    for done, number in ((wrong, 4), (visible, 3)):
        assert done.returncode == 2
        assert done.stderr.startswith("error: the preset is planned for another number of GPUs")
        assert f"got: {plan} for 2 GPUs, and a run of {number}" in done.stderr
        assert "fix: set NPROC=2; or plan for" in done.stderr
        assert done.stderr.count("error: ") == 1
    assert train_sh(plan, **env, NPROC="2").returncode == 0
    assert train_sh(plan, **env, NPROC="2", CUDA_VISIBLE_DEVICES="0,1,2").returncode == 0
    advised = wrong.stderr.partition("qwen35 plan ")[2].replace("\\\n", " ").replace("DIR", "new")
    again = subprocess.run(
        [sys.executable, "-m", "qwen35_mcore.cli", "plan", *shlex.split(advised)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr
    assert train_sh("new", **env, NPROC="4").returncode == 0

    job = slurm.sbatch(env={"PRESET": str(plan), "DATA": "mock", "SAVE": "run"}, nodes=2)
    assert (job.status, job.starts) == (2, 1)
    assert job.output.startswith("error: the preset is planned for another number of GPUs")
    assert "sbatch --nodes=1 --gpus-per-node=2" in job.output


def test_what_is_advised_of_a_plan_with_a_tower_has_it_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(vision_flavor("0.8b").to_hf()))
    model = ("--hf-config", tmp_path, "--gpus", "2", "--global-batch-size", "4")
    images = ("--vision", "--image-patches", "256", "--images", "2")
    frozen = ("--freeze", "vision", "--freeze", "language")
    ok(qwen35("plan", *model, *images, *frozen, "--tp", "1", "--emit", tmp_path / "plan"))
    wrong = train_sh(tmp_path / "plan", DATA="mock", SAVE="run", NPROC="4", PYTHON="echo")
    advised = wrong.stderr.partition("qwen35 plan ")[2].replace("\\\n", " ")
    ok(qwen35("plan", *shlex.split(advised.replace("DIR", str(tmp_path / "new")))))
    first, again = (
        [
            line
            for line in (tmp_path / name / "layout.args").read_text().splitlines()
            if "hf" in line
        ]
        for name in ("plan", "new")
    )
    assert first == again == [f"--hf-config {tmp_path} --vision --freeze language vision"]


def test_a_plan_of_several_nodes_is_for_slurm(tmp_path: Path) -> None:
    plan = emitted(tmp_path / "plan", gpus=4, per_node=2)
    done = train_sh(plan, DATA="mock", SAVE="run", NPROC="2", cwd=tmp_path)
    assert done.returncode == 2
    assert f"fix: submit it to SLURM: {plan}/run.sh" in done.stderr
