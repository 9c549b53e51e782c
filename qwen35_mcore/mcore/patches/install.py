"""Which patches the installed megatron-core gets."""

from __future__ import annotations

from collections.abc import Callable

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.patches import flop_count
from qwen35_mcore.mcore.patches.patch import Verdict
from qwen35_mcore.mcore.patches.probes import probe_all
from qwen35_mcore.mcore.patches.table import PATCHES
from qwen35_mcore.versions import TESTED_MEGATRON_CORE, installed_megatron_core

ACCEPT_FLAG = "--accept-untested-megatron"
_applied: set[str] = set()


def install(step_flops: Callable[[float, float], float], *, accept_untested: bool = False) -> None:
    """Apply every patch that the installed megatron-core needs; does nothing when called again.

    On a tested release that is all of them. On another one a patch is applied where its probe shows
    the fault.

    Args:
        step_flops: see `flop_count.count_by`.
        accept_untested: apply also what no probe can judge on an untested release.

    Raises:
        ConfigError: a probe cannot tell on an untested release, and nobody accepted that.
    """
    flop_count.count_by(step_flops)
    needed = {patch.name for patch in PATCHES} - _applied
    if not needed:
        return
    if installed_megatron_core() not in TESTED_MEGATRON_CORE:
        needed &= _needed_on_untested(accept_untested)
    for patch in PATCHES:
        if patch.name in needed:
            patch.apply()
    _applied.update(patch.name for patch in PATCHES)


def _needed_on_untested(accept: bool) -> set[str]:
    verdicts = probe_all()
    unknown = [name for name, verdict in verdicts.items() if verdict is Verdict.UNKNOWN]
    if unknown and not accept:
        raise ConfigError(
            "this package replaces parts of megatron-core, and cannot tell whether the installed "
            "release still needs it",
            got=f"megatron-core {installed_megatron_core()}; cannot tell: {', '.join(unknown)}",
            allowed=f"megatron-core {' or '.join(TESTED_MEGATRON_CORE)}",
            fix=f"install a tested release, or read `qwen35 doctor --patches` and pass "
            f"{ACCEPT_FLAG} to replace these parts all the same",
        )
    return {name for name, verdict in verdicts.items() if verdict is not Verdict.MENDED}
