"""Run qwen35_mcore.training.pretrain many times without importing torch and megatron every time.

One process imports everything and then forks: each rank of a run is a fork that gets its own
environment, arguments and output file, and calls the module's main as ``__main__`` would.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.helpers.ports import free_port

RUN_TIMEOUT_S = 600.0
"""No measure of speed: what has not ended by then hangs."""
OTHERS_END_S = 60.0
"""How long other ranks may take to notice a failure, before they are killed."""


@dataclass
class Run:
    """A started run: one process and one output file per rank."""

    server: ScriptServer
    pids: list[int]
    outputs: list[Path]
    statuses: dict[int, int] = field(default_factory=dict)

    def wait(self, timeout: float = RUN_TIMEOUT_S) -> list[int]:
        """Exit status of every rank; negative for a signal. Ranks that wait for one that failed are
        killed."""
        deadline, failed = time.monotonic() + timeout, math.inf
        while len(self.statuses) < len(self.pids):
            self.poll()
            if any(self.statuses.values()):
                failed = min(failed, time.monotonic())
            if time.monotonic() > failed + OTHERS_END_S:
                self.kill()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no end after {timeout} s:\n{self.output()}")
            time.sleep(0.02)
        return [self.statuses[pid] for pid in self.pids]

    def poll(self) -> None:
        """Collect what has ended."""
        self.statuses |= self.server.call("poll", [p for p in self.pids if p not in self.statuses])

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every rank that has not ended."""
        for pid in self.pids:
            if pid not in self.statuses:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def output(self) -> str:
        """What all ranks wrote, rank after rank."""
        return "".join(path.read_text() for path in self.outputs)


class ScriptServer:
    """The process that imports once and forks; started with the first run."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        self._folder = Path(tempfile.mkdtemp(prefix="pretrain_runs_"))
        self._runs = 0

    def start(
        self,
        flags: list[str],
        world_size: int = 1,
        ranks: list[int] | None = None,
        before: Callable[[Any], None] | None = None,
        **env: str,
    ) -> Run:
        """Start the module on ``ranks`` (all by default) of a job of ``world_size``.

        Args:
            before: called with the module in each rank: plants a fault, or a script of one's own.
        """
        self._runs += 1
        ranks = list(range(world_size)) if ranks is None else ranks
        outputs = [self._folder / f"{self._runs}.{rank}.txt" for rank in ranks]
        for output in outputs:
            output.touch()
        job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost"} | env
        job["MASTER_PORT"] = str(free_port())
        calls = [
            (flags, job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, str(output), before)
            for rank, output in zip(ranks, outputs, strict=True)
        ]
        return Run(self, self.call("start", calls), outputs)

    def run(self, flags: list[str], world_size: int = 1, **env: str) -> Run:
        """Start, wait, and assert that every rank ended well."""
        run = self.start(flags, world_size, **env)
        statuses = run.wait()
        assert not any(statuses), f"{statuses}\n{run.output()}"
        return run

    def call(self, request: str, argument: Any) -> Any:
        self._connection.send((request, argument))
        return self._connection.recv()

    def close(self) -> None:
        """End the server and remove the output files."""
        self._process.kill()
        self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


@functools.cache
def script_server() -> ScriptServer:
    """The server of this test run."""
    server = ScriptServer()
    atexit.register(server.close)
    return server


@functools.cache
def small_dataset() -> str:
    """Prefix of a byte-level dataset made of the standard library's 40 smallest modules."""
    from qwen35_mcore.data import tokenize

    folder = Path(tempfile.mkdtemp(prefix="dataset_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    modules = sorted(Path(os.__file__).parent.glob("*.py"), key=lambda f: (f.stat().st_size, f))
    files = [f for f in modules if f.stat().st_size > 2000][:40]
    prefix = folder / "text"
    tokenize(inputs=files, output_prefix=prefix, tokenizer="byte", workers=1, quiet=True)
    return str(prefix)


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    script = _import_script()
    import megatron.core.tokenizers.text  # noqa: F401 (megatron imports it in every run)

    gc.freeze()  # what is imported is not looked through again in every run
    while True:
        try:
            request, argument = connection.recv()
        except EOFError:
            return
        if request == "start":
            connection.send([_fork(script, connection, *call) for call in argument])
        else:
            connection.send(_ended(argument))


def _import_script() -> Any:
    import torch

    torch.set_num_threads(1)
    from qwen35_mcore.training import pretrain

    return pretrain


def _ended(pids: list[int]) -> dict[int, int]:
    found = {pid: os.waitpid(pid, os.WNOHANG) for pid in pids}
    return {
        pid: os.waitstatus_to_exitcode(status) for pid, (ended, status) in found.items() if ended
    }


def _fork(
    script: Any,
    connection: Connection,
    flags: list[str],
    env: dict[str, str],
    to: str,
    before: Callable[[Any], None] | None,
) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        connection.close()
        descriptor = os.open(to, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if before is not None:
            before(script)
        status = _main(script, flags, env)
    finally:
        os._exit(status)


def _main(script: Any, flags: list[str], env: dict[str, str]) -> int:
    import sys

    os.environ.update(env)
    sys.argv = ["pretrain.py", *flags]
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    try:
        with script.reported_once():
            script.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        _close_log()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _close_log() -> None:
    """What an exit handler does in the script: a fork runs none, they are the server's."""
    from megatron.training.global_vars import get_tensorboard_writer

    with contextlib.suppress(Exception):
        get_tensorboard_writer().close()
