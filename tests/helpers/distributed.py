"""One persistent pool of processes that rebuilds its parallel state per case.

Importing torch and megatron takes longer than most cases. On GPUs the workers stay; on a CPU they
are forks of one process that has imported both (`tests.helpers.imported`), and end with a case of
several ranks: gloo's threads outlive their group, and poll. A case is a module-level
function; it runs in the first ``world_size`` workers, each inside a fresh process group (gloo, or
NCCL on GPUs), and what it returns comes back in rank order, on the CPU.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import io
import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

MAX_WORLD_SIZE = 4
CASE_TIMEOUT_S = 600
PRINT_STACKS = signal.SIGRTMIN  # LLVM, which Triton compiles with, takes SIGUSR1 for itself


class CaseError(AssertionError):
    """A case raised on at least one rank; the message holds that rank's traceback."""


class WorkerPool:
    """Workers on this machine; see the module docstring.

    Args:
        size: the largest world size of a case.
        gpus: workers take these in turn, over NCCL, and share them where there are more workers
            (`one_host_each`); none: all are on the CPU, over gloo.
        timeout_s: how long a case may take.
        log: file for what the workers print; None: where this process prints.

    Attributes:
        deadline: of `time.monotonic`; a case that is not over then has failed, too.
    """

    def __init__(
        self,
        size: int = MAX_WORLD_SIZE,
        *,
        gpus: int = 0,
        timeout_s: float = CASE_TIMEOUT_S,
        log: Path | None = None,
    ) -> None:
        self.size, self.gpus, self.timeout_s, self.log = size, gpus, timeout_s, log
        self.deadline = math.inf
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, case: Callable[..., Any], world_size: int, **kwargs: Any) -> list[Any]:
        """Call ``case(**kwargs)`` on ``world_size`` ranks and return the results by rank.

        Raises:
            CaseError: with the traceback of the first rank that failed; the pool is rebuilt then,
                since the other ranks may hang in a collective.
        """
        if not all(process.is_alive() for process, _ in self._workers):
            self.close()
        started = range(len(self._workers), self.size if self.gpus else world_size)
        self._workers += [_start_worker(*self._place(rank), self.log) for rank in started]
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world_size):
                call = (case, kwargs, rank, world_size, os.path.join(folder, "store"))
                self._workers[rank][1].send_bytes(_pack(call))
            results, failures = self._answers(world_size)
        if failures or (world_size > 1 and not self.gpus):
            self.close()
        if failures:
            # a lost connection is what the other ranks see of the failure
            first = min(failures, key=lambda rank: "Connection" in failures[rank])
            raise CaseError(f"rank {first} of {world_size}:\n{failures[first]}")
        return results

    def _answers(self, world_size: int) -> tuple[list[Any], dict[int, str]]:
        """What the ranks return, and the tracebacks of those that raised."""
        results: list[Any] = [None] * world_size
        failures: dict[int, str] = {}
        end = min(time.monotonic() + self.timeout_s, self.deadline)
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        while waiting:
            left = max(0.0, end - time.monotonic())
            ready = multiprocessing.connection.wait(list(waiting), timeout=left)
            if not ready:
                self._print_stacks(waiting.values())
                message = f"ranks {sorted(waiting.values())} gave no answer"
                return results, failures or {min(waiting.values()): message}
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    ok, results[rank] = _unpack(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    ok, results[rank] = False, "the process died"
                if not ok:
                    failures[rank] = results[rank]
                    # the others fail after it, or hang in a collective
                    end = min(end, time.monotonic() + 1.0)
        return results, failures

    def _print_stacks(self, ranks: Iterable[int]) -> None:
        """Have workers print where they are, before they are ended: one by one, to one file."""
        for rank in ranks:
            if (process := self._workers[rank][0]).is_alive():
                os.kill(process.pid, PRINT_STACKS)
                time.sleep(0.5)

    def _place(self, rank: int) -> tuple[int | None, dict[str, str]]:
        """A worker's GPU, and what its environment needs."""
        if not self.gpus:
            return None, {}
        return rank % self.gpus, one_host_each(rank) if self.size > self.gpus else {}

    def close(self) -> None:
        """End every worker, and what it started: saving leaves processes that wait for it."""
        for process, connection in self._workers:
            connection.close()
            with contextlib.suppress(psutil.Error):
                started = psutil.Process(process.pid).children(recursive=True)
                for child in started:
                    child.kill()
            process.kill()
            process.join()
        self._workers = []


def one_host_each(rank: int) -> dict[str, str]:
    """Environment of a rank that shares its GPU: NCCL refuses two ranks of one host on one GPU, and
    takes them for hosts of their own, which talk over sockets."""
    return {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo"}


_pool: WorkerPool | None = None


def worker_pool() -> WorkerPool:
    """The pool of this test run."""
    global _pool
    if _pool is None:
        _pool = WorkerPool()
        atexit.register(_pool.close)
    return _pool


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


def _start_worker(
    gpu: int | None, environment: dict[str, str], log: Path | None
) -> tuple[Any, Connection]:
    # a fork cannot use a GPU that the process it comes from has touched
    context: Any = multiprocessing.get_context("forkserver" if gpu is None else "spawn")
    if gpu is None:
        context.set_forkserver_preload(["tests.helpers.imported"])
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs, gpu, environment, log)
    )  # no daemon: saving forks
    process.start()
    theirs.close()
    return process, ours


def _serve(
    connection: Connection, gpu: int | None, environment: dict[str, str], log: Path | None
) -> None:
    os.environ.update(environment)
    if log is not None:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    faulthandler.register(PRINT_STACKS)
    if gpu is None:
        from qwen35_mcore.mcore import cpu_mode

        cpu_mode.enable()
    else:
        torch.cuda.set_device(gpu)
        _import_kernels()
        take_first_configurations()
        torch.manual_seed(0)  # megatron draws the gates of shared experts on the CPU
    torch.set_num_threads(1)
    backend = "gloo" if gpu is None else "nccl"
    while True:
        try:
            case, kwargs, rank, world_size, store = _unpack(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, _run_case(backend, case, kwargs, rank, world_size, store))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(_pack(answer))


def _import_kernels() -> None:
    """Import what cases use while all workers start: each would do so when it first takes part, one
    after another, and it can take half a minute. What is absent, the case that needs it reports."""
    import megatron.core.models.gpt  # noqa: F401

    for module in ("transformer_engine.pytorch", "fla.ops.gated_delta_rule", "tilelang"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def take_first_configurations() -> None:
    """Triton's autotuner takes the first configuration in this process, and measures none.

    What is compared is right with each of them, and trying every one costs minutes on a machine
    that has compiled nothing yet: FLA lists several hundred for a layer that passes states.
    """
    with contextlib.suppress(ImportError):
        from triton.runtime.autotuner import Autotuner

        tune = Autotuner.run

        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.configs = self.configs[:1]
            return tune(self, *args, **kwargs)

        Autotuner.run = run


def _run_case(backend: str, case: Any, kwargs: Any, rank: int, world_size: int, store: str) -> Any:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
    )
    result = case(**kwargs)
    # Not after a failure: that ends this process, and NCCL's teardown would wait for ranks that
    # hang in a collective.
    destroy_moe_metrics_tracker()  # sized by the first model that logs into it
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return result
