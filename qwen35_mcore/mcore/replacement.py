"""What it is to replace something in megatron-core or torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One attribute of a module or class, and what takes its place."""

    target: str
    """``module:Class.attribute`` or ``module:attribute``."""
    why: str
    """What goes wrong without it."""
    replace: Callable[[Any], Any]
    """From the original attribute to the one that takes its place."""

    def apply(self) -> None:
        """Replace the attribute.

        Raises:
            ImportError, AttributeError: the installed release has no such attribute.
        """
        owner, attribute = self.owner_and_attribute()
        new = self.replace(getattr(owner, attribute))
        if isinstance(new, FunctionType):  # pickle finds a function by its name
            new.__module__, _, new.__qualname__ = self.target.partition(":")
        setattr(owner, attribute, new)

    def owner_and_attribute(self) -> tuple[Any, str]:
        """The module or class that has the attribute, and its name there."""
        module, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, attribute = path.split(".")
        for name in classes:
            owner = getattr(owner, name)
        return owner, attribute
