"""What an imported model brings along for the export (the vision tower, the tokenizer's files).

The import stores it in a folder beside the checkpoint and names that folder in ``qwen35_origin``.
A run that starts from the import takes both over, so that its own folder is complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def take_over(origin: str, source: Path, target: Path) -> None:
    """Link, or copy where links do not reach, the folder ``origin`` from one run to another.

    Does nothing when it is there already, or is not in the source (the export says so then).
    """
    if not (source / origin).is_dir() or (target / origin).exists():
        return
    partial = target / f".{origin}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / origin, partial, copy_function=_link)
    os.rename(partial, target / origin)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
