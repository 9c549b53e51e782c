"""The pool of processes that the comparisons run in: a rank that raises, dies or hangs fails its
own case with its own words, in time, and the next case runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import CaseError, WorkerPool, take_first_configurations


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    pool = WorkerPool(2, log=tmp_path_factory.mktemp("pool") / "log.txt")
    yield pool
    pool.close()


def hang() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as LLVM does where Triton has compiled
    time.sleep(600)


def total(last: str = "") -> float:
    """The sum of the ranks, unless rank 0 does something else."""
    if torch.distributed.get_rank() == 0 and last == "raise":
        raise ValueError("rank 0 has its own words")
    if torch.distributed.get_rank() == 0 and last == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if torch.distributed.get_rank() == 0 and last == "hang":
        hang()
    ranks = torch.tensor(float(torch.distributed.get_rank()))
    torch.distributed.all_reduce(ranks)
    return float(ranks)


@pytest.mark.parametrize(
    ("last", "words"),
    [("raise", "rank 0 has its own words"), ("die", "the process died|Connection")],
)
def test_a_rank_that_fails_is_heard_while_others_wait_for_it(
    two: WorkerPool, last: str, words: str
) -> None:
    with pytest.raises(CaseError, match=words):
        two.run(total, 2, last=last)
    assert two.run(total, 2) == [1.0, 1.0]


def test_a_worker_that_died_between_cases_is_replaced(two: WorkerPool) -> None:
    assert two.run(total, 1) == [0.0]
    process = two._workers[0][0]
    process.kill()
    process.join()
    assert two.run(total, 2) == [1.0, 1.0]


def test_a_case_that_hangs_ends_at_the_deadline_and_shows_where_it_was(two: WorkerPool) -> None:
    assert two.run(total, 2) == [1.0, 1.0]
    for seconds in (2, 20, 200):  # until there is time for both ranks to come to where they wait
        stacks = stacks_at_deadline(two, seconds)
        # faulthandler's words for where rank 0 slept and rank 1 waited
        if "in hang" in stacks and "in total" in stacks:
            break
    else:
        pytest.fail(stacks)
    assert two.run(total, 2) == [1.0, 1.0]


def stacks_at_deadline(pool: WorkerPool, seconds: float) -> str:
    """What is printed when a case hangs for so long."""
    assert isinstance(pool.log, Path)
    printed_before = pool.log.stat().st_size
    pool.deadline = time.monotonic() + seconds
    try:
        with pytest.raises(CaseError, match="gave no answer"):
            pool.run(total, 2, last="hang")
    finally:
        pool.deadline = float("inf")
    return pool.log.read_bytes()[printed_before:].decode()


def test_a_gpu_worker_tunes_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    monkeypatch.setattr(autotuner.Autotuner, "run", autotuner.Autotuner.run)  # put back afterwards
    take_first_configurations()
    kernel = Kernel()
    blocks = [autotuner.Config({"BLOCK": size}) for size in (16, 32, 64)]
    tuned = autotuner.Autotuner(kernel, ["x"], blocks, ["x"], None, None)
    tuned.run(x=1, grid=(1,))
    tuned.run(x=2, grid=(1,))  # another key, for which the tuner would measure again
    assert kernel.launched == [16, 16]


class Kernel:
    """What Triton's autotuner launches."""

    def __init__(self) -> None:
        self.fn = lambda x: None
        self.launched: list[int] = []

    def run(self, **arguments: Any) -> None:
        self.launched.append(arguments["BLOCK"])
