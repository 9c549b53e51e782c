"""The benchmark for the GPUs of one host in its reduced form on a CPU: tiny models, same code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen35_mcore.planner.hardware import get_gpu
from tests.bench.multi_gpu import parallel, parallel_cases, resume, train
from tests.bench.multi_gpu.launch import Job
from tests.bench.multi_gpu.machine import Machine
from tests.bench.multi_gpu.results import FAILED, NOT_RUN, OK, SKIPPED, Results
from tests.helpers import training
from tests.helpers.distributed import CaseError, WorkerPool
from tests.helpers.equivalence import Case, Run, run_case, serial_run

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive
def test_train_resume_and_plan(tmp_path: Path) -> None:
    """The real command: each result on disk, a rank really killed, the plan fed by the run."""
    file, folder = tmp_path / "results.jsonl", tmp_path / "runs"
    command = [sys.executable, "-m", "tests.bench.bench_multi_gpu", "--cpu", "--processes", "2"]
    only = ["--only", "train/pp1-ep2/natural/*", "resume", "plan"]
    done = subprocess.run(
        [*command, *only, "--json", str(file), "--folder", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    rows = {row["part"] + "/" + row["name"]: row for row in map(json.loads, file.open())}
    assert done.returncode == 0, done.stdout
    trained = rows["train/pp1-ep2/natural/fp32"]
    assert trained["status"] == OK
    assert trained["steps"] == 8
    assert trained["losses"][-1] < trained["losses"][0] - 1
    assert 0.2 < trained["peak_gib"] < 5  # of the process here
    assert rows["train/pp1-ep2/natural/fp32/graphs"]["status"] == SKIPPED
    planned = rows["plan/pp1-ep2/natural/fp32"]
    assert planned["measured_ms"] == trained["step_ms"]
    assert planned["error_ms"] == pytest.approx(planned["predicted_ms"] / trained["step_ms"] - 1)

    [resumed] = [row for row in rows.values() if row["part"] == "resume"]
    assert resumed["status"] == OK
    assert set(resumed["resumed"]) == {str(step) for step in range(6, 15)}
    assert {"6", "7", "8"} <= set(resumed["straight"])
    assert "exitcode: -9" in (folder / "resume-killed" / "log.txt").read_text()
    for name, row in rows.items():
        assert row["text"] in done.stdout, name


def machine(folder: Path, seconds: float = 800) -> Machine:
    return Machine(
        ranks=2,
        gpus=0,
        card="CPU",
        gpu=get_gpu("h100"),
        folder=folder,
        deadline=time.monotonic() + seconds,
    )


def test_without_time_nothing_starts_and_everything_is_named(tmp_path: Path) -> None:
    late, results = machine(tmp_path / "runs", seconds=-1), Results(None, {})
    comparisons = parallel.names(2, on_gpus=False)
    parallel.run(late, results, comparisons)
    variants = list(train.variants(2, on_gpus=False))
    train.run(late, results, variants)
    resume.run(late, results)
    assert [row["name"] for row in results.of("parallel")] == comparisons
    assert len(results.rows) == len(comparisons) + len(variants) + 1
    assert {row["status"] for row in results.rows} == {NOT_RUN, SKIPPED}
    assert results.exit_status() == 1
    assert not list((tmp_path / "runs").iterdir())


def test_a_run_that_hangs_fails_and_leaves_the_others_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "START_S", 1.0)  # no run ends that soon
    results = Results(None, {})
    train.run(machine(tmp_path), results, [next(train.variants(2, on_gpus=False))])
    [row] = results.rows
    assert row["status"] == FAILED
    assert re.match(r"no end within \d s, after step 0", row["text"])


def test_ranks_that_are_ended_show_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")  # as the command sets it
    job = Job(machine(tmp_path), "late", [])
    while not any(handles_aborts(rank) for rank in job._ranks()):
        assert job._process.poll() is None
        time.sleep(0.1)
    assert job.wait(time.monotonic()) is None
    assert "Fatal Python error: Aborted" in job.output()


def handles_aborts(process: psutil.Process) -> bool:
    """Whether a process has come to where Python's faulthandler is on."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.findall(r"SigCgt:\t(\w+)", status)[0], 16)
    return bool(caught >> (signal.SIGABRT - 1) & 1)


def test_parallel_runs_equal_one_process_and_a_wrong_gradient_does_not(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "timeout_s", pool.timeout_s)  # restored at the end
    here, results = machine(tmp_path), Results(None, {})
    chosen = ["EP2, fp32 local", f"{parallel.CONTROL}, fp32 local"]
    parallel.run_in(pool, here, results, chosen)
    right, control = results.rows
    assert right["status"] == control["status"] == OK
    assert control["gradient"] > 100 * parallel_cases.LOCAL_ON_CPU.tolerance.gradient
    assert "gradient of" in control["text"]

    def wrongly(pool: WorkerPool, case: Case, *_: Any) -> Run:
        return run_case(pool, case, partial(parallel.train_wrongly, factor=1.01))

    monkeypatch.setattr(parallel, "run_case", wrongly)
    parallel.run_in(pool, here, results, ["EP2, fp32 local"])
    assert results.rows[-1]["status"] == FAILED
    assert "gradient of" in results.rows[-1]["text"]


def test_an_attention_backend_of_before_does_not_stop_the_next_run(pool: WorkerPool) -> None:
    """Megatron writes its choice into the environment and refuses another in the same process;
    weights are initialised on the local backend between runs on others."""
    case = next(parallel_cases.cases(1, parallel_cases.LOCAL_ON_CPU))
    assert run_case(pool, replace(case, steps=1), train_after_cudnn).gradients


def train_after_cudnn(**case: Any) -> training.Result:
    os.environ["NVTE_FLASH_ATTN"] = "0"  # as AttnBackend.fused leaves it
    return training.train(**case)


def test_the_check_of_the_checks_can_fail_too(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing wrong, nobody notices anything."""
    monkeypatch.setattr(pool, "timeout_s", pool.timeout_s)
    monkeypatch.setattr(parallel, "run_case", lambda pool, case, *_: serial_run(pool, case))
    results = Results(None, {})
    parallel.run_in(pool, machine(tmp_path), results, [f"{parallel.CONTROL}, fp32 local"])
    assert [row["status"] for row in results.rows] == [FAILED]
    assert "nobody noticed" in results.rows[0]["text"]


def test_a_rank_that_breaks_fails_its_own_comparison_alone(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pool: WorkerPool, case: Case, *_: Any) -> Run:
        raise CaseError("rank 0 of 2:\nTraceback\nRuntimeError: out of order\n")

    monkeypatch.setattr(pool, "timeout_s", pool.timeout_s)
    monkeypatch.setattr(parallel, "run_case", broken)
    results = Results(None, {})
    monkeypatch.setattr(parallel, "_control", lambda *_: (OK, "noticed", {}))
    chosen = ["EP2, fp32 local", f"{parallel.CONTROL}, fp32 local"]
    parallel.run_in(pool, machine(tmp_path), results, chosen)
    assert [row["status"] for row in results.rows] == [FAILED, OK]
    assert results.rows[0]["text"] == "RuntimeError: out of order"
