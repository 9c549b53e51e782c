"""Explicit choice of the kernels that a gated delta net runs on.

``auto`` says once what it chose and why. Kernels that were named and cannot run are an error, and
so is ``auto`` on a CUDA device where FLA cannot run: the reference is never a silent fallback.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

from qwen35_mcore.errors import KernelError
from qwen35_mcore.kernels import fla, torch_kernels  # noqa: F401 (they register themselves)
from qwen35_mcore.kernels.base import REGISTERED, Kernels
from qwen35_mcore.kernels.facts import KernelFacts, Support, gather_facts

logger = logging.getLogger(__name__.rpartition(".")[0])

KERNELS = ("auto", *REGISTERED)
"""What ``--gdn-kernel`` takes."""


class Choice(NamedTuple):
    """Which kernels, and why."""

    kernels: type[Kernels]
    reason: str


def supports(
    name: str,
    facts: KernelFacts,
    dtype: torch.dtype,
    *,
    key_dim: int = 128,
    value_dim: int = 128,
) -> Support:
    """Whether the kernels of that name can run, with the reason and, for a no, the fix.

    Raises:
        KernelError: an unknown name.
    """
    return _named(name).support(facts, dtype, key_dim=key_dim, value_dim=value_dim)


def choose_kernels(
    name: str,
    facts: KernelFacts,
    dtype: torch.dtype,
    *,
    key_dim: int = 128,
    value_dim: int = 128,
) -> Choice:
    """The decision behind `select_kernels`, from facts alone: nothing is built or announced.

    Raises:
        KernelError: an unknown name, or kernels that cannot run here, with the reason and the fix.
    """
    dims = {"key_dim": key_dim, "value_dim": value_dim}
    chosen = _made_for(facts.device_type) if name == "auto" else _named(name)
    support = chosen.support(facts, dtype, **dims)
    if not support.ok:
        raise _cannot_run(name, chosen, support)
    why = "named" if name != "auto" else f"auto on {facts.device_type}"
    reason = f"{why}: {support.reason}"
    if _is_slow(chosen, facts):
        reason += f", slow on {facts.device_type}"
    detail = chosen.detail(facts, dtype, **dims)
    return Choice(chosen, f"{reason}; {detail}" if detail else reason)


def select_kernels(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    key_dim: int = 128,
    value_dim: int = 128,
    facts: KernelFacts | None = None,
) -> Kernels:
    """The kernels to use, announced once per process on the logger ``qwen35_mcore.kernels``.

    Args:
        name: one of `KERNELS`; ``auto`` takes those made for the device.
        dtype: of q, k and v.
        key_dim, value_dim: head dims of the delta rule.
        facts: what is known of the machine; gathered when None.

    Raises:
        KernelError: an unknown name, or kernels that cannot run here, with the reason and the fix.
    """
    facts = gather_facts(torch.device(device)) if facts is None else facts
    dims = {"key_dim": key_dim, "value_dim": value_dim}
    chosen, reason = choose_kernels(name, facts, dtype, **dims)
    kernels = chosen.build(reason, facts, dtype, **dims)
    level = logging.WARNING if _is_slow(chosen, facts) else logging.INFO
    _announce(level, chosen.name, reason)
    return kernels


def _named(name: str) -> type[Kernels]:
    if name not in REGISTERED:
        raise KernelError("unknown kernels", got=name, allowed=", ".join(KERNELS))
    return REGISTERED[name]


def _made_for(device_type: str) -> type[Kernels]:
    fallback = "cuda" if device_type == "cuda" else "cpu"
    return next(one for one in REGISTERED.values() if one.made_for == fallback)


def _is_slow(kernels: type[Kernels], facts: KernelFacts) -> bool:
    return facts.device_type == "cuda" and kernels.made_for != "cuda"


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
