"""Paths that a user gives, and small files that are there completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen35_mcore.errors import CheckpointError

UNFINISHED = ".tmp"


def no_folder(path: Path, fix: str) -> CheckpointError:
    """The error of a path that is no folder: it is a file, or it is not there."""
    what = "this is a file, not a folder" if path.exists() else "there is no such folder"
    return CheckpointError(what, got=str(path), fix=fix)


def refuse_overlap(source: Path, target: Path) -> None:
    """Refuse a target that is the source, holds it, or lies in it.

    Raises:
        CheckpointError: it does: replacing it would take the source away.
    """
    a, b = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if a == b or a in b.parents or b in a.parents:
        raise CheckpointError(
            "source and target are in each other",
            got=f"{source} and {target}",
            fix="choose a target outside the source",
        )


def fingerprint(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of each file: unfinished work goes on only with the same input."""
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)]


def copy_file(path: Path, stream: Any) -> None:
    """Copy a file into a stream."""
    with open(path, "rb") as file:
        shutil.copyfileobj(file, stream, 2**22)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file so that it is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_bytes(content)
    os.rename(unfinished, path)
