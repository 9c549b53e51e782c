"""The choice of kernels for a GatedDeltaNet. Every module of this package named ``*_kernels`` is
imported here, and registers its kernels.

``auto`` says once what it chose and why. Kernels that were named and cannot run are an error, and
so is ``auto`` on a CUDA device where FLA cannot run: the reference is never a silent fallback.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from typing import NamedTuple

import torch

from qwen35_mcore import kernels
from qwen35_mcore.errors import KernelError
from qwen35_mcore.kernels.base import REGISTERED, Kernels
from qwen35_mcore.kernels.facts import KernelFacts, Support, Workload, gather_facts

logger = logging.getLogger(kernels.__name__)


def import_kernels() -> None:
    """Let every module with kernels register them."""
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        if module.name.endswith("_kernels"):
            importlib.import_module(module.name)


import_kernels()
KERNELS = ("auto", *REGISTERED)
"""What ``--gdn-kernel`` takes."""


class Choice(NamedTuple):
    """Which kernels, and why."""

    kernels: type[Kernels]
    reason: str


def supports(name: str, facts: KernelFacts, workload: Workload) -> Support:
    """Whether the kernels of that name can run, with the reason and, for a no, the fix.

    Raises:
        KernelError: an unknown name.
    """
    return _named(name).support(facts, workload)


def choose_kernels(name: str, facts: KernelFacts, workload: Workload) -> Choice:
    """The decision behind `select_kernels`, from facts alone: nothing is built or announced.

    Raises:
        KernelError: an unknown name, or kernels that cannot run here, with the reason and the fix.
    """
    chosen = _automatic(facts.device_type) if name == "auto" else _named(name)
    support = chosen.support(facts, workload)
    if not support.ok:
        raise _cannot_run(name, chosen, support)
    why = "named" if name != "auto" else f"auto on {facts.device_type}"
    reason = f"{why}: {support.reason}"
    if _is_slow(chosen, facts):
        reason += f", slow on {facts.device_type}"
    detail = chosen.detail(facts, workload)
    return Choice(chosen, f"{reason}; {detail}" if detail else reason)


def select_kernels(
    name: str,
    device: torch.device | str,
    workload: Workload,
    *,
    facts: KernelFacts | None = None,
) -> Kernels:
    """The kernels to use, announced once per process on the logger ``qwen35_mcore.kernels``.

    Args:
        name: one of `KERNELS`; ``auto`` takes those made for the device.
        facts: what is known of the machine; gathered when None.

    Raises:
        KernelError: an unknown name, or kernels that cannot run here, with the reason and the fix.
    """
    facts = gather_facts(torch.device(device)) if facts is None else facts
    chosen, reason = choose_kernels(name, facts, workload)
    level = logging.WARNING if _is_slow(chosen, facts) else logging.INFO
    selected = chosen.build(reason, facts, workload)
    _announce(level, chosen.name, reason)
    return selected


def _named(name: str) -> type[Kernels]:
    if name not in REGISTERED:
        raise KernelError("unknown kernels", got=name, allowed=", ".join(KERNELS))
    return REGISTERED[name]


def _automatic(device_type: str) -> type[Kernels]:
    made_for = "cuda" if device_type == "cuda" else "cpu"
    return next(one for one in REGISTERED.values() if one.automatic and one.made_for == made_for)


def _is_slow(chosen: type[Kernels], facts: KernelFacts) -> bool:
    return facts.device_type == "cuda" and chosen.made_for != "cuda"


def _cannot_run(asked: str, chosen: type[Kernels], support: Support) -> KernelError:
    fix = support.fix or "name kernels that can"
    if asked == "auto":
        fix += "; or pass --gdn-kernel torch to run without FLA, slowly"
    return KernelError(
        f"the {chosen.name} kernels cannot run here ({asked!r} was asked for): {support.reason}",
        allowed=", ".join(KERNELS),
        fix=fix,
    )


@functools.cache
def _announce(level: int, name: str, reason: str) -> None:
    """Cached, so that the same choice is logged once however many layers make it."""
    logger.log(level, "GDN kernels: %s, chosen because %s", name, reason)
