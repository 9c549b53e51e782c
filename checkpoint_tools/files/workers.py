"""Threads for work that waits for disks: copying and checksums release the interpreter's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib import import_module


def run_parallel[Input, Result](
    function: Callable[[Input], Result], inputs: Iterable[Input], workers: int
) -> list[Result]:
    """`function` of every input, in order; the first error cancels what has not begun."""
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(function, one) for one in inputs]
        wait(futures, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        # a cancelled one stands behind the failed one that is the reason
        if not future.cancelled() and (error := future.exception()):
            raise error
    return [future.result() for future in futures]


def import_meanwhile(module: str) -> None:
    """Begin to import a module that is slow to import and needed at the end only."""
    threading.Thread(target=import_module, args=(module,), daemon=True).start()
