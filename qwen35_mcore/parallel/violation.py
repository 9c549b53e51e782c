"""What a rule says of a layout that breaks it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One broken rule."""

    rule: str
    """Short name, stable: scripts may match it."""
    reason: str
    """Why the rule exists."""
    value: str
    """What was asked for."""
    allowed: str
    """What would pass."""
    fix: str
    """What to change."""

    def __str__(self) -> str:
        return (
            f"{self.rule}: {self.reason}\n"
            f"      got: {self.value}\n"
            f"      allowed: {self.allowed}\n"
            f"      fix: {self.fix}"
        )
