"""What a run keeps unconverted for its export, in folders beside its checkpoints.

An import's folder (the vision tower, the tokenizer's files) is named in ``qwen35_origin``, and the
folder of the tokenizer that made the data in ``qwen35_tokenizer``. A run that starts from another
folder takes both over, so that its own folder is complete.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qwen35_mcore.process.file_lock import lock_where_possible


def take_over(name: str, source: Path, target: Path) -> None:
    """Link, or copy where links do not reach, the folder ``name`` from one run to another.

    Does nothing when it is there already, or is not in the source (the export says so then).
    """
    if (source / name).is_dir():
        copy = functools.partial(shutil.copytree, source / name, copy_function=_link)
        store(name, target, copy)


def store(name: str, target: Path, fill: Callable[[Path], object]) -> None:
    """Make the folder ``name`` in a run's folder, unless it is there.

    Args:
        fill: makes the folder at the path that it is given. Several starts at once, and one that
            is killed in here, leave the folder whole or absent.
    """
    if (target / name).exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    lock, partial = target / f".{name}.lock", target / f".{name}.partial"
    with lock_where_possible(lock):
        if (target / name).exists():
            return
        shutil.rmtree(partial, ignore_errors=True)
        fill(partial)
        os.rename(partial, target / name)
        lock.unlink(missing_ok=True)  # whoever comes later finds the folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
