"""What a patch is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen35_mcore.mcore.patches.verdict import Verdict

NOT_REPORTED = "not reported"
_applied: set[str] = set()
"""Names of the patches that this process has."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One attribute of megatron-core that this package replaces."""

    name: str
    target: str
    """``module:Class.attribute`` or ``module:attribute``."""
    why: str
    """What goes wrong without it."""
    replace: Callable[[Any], Any]
    """From the original attribute to the one that takes its place."""
    probe: Callable[[], Verdict]
    """Shows the fault on the installed release, in a process where nothing is replaced."""
    upstream: str = NOT_REPORTED
    """The issue or pull request, or `NOT_REPORTED`."""

    def apply(self) -> None:
        """Replace the attribute; does nothing when called again.

        Raises:
            ImportError, AttributeError: this release has no such attribute.
        """
        if self.name in _applied:
            return
        owner, attribute = self.owner_and_attribute()
        setattr(owner, attribute, self.replace(getattr(owner, attribute)))
        _applied.add(self.name)

    def owner_and_attribute(self) -> tuple[Any, str]:
        """The module or class that has the attribute, and its name there."""
        module, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, attribute = path.split(".")
        for name in classes:
            owner = getattr(owner, name)
        return owner, attribute
