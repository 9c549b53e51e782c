"""A progress bar on standard error: bytes, rate and time left; nothing where nobody looks."""

from __future__ import annotations

import sys
import threading
from typing import Any


class Progress:
    """Counts bytes from any thread."""

    def __init__(self, total: int, what: str, *, quiet: bool) -> None:
        self._bar: Any = None
        self._total, self._what = total, what
        self._shown = not quiet and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._waiting = 0

    def __enter__(self) -> Progress:
        if self._shown:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self._what, total=self._total)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.update(0, advance=self._waiting)
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Add `count` bytes."""
        if self._bar is None:
            return
        with self._lock:
            self._waiting += count
            # a checkpoint has a hundred thousand pieces: drawing each would cost more than it
            if self._waiting >= 2**24:
                self._bar.update(0, advance=self._waiting)
                self._waiting = 0
