"""What a patch is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwen35_mcore.mcore.imports import wrong_release
from qwen35_mcore.mcore.patches.verdict import Verdict
from qwen35_mcore.mcore.replacement import Replacement

NOT_REPORTED = "not reported"
_applied: set[str] = set()
"""Names of the patches that this process has."""


@dataclass(frozen=True, kw_only=True)
class Patch(Replacement):
    """A replacement that corrects a fault of megatron-core's."""

    name: str
    probe: Callable[[], Verdict]
    """Shows the fault on the installed release, in a process where nothing is replaced."""
    upstream: str = NOT_REPORTED
    """The issue or pull request, or `NOT_REPORTED`."""

    @property
    def file(self) -> str:
        """The file that holds the patch, from the folder of `qwen35_mcore`."""
        return self.probe.__module__.replace(".", "/") + ".py"

    def apply(self) -> None:
        """Replace the attribute; does nothing when called again.

        Raises:
            ConfigError: this release has no such attribute.
        """
        if self.name in _applied:
            return
        try:
            super().apply()
        except (ImportError, AttributeError) as error:
            raise wrong_release(f"patch {self.name!r} finds no {self.target} in it") from error
        _applied.add(self.name)
