"""Whether something can be written in a folder, known before the work that it would end."""

from __future__ import annotations

import os
from pathlib import Path

from qwen35_mcore.errors import PlanError


def check_writable(what: str, target: Path) -> None:
    """Refuse, as a PlanError, a target that cannot be written in its folder, which is made where it
    is missing."""
    nearest = target.parent
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not os.path.isdir(nearest):
        raise cannot_write(what, target, f"{nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise cannot_write(what, target, f"you may not write in {nearest}")


def cannot_write(what: str, target: Path, reason: object) -> PlanError:
    """The error of that."""
    fix = "choose a folder where you may write"
    return PlanError(f"cannot write the {what}", got=f"{target}: {reason}", fix=fix)
