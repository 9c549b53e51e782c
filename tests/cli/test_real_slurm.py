"""launch/slurm.sbatch on a real SLURM: one slurmctld, two nodes on this machine, CPUs.

What the stand-ins of `test_slurm` play, played by SLURM itself. Where SLURM is not installed this
is skipped with the packages to install; `.ci/run` installs them.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers import real_slurm
from tests.helpers.pretrain_runs import small_dataset
from tests.helpers.real_slurm import RealSlurm
from tests.helpers.slurm import ROOT

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(real_slurm.why_not() is not None, reason=str(real_slurm.why_not())),
]
SCRIPT = str(ROOT / "launch" / "slurm.sbatch")
SIZES = ("--nodes=2", "--ntasks-per-node=1", "--output=job.out")
STEPS = 120
TRAIN = [
    *("--split", "80,10,10", "--micro-batch-size", "1", "--global-batch-size", "4"),
    *("--train-iters", str(STEPS), "--lr", "1e-3", "--log-interval", "1"),
    *("--eval-interval", "1000", "--eval-iters", "1", "--num-workers", "1"),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[RealSlurm]:
    with real_slurm.cluster() as running:
        yield running


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {
        "DATA": small_dataset(),
        "SAVE": "run",  # where it was submitted
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def wait_for(slurm: RealSlurm, job: str, log: Path, pattern: str, timeout: float = 600) -> str:
    """Until a log has a line like this; the first match."""
    deadline = time.monotonic() + timeout
    while not (log.exists() and (found := re.search(pattern, log.read_text(errors="replace")))):
        state = slurm.job(job)["JobState"]
        said = (log.parents[2].parent / "job.out").read_text() if log.parents[2].exists() else ""
        assert state in ("PENDING", "RUNNING", "CONFIGURING"), (slurm.job(job), said, slurm.logs())
        assert time.monotonic() < deadline, (pattern, said, slurm.logs())
        time.sleep(0.2)
    return found[0]


def ranks_of(job: str) -> dict[str, psutil.Process]:
    """The training processes of a job by rank, without the workers that they started."""
    found = {}
    for process in psutil.process_iter():
        try:
            if "rank.sh" not in str(process.parent().cmdline()):
                continue
            words, env = process.cmdline(), process.environ()
            if words[0] == sys.executable and env.get("SLURM_JOB_ID") == job:
                found[env["RANK"]] = process
        except (psutil.Error, AttributeError):  # gone meanwhile, or without a parent
            continue
    return found


def wait_until_dead(process: psutil.Process, timeout: float = 600) -> None:
    """Gone, or a zombie of its node."""
    deadline = time.monotonic() + timeout
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, process
            time.sleep(0.2)


@pytest.mark.timeout(2400)
def test_a_job_lives_through_its_time_limit_and_a_killed_rank(
    slurm: RealSlurm, env: dict[str, str], preset: Path, tmp_path: Path
) -> None:
    job = slurm.sbatch(*SIZES, SCRIPT, str(preset), *TRAIN, cwd=tmp_path, env=env)
    logs, output = tmp_path / "run" / "logs", tmp_path / "job.out"

    def log(start: int, rank: int = 1) -> Path:
        return logs / f"{job}.{start}" / f"rank-{rank:05}.txt"

    # preflight on both nodes, then training; the signal that comes before the time limit
    wait_for(slurm, job, log(0), rf" iteration +3/ +{STEPS} ")
    [preflight] = (logs / f"{job}.0").glob("preflight-*.txt")  # this machine is both nodes
    assert "this machine is ready to train" in preflight.read_text()
    slurm.command("scancel", "--signal=USR1", "--batch", job)
    slurm.wait(job, "PENDING")
    said = output.read_text()
    assert "the time limit is near: training saves and leaves" in said
    saved = int(re.findall(r"status 0 at iteration (\d+): queued again", said)[0])
    assert 3 <= saved < STEPS

    # SLURM starts it two minutes later, and it continues there; a rank that dies ends the others,
    # and the job is queued again
    wait_for(slurm, job, log(1), rf" iteration +{saved + 1}/ +{STEPS} ")
    assert f"at iteration {saved}" in log(1, rank=0).read_text()
    ranks = ranks_of(job)
    assert sorted(ranks) == ["0", "1"]
    ranks["1"].send_signal(signal.SIGKILL)
    slurm.wait(job, "PENDING")
    assert re.search(rf"status [1-9]\d* at iteration {saved}: queued again", output.read_text())
    wait_until_dead(ranks["0"])

    # and ends where it should
    found = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", timeout=1200)
    assert found["JobState"] == "COMPLETED", output.read_text()
    assert found["Restarts"] == "2"
    assert f"at iteration {saved}" in log(2, rank=0).read_text()
    assert f"training is finished at iteration {STEPS}" in output.read_text()


def test_a_wrong_flag_is_not_queued_again(
    slurm: RealSlurm, env: dict[str, str], preset: Path, tmp_path: Path
) -> None:
    flags = (*TRAIN, "--no-such-flag")
    env |= {"PREFLIGHT": "skip"}
    job = slurm.sbatch(*SIZES, SCRIPT, str(preset), *flags, cwd=tmp_path, env=env)
    found = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", "PENDING REQUEUED")
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0")
    said = (tmp_path / "job.out").read_text()
    assert "error: training refused its flags or data" in said
    assert "--no-such-flag" in said


def test_a_preset_of_another_size_is_refused_at_once(
    slurm: RealSlurm, env: dict[str, str], tmp_path: Path
) -> None:
    preset = str(ROOT / "launch" / "presets" / "35b-a3b-16xh100")
    job = slurm.sbatch(*SIZES, SCRIPT, preset, cwd=tmp_path, env=env)
    found = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0")
    said = (tmp_path / "job.out").read_text()
    assert said.startswith("error: the preset is planned for another number of GPUs"), said
    assert "sbatch --nodes=2 --gpus-per-node=8" in said
