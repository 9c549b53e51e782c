"""Which patches the installed megatron-core gets."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.imports import GPTModel
from qwen35_mcore.mcore.patches import flop_count
from qwen35_mcore.mcore.patches.probes import probe_all
from qwen35_mcore.mcore.patches.table import PATCHES
from qwen35_mcore.mcore.patches.verdict import Verdict
from qwen35_mcore.versions import TESTED_MEGATRON_CORE, installed_megatron_core

ACCEPT_FLAG = "--accept-untested-megatron"


def install(step_flops: Callable[[float, float], float], *, accept_untested: bool = False) -> None:
    """Apply every patch that the installed megatron-core needs; call it once a process.

    On a tested release that is all of them. On another one a patch is applied where its probe shows
    the fault.

    Args:
        step_flops: see `flop_count.count_by`.
        accept_untested: apply also what no probe can judge on an untested release.

    Raises:
        ConfigError: a probe cannot tell on an untested release, and nobody accepted that.
    """
    flop_count.count_by(step_flops)
    needed = {patch.name for patch in PATCHES}
    if installed_megatron_core() not in TESTED_MEGATRON_CORE:
        needed = _needed_on_untested(accept_untested)
    for patch in PATCHES:
        if patch.name in needed:
            patch.apply()
    _be_quiet()


def _be_quiet() -> None:
    """GPTModel says that it is deprecated, pretrain that it wants a config, not a provider."""
    logging.getLogger(GPTModel.__module__).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"\s*It is recommended to use a ModelConfig")


def _needed_on_untested(accept: bool) -> set[str]:
    probed = probe_all()
    unknown = [one.name for one in probed if one.verdict is Verdict.UNKNOWN]
    if unknown and not accept:
        raise ConfigError(
            "this package replaces parts of megatron-core, and cannot tell whether the installed "
            "release still needs it",
            got=f"megatron-core {installed_megatron_core()}; cannot tell: {', '.join(unknown)}",
            allowed=f"megatron-core {' or '.join(TESTED_MEGATRON_CORE)}",
            fix=f"install a tested release, or read `qwen35 doctor --patches` and pass "
            f"{ACCEPT_FLAG} to replace these parts all the same",
        )
    return {one.name for one in probed if one.verdict is not Verdict.MENDED}
