"""Who makes the host wait for the device: copies of values, and calls that synchronize."""

from __future__ import annotations

import collections
import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any
from unittest import mock

import torch

FRAMES = 3
OF_NO_INTEREST = ("/torch/", "/unittest/", "warnings.py", __file__)


@contextlib.contextmanager
def callers_of_waits() -> Iterator[collections.Counter[str]]:
    """Count the waits inside by their caller: the innermost lines that are not torch's own.

    torch itself warns of a value that is read (``item``, a copy, ``nonzero``) and of a stream that
    is waited for. What libraries wait for without torch is not seen.
    """
    callers = collections.Counter[str]()

    def count(*_: Any, **__: Any) -> None:
        callers[_caller()] += 1

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
            stack.enter_context(mock.patch.object(warnings, "showwarning", count))
            for owner in (torch.cuda, torch.cuda.Event):
                stack.enter_context(
                    mock.patch.object(owner, "synchronize", _counted(owner.synchronize, count))
                )
            yield callers
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _counted(synchronize: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    @wraps(synchronize)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count()
        return synchronize(*args, **kwargs)

    return counted


def _caller() -> str:
    frames = [
        frame
        for frame in traceback.extract_stack()
        if not any(part in frame.filename for part in OF_NO_INTEREST)
    ]
    named = [
        f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno} {frame.name}"
        for frame in reversed(frames[-FRAMES:])
    ]
    return " < ".join(named) or "torch alone"
