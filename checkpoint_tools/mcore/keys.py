"""Names in a Megatron checkpoint folder, and where a thing is stored in it."""

from __future__ import annotations

from dataclasses import dataclass

RELEASE = "release"
TRACKER = "latest_checkpointed_iteration.txt"
COMMON_STATE = "common_state/shard_0_1"
LEGACY_COMMON = "common.pt"


@dataclass(frozen=True, slots=True)
class Stored:
    """A byte range of a file."""

    file: str
    offset: int
    length: int
