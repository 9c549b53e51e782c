"""launch/slurm.sbatch: a job lives through failure, time limit and restart.

SLURM is played by `tests.helpers.slurm`. Most cases put a shell script in the place of Python, so
that they take no time; one trains tiny-moe for real, is stopped at its time limit, is queued again
and ends with the losses of a run without a stop.
"""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pretrain_runs import small_dataset
from tests.helpers.run_results import logged_scalars
from tests.helpers.slurm import (
    JOB_ID,
    ROOT,
    Job,
    Slurm,
    sbatch_options,
    signal_before_time_limit,
    train_sh,
    wait_for,
)

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(str(p) for p in (*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"))
STEPS = 16
TRAIN = [
    *("--split", "80,10,10", "--micro-batch-size", "1", "--global-batch-size", "4"),
    *("--train-iters", str(STEPS)),
    *("--lr", "1e-3", "--lr-decay-style", "cosine", "--lr-warmup-iters", "5"),
    *("--log-interval", "1", "--eval-interval", "1000", "--eval-iters", "1", "--num-workers", "1"),
]


PYTHON = f"""\
#!{sys.executable}
import os, signal, sys, time
from pathlib import Path

rank, saved = os.environ.get("RANK"), Path(os.environ["SAVE"], "latest_checkpointed_iteration.txt")
start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

def save(iteration):
    saved.write_text(str(iteration))

def on_sigterm(action):
    signal.signal(signal.SIGTERM, lambda *_: action())

here = Path(__file__).parent
is_doctor = sys.argv[2] == "qwen35_mcore.cli"
exec((here / ("preflight.txt" if is_doctor else "training.txt")).read_text())
"""
SAVES_AT_SIGTERM = """
left = saved.parent / "left"  # as in Megatron, one rank's signal ends all of them
on_sigterm(lambda: (save(10), left.touch()))
print("training", flush=True)
while start == 0 and not left.exists():
    time.sleep(0.05)
"""


class Played:
    """A job whose doctor and training are a few lines of Python."""

    def __init__(self, slurm: Slurm, preset: Path, save: Path) -> None:
        self.slurm, self.save = slurm, save
        self.folder = slurm.folder / "played"
        self.folder.mkdir()
        python = self.folder / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.env = {
            "PRESET": str(preset),
            "DATA": "mock",
            "SAVE": str(save),
            "PYTHON": str(python),
        }

    def run(self, training: str, *flags: str, preflight: str = "", **options: Any) -> Job:
        (self.folder / "preflight.txt").write_text(preflight)
        (self.folder / "training.txt").write_text(training)
        env = self.env | options.pop("env", {})
        return self.slurm.sbatch(*flags, env=env, **options)

    def log(self, name: str, start: int = 0) -> Path:
        return self.save / "logs" / f"{JOB_ID}.{start}" / name

    def stop_when_training(self, start: int, job: subprocess.Popen[str]) -> None:
        if start == 0:
            wait_for(self.log("rank-00000.txt"), "training", job)
            signal_before_time_limit(job)


@pytest.fixture
def played(slurm: Slurm, preset: Path, tmp_path: Path) -> Played:
    return Played(slurm, preset, tmp_path / "run")


def test_the_script_asks_slurm_for_what_it_relies_on() -> None:
    options = sbatch_options()
    assert options.keys() >= {"requeue", "signal", "open-mode", "exclusive"}
    assert not options.keys() & {"nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "gres"}
    assert options["open-mode"] == "append"


def test_every_rank_knows_its_place_and_writes_its_own_log(played: Played) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR NCCL_NVLS_ENABLE"
    early = "signal.getsignal(signal.SIGTERM).name"  # nothing an early one could end
    show = f"print(*(os.environ[n] for n in '{names}'.split()), {early}, sys.argv[1:], sep=';')"
    job = played.run(show, played.env.pop("PRESET"), "--lr", "1 e-4", nodes=2)
    assert (job.status, job.starts) == (0, 1), job.output
    for rank in range(4):
        *place, flags = played.log(f"rank-{rank:05}.txt").read_text().strip().split(";")
        assert place == [str(rank), str(rank % 2), "4", "2", "127.0.0.1", "0", "SIG_IGN"]
        words = ast.literal_eval(flags)
        assert words[:2] == ["-m", "qwen35_mcore.training.pretrain"]
        assert words[-2:] == ["--lr", "1 e-4"]
        for flag, value in (("--load", str(played.save)), ("--flavor", "tiny-moe")):
            assert words[words.index(flag) + 1] == value
        assert {"--exit-signal-handler", "--mock-data"} < set(words)
    assert "training is finished" in job.output
    assert {path.name for path in played.log("").iterdir()} >= {
        *("preflight-node0.txt", "preflight-node1.txt"),
    }


def test_gpus_on_the_node_give_the_number_of_ranks(played: Played) -> None:
    job = played.run("", env={"SLURM_GPUS_ON_NODE": "1", "PREFLIGHT": "skip"})
    assert (job.status, job.starts) == (0, 1), job.output
    assert [path.name for path in played.log("").iterdir()] == ["rank-00000.txt"]


def test_a_job_may_be_submitted_from_anywhere(played: Played, tmp_path: Path) -> None:
    """Paths are relative to that folder; the script knows from SLURM where its own are."""
    script = "print(os.getcwd(), sys.argv[1])"
    (tmp_path / "mine.py").touch()
    env = {"PREFLIGHT": "skip", "SAVE": "here", "DATA": "mock", "SCRIPT": "mine.py"}
    job = played.run(script, env=env, cwd=tmp_path)
    assert (job.status, job.starts) == (0, 1), job.output
    log = tmp_path / "here" / "logs" / f"{JOB_ID}.0" / "rank-00000.txt"
    assert log.read_text().split() == [str(tmp_path), "mine.py"]


def test_a_job_that_cannot_be_sized_or_written_is_one_error(played: Played) -> None:
    (played.folder / "file").write_text("")
    for env, message, fix in (
        ({"SLURM_CPUS_ON_NODE": "1"}, "a node has fewer CPUs than ranks", "--mincpus=2"),
        ({"MAX_FAILURES": "x"}, "MAX_FAILURES is no number of starts", "leave it out"),
        ({"LOGS": str(played.folder / "file")}, "the folder of the logs cannot be made", "LOGS"),
        ({"REPO": "/nowhere"}, "REPO is not the repository", "set REPO"),
    ):
        job = played.run("", env=env)
        assert (job.status, job.starts) == (2, 1), job.output
        assert f"error: {message}" in job.output
        assert fix in job.output.partition("fix: ")[2]


def test_a_preflight_that_does_not_start_is_shown(played: Played) -> None:
    job = played.run("", preflight="sys.exit('No module named qwen35_mcore')")
    assert job.status == 1
    assert "No module named qwen35_mcore" in job.output


def test_a_job_without_sizes_is_one_error(played: Played) -> None:
    job = played.run("", env={"SLURM_NTASKS_PER_NODE": ""})
    assert (job.status, job.starts) == (2, 1)
    assert job.output.startswith("error: the job has neither GPUs nor tasks")


def test_a_failing_preflight_stops_the_job_with_the_nodes_word(played: Played) -> None:
    doctor = """
if os.environ["SLURMD_NODENAME"] == "node1":
    print("error: torch is built without CUDA")
    sys.exit(1)
"""
    job = played.run("save(1)", preflight=doctor, nodes=2)
    assert (job.status, job.starts) == (1, 1)
    assert job.output.count("error: ") == 2  # the job's, and in it the node's
    assert "error: the preflight failed" in job.output
    assert "node1.txt:error: torch is built without CUDA" in job.output
    assert "node0.txt:" not in job.output
    assert not played.log("rank-00000.txt").exists()


def test_the_preflight_is_the_doctor(played: Played) -> None:
    doctor = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    job = played.run("", preflight=doctor, env={"PREFLIGHT": "--no-gradient-check --json"})
    assert (job.status, job.starts) == (0, 1), job.output
    report = json.loads(played.log("preflight-node0.txt").read_text())
    assert report["ok"]
    assert report["paths"]


def test_containers_wrap_every_process_or_are_sruns_own(played: Played) -> None:
    job = played.run(
        "print(os.environ['INSIDE'])",
        env={"CONTAINER": "env INSIDE=yes", "SRUN_FLAGS": "--mpi=1"},
    )
    assert (job.status, job.starts) == (0, 1), job.output
    assert played.log("rank-00001.txt").read_text() == "yes\n"


def test_a_job_that_fails_at_once_is_not_queued_for_ever(played: Played) -> None:
    job = played.run("sys.exit(1)", env={"MAX_FAILURES": "3", "PREFLIGHT": "skip"})
    assert (job.status, job.starts) == (1, 3)
    assert job.output.count("queued again\n") == 3
    assert job.output.count("error: ") == 1


def test_a_crash_after_a_checkpoint_is_queued_again_and_forgets_earlier_ones(
    played: Played,
) -> None:
    training = "save(start // 2); sys.exit(1 if start < 6 else 0)"  # new in every second start
    job = played.run(training, env={"MAX_FAILURES": "2", "PREFLIGHT": "skip"})
    assert (job.status, job.starts) == (0, 7), job.output


def test_one_dead_rank_ends_the_others(played: Played) -> None:
    training = "time.sleep(3600 if rank == '0' else 0); sys.exit(7)"
    job = played.run(training, env={"MAX_FAILURES": "1", "PREFLIGHT": "skip"})
    assert (job.status, job.starts) == (1, 1)


def test_wrong_flags_are_not_tried_twice(played: Played) -> None:
    training = "print('error: --lr is missing\\n  fix: pass it') if rank == '0' else 0; sys.exit(2)"
    job = played.run(training, env={"PREFLIGHT": "skip"})
    assert (job.status, job.starts) == (2, 1)
    assert "error: training refused its flags or data" in job.output
    assert "error: --lr is missing\n  fix: pass it" in job.output


def test_before_the_time_limit_it_saves_and_is_queued_again(played: Played) -> None:
    job = played.run(SAVES_AT_SIGTERM, at_start=played.stop_when_training)
    assert (job.status, job.starts) == (0, 2), job.output
    assert "the time limit is near" in job.output
    assert "status 0 at iteration 10: queued again" in job.output
    assert "training is finished at iteration 10" in job.output


def test_a_save_that_does_not_end_is_given_up_in_time(played: Played) -> None:
    hangs = "print('training', flush=True); save(5); time.sleep(3600 if start == 0 else 0)"
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 62), "PREFLIGHT": "skip"}
    job = played.run(hangs, at_start=played.stop_when_training, env=end)
    assert (job.status, job.starts) == (0, 2), job.output
    assert "the save did not end in time" in job.output


def test_a_time_limit_that_leaves_no_checkpoint_counts_as_a_failure(played: Played) -> None:
    training = SAVES_AT_SIGTERM.replace("save(10)", "0")
    env = {"MAX_FAILURES": "1", "PREFLIGHT": "skip"}
    job = played.run(training, at_start=played.stop_when_training, env=env)
    assert (job.status, job.starts) == (1, 1)
    assert "left no new checkpoint" in job.output


def test_a_sigterm_to_every_process_lets_the_ranks_save(played: Played) -> None:
    """As before a preemption: the shell around a rank has to outlive it."""

    def preempt(start: int, job: subprocess.Popen[str]) -> None:
        for rank in (0, 1):
            wait_for(played.log(f"rank-0000{rank}.txt"), "training", job)
        played.slurm.signal_tasks(signal.SIGTERM)

    slow = SAVES_AT_SIGTERM.replace("save(", "time.sleep(0.5), save(")
    job = played.run(slow, at_start=preempt, env={"PREFLIGHT": "skip"})
    assert (job.status, job.starts) == (0, 1), job.output
    assert "training is finished at iteration 10" in job.output


@pytest.mark.exhaustive
def test_a_job_stopped_at_its_time_limit_ends_with_the_losses_of_one_that_was_not(
    tmp_path: Path, preset: Path, slurm: Slurm
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    local = train_sh(preset, *TRAIN, DATA=small_dataset(), SAVE=str(straight), NPROC="2")
    assert local.returncode == 0, local.stderr

    log = stopped / "logs" / f"{JOB_ID}.0" / "rank-00001.txt"  # the last rank logs the losses

    def stop(start: int, job: subprocess.Popen[str]) -> None:
        if start == 0:
            wait_for(log, f"iteration        2/{STEPS:8}", job)
            signal_before_time_limit(job)

    env = {"PRESET": str(preset), "DATA": small_dataset(), "SAVE": str(stopped)}
    env["PREFLIGHT"] = "skip"
    job = slurm.sbatch(*TRAIN, nodes=2, per_node=1, env=env, at_start=stop)
    assert (job.status, job.starts) == (0, 2), job.output
    saved = int(job.output.partition("status 0 at iteration ")[2].partition(":")[0])
    assert 2 <= saved < STEPS
    resumed = (stopped / "logs" / f"{JOB_ID}.1" / "rank-00000.txt").read_text()
    assert f"at iteration {saved}" in resumed
    assert f"training is finished at iteration {STEPS}" in job.output

    expected, found = (logged_scalars(run / "tensorboard") for run in (straight, stopped))
    assert set(found["lm loss"]) == set(range(1, STEPS + 1))
    for name in ("lm loss", "mtp_1 loss", "grad-norm"):
        assert found[name] == expected[name], name
