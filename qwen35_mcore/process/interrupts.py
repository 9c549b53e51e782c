"""Ctrl-C ends a command in one line at any moment, and imports say nothing.

Standard library only: this is what a command line imports first.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 130  # what a shell gives for SIGINT


@contextlib.contextmanager
def quiet_imports(*, leave: bool = True) -> Iterator[None]:
    """While a program imports what it needs: warnings, which are about packages that are not
    there, are dropped, and Ctrl-C leaves at once. Errors pass.

    Args:
        leave: False where there is something to clean up already: Ctrl-C does what it did.
    """
    handler = _replace_handler(_leave) if leave else None
    show, disabled = warnings.showwarning, logging.root.manager.disable
    warnings.showwarning = lambda *args, **kwargs: None
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        warnings.showwarning = show
        if handler is not None:
            _replace_handler(handler)


def interrupt_once() -> None:
    """The first Ctrl-C raises KeyboardInterrupt; more of them do not disturb what cleans up."""
    _replace_handler(_raise_once)


def _raise_once(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _replace_handler(handler: object) -> object:
    """The handler of SIGINT so far; None, and nothing done, where it is ignored or not ours."""
    with contextlib.suppress(ValueError):  # not the main thread
        if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _raise_once, _leave):
            return signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    return None


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    interrupted()


def interrupted() -> NoReturn:
    """End this process and its children after Ctrl-C: one line, no traceback, status 130.

    Under torchrun, and in a rank that is not the first, whoever started it has the word.
    """
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ.get("RANK", "0") == "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        print("interrupted", file=sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(EXIT_INTERRUPTED)
