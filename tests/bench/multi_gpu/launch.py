"""Start the training script under torchrun, and read what it logs."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.multi_gpu.machine import Machine

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "pretrain_qwen35.py"
LINE = re.compile(
    r"iteration +(\d+)/ *\d+ \|.*?elapsed time per iteration \(ms\): ([\d.]+) \|"
    r"(?:.*?throughput per GPU \(TFLOP/s/GPU\): ([\d.]+) \|)?.*? lm loss: (\S+) \|"
)
LOADED = re.compile(r"successfully loaded checkpoint .* at iteration (\d+)")
CAUSE = re.compile(r"(?:\[rank\d+\]: ?)?((?:[\w.]+(?:Error|Exception)|error): .+)")


@dataclass(frozen=True)
class Step:
    """One of megatron's log lines."""

    iteration: int
    ms: float
    tflops: float | None
    loss: float


def read_steps(log: str) -> list[Step]:
    """Every iteration that was logged, with ``--log-interval 1``."""
    return [
        Step(int(iteration), float(ms), float(tflops) if tflops else None, float(loss))
        for iteration, ms, tflops, loss in LINE.findall(log)
    ]


def loaded_iteration(log: str) -> int | None:
    """Where a run said that it continued."""
    found = LOADED.search(log)
    return int(found[1]) if found else None


def cause_of_failure(log: str) -> str:
    """The first line that names an error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = (match[1] for line in lines if (match := CAUSE.match(line)))
    return next(named, lines[-1] if lines else "it printed nothing")


class Job:
    """A torchrun with all ranks of the machine; its output goes to a file.

    Args:
        script: what trains; the one of the examples, unless another one is named.
        profile: number of a step to profile on rank 0, see `rank`; None: none.
    """

    def __init__(
        self,
        machine: Machine,
        name: str,
        flags: list[str],
        *,
        script: Path = EXAMPLE,
        profile: int | None = None,
    ) -> None:
        self.machine = machine
        self.folder = machine.folder / re.sub(r"[^\w.-]+", "_", name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--local-addr", "127.0.0.1"]  # the host's name need not resolve
        ranks = ["--nproc-per-node", str(machine.ranks)]
        rank = [str(ROOT / "tests" / "bench" / "multi_gpu" / "rank.py"), str(self.folder)]
        if profile is not None:
            rank += ["--profile", str(profile)]
        # what launch/train.sh sets for every rank, NVLink multicast off among it
        shell = ["bash", "-c", f'source "{ROOT}/launch/env.sh" && exec "$@"', "bash"]
        # the package is found where it is not installed, too
        searched = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.log.open("w") as output:
            self._process = subprocess.Popen(
                [*shell, *torchrun, *ranks, *rank, str(script), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(searched)},
            )
        atexit.register(self.end)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def steps(self) -> list[Step]:
        return read_steps(self.output())

    def peaks(self) -> list[int]:
        """Peak bytes of the ranks that ended by themselves."""
        return [int(path.read_text()) for path in sorted(self.folder.glob("*.peak"))]

    def wait(self, deadline: float) -> int | None:
        """Exit status, or None where the deadline passed first and the job was ended."""
        try:
            return self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            ranks = list(self._ranks())
            for process in ranks:
                process.send_signal(signal.SIGABRT)  # its faulthandler prints where it was
            psutil.wait_procs(ranks, timeout=10)
            self.end()
            return None

    def wait_for_step(self, iteration: int, deadline: float) -> bool:
        """Whether a step was logged before the job ended or the deadline passed."""
        while time.monotonic() < deadline:
            if any(step.iteration >= iteration for step in self.steps()):
                return True
            if self._process.poll() is not None:
                return False
            time.sleep(0.02)
        return False

    def kill_rank(self, rank: int) -> None:
        """SIGKILL one rank, as a failing machine would end it."""
        for process in self._ranks():
            if process.environ().get("RANK") == str(rank):
                process.kill()
                return
        raise ProcessLookupError(f"rank {rank} is not running")

    def _ranks(self) -> Iterator[psutil.Process]:
        """The direct children of torchrun, which the shell has become."""
        for process in psutil.Process(self._process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "RANK" in process.environ():
                    yield process

    def end(self) -> None:
        """End the job and whatever it started; does nothing where it has ended."""
        if self._process.poll() is not None:
            return
        started = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()  # torchrun ends its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.kill()
        self._process.wait()
