"""What this package replaces in the installed megatron-core, each with its probe's verdict."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from qwen35_mcore.mcore.patches.patch import NOT_REPORTED
from qwen35_mcore.mcore.patches.probes import Probed, probe_all
from qwen35_mcore.mcore.patches.verdict import Verdict
from qwen35_mcore.versions import TESTED_MEGATRON_CORE, installed_megatron_core


def patch_rows() -> list[dict[str, Any]]:
    """A row for each patch: its text, its probe's verdict, and whether a run applies it."""
    tested = installed_megatron_core() in TESTED_MEGATRON_CORE
    return [asdict(one) | {"state": _state(one, tested)} for one in probe_all()]


def _state(one: Probed, tested: bool) -> str:
    if tested or one.verdict is Verdict.FAULT:
        return "applied"
    return "not needed" if one.verdict is Verdict.NO_FAULT else "unknown"


def print_patches(rows: list[dict[str, Any]]) -> None:
    """The rows for people."""
    console = Console(highlight=False)
    installed = installed_megatron_core()
    tested = "tested" if installed in TESTED_MEGATRON_CORE else "not tested"
    console.print(f"megatron-core {installed} ({tested}), {len(rows)} patches\n")
    for row in rows:
        console.print(f"[bold]{row['name']}[/]: {row['state']} ({row['verdict']})", soft_wrap=True)
        for key in ("why", "target", "file", "upstream"):
            if row[key] != NOT_REPORTED:
                console.print(f"    {key}: {row[key]}", soft_wrap=True)
