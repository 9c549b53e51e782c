"""Apply a function to chunks, in order, with any number of processes, and show how far it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, cast

from qwen35_mcore.errors import DataError


def check_workers(workers: int) -> None:
    """Raise DataError for an impossible number of processes."""
    if not 1 <= workers <= 1024:
        raise DataError(
            "workers are processes", got=workers, allowed="1 to 1024", fix="pass --workers 8"
        )


def in_order[Chunk, Result](
    function: Callable[[Chunk], Result], chunks: Iterable[Chunk], workers: int
) -> Iterator[Result]:
    """``function`` of every chunk. It is pickled into each worker once; one works in this process.

    Raises:
        DataError: a worker process died; and what the function raises.
    """
    if workers == 1:
        yield from map(function, chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        # Forking a process whose libraries run threads can deadlock.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(function,),
    )
    try:
        # map() would read all input ahead: a window keeps memory bounded and workers busy.
        pending: deque[Future[Any]] = deque()
        for chunk in chunks:
            with _interrupts_held():  # the pool starts its workers as it is given work
                pending.append(pool.submit(_call_in_worker, chunk))
            if len(pending) > 2 * workers:
                yield cast(Result, pending.popleft().result())
        while pending:
            yield cast(Result, pending.popleft().result())
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died",
            fix="the system may have run out of memory: try fewer --workers",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait. A process that is started meanwhile never sees it: not even while it still
    imports what it needs, when it could not ignore it yet and would print a traceback."""
    resource_tracker.ensure_running()  # unblocks SIGINT when it starts
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


_function: Callable[[Any], Any] | None = None


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # Ctrl-C reaches every process of a terminal: the parent alone decides and reports.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process per core already: threads of the Rust tokenizers would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent is killed: it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _call_in_worker(chunk: Any) -> Any:
    assert _function is not None
    return _function(chunk)


@contextmanager
def progress(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` bytes of input files on standard error, if someone watches."""
    if quiet or not sys.stderr.isatty():
        yield lambda advance: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda advance: bar.update(task, advance=advance)
        bar.update(task, completed=total)
