"""Which patches the installed megatron-core gets."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.imports import GPTModel, check_release
from qwen35_mcore.mcore.patches import captured_step, flop_count
from qwen35_mcore.mcore.patches.probes import Probed, probe_all
from qwen35_mcore.mcore.patches.table import PATCHES
from qwen35_mcore.mcore.patches.verdict import Verdict
from qwen35_mcore.versions import TESTED_MEGATRON_CORE, installed_megatron_core

ACCEPT_FLAG = "--accept-untested-megatron"


def install(
    step_flops: Callable[[float, float], float],
    check_batch: captured_step.Check | None = None,
    *,
    accept_untested: bool = False,
) -> None:
    """Apply every patch that the installed megatron-core needs; call it once a process.

    On a tested release that is all of them. On another one a patch is applied where its probe shows
    the fault, and the first rank prints which are.

    Args:
        step_flops: see `flop_count.count_by`.
        check_batch: see `captured_step.check_by`.
        accept_untested: on an untested release, apply also what no probe can judge.

    Raises:
        ConfigError: megatron-core of another series; a probe that cannot tell on an untested
            release, where nobody accepted that; or an attribute to replace that is not there.
    """
    check_release()
    flop_count.count_by(step_flops)
    captured_step.check_by(check_batch)
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
    if os.environ.get("RANK", "0") == "0":
        print(_notice(probed), flush=True)
    return {one.name for one in probed if one.verdict is not Verdict.NO_FAULT}


def _notice(probed: list[Probed]) -> str:
    lines = [
        f"megatron-core {installed_megatron_core()} was not tested with this package; patches:"
    ]
    for verdict, applied in (
        (Verdict.FAULT, "applied, their faults are there"),
        (Verdict.UNKNOWN, f"applied because of {ACCEPT_FLAG}, their probes cannot tell"),
        (Verdict.NO_FAULT, "not applied, their faults are not there"),
    ):
        names = [one.name for one in probed if one.verdict is verdict]
        if names:
            lines.append(f"  {applied}: {', '.join(names)}")
    return "\n".join(lines)
