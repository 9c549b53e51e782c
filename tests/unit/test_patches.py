"""Every patch of megatron-core: its fault is there on the installed release, and it is applied."""

from __future__ import annotations

import functools

import pytest

from qwen35_mcore.mcore.patches.patch import Patch, Verdict
from qwen35_mcore.mcore.patches.probes import probe_all
from qwen35_mcore.mcore.patches.table import PATCHES


@functools.cache
def verdicts() -> dict[str, Verdict]:
    return probe_all()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_the_fault_is_there(patch: Patch) -> None:
    """A fault that megatron-core mended fails here by name: take the patch out then."""
    assert verdicts()[patch.name] is Verdict.FAULT
