"""What both directions are told, and what they say at the end."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a conversion works, whatever it converts."""

    workers: int = 4
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    dry_run: bool = False
    quiet: bool = False


@dataclass(kw_only=True)
class Report:
    """What a conversion did, or would do; printed by ``--json`` under these names."""

    source: str
    target: str
    tensors: int
    bytes: int
    carried: int
    files: list[str]
    notes: list[str] = field(default_factory=list)
    origin: str | None = None
    """Name of the folder of what was carried, beside ``release``."""
