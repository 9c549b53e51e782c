"""The releases this package was tested with, where another one may run wrongly."""

from __future__ import annotations

import re
from importlib.metadata import version

PYTHON = (3, 12)
MEGATRON_CORE = (0, 19)
TESTED_MEGATRON_CORE = ("0.19.2",)
"""Releases in which every patch was tried; on another one of 0.19 probes decide (mcore/patches)."""
TRANSFORMER_ENGINE = (2, 20)


def release(version: str) -> tuple[int, ...]:
    """``3.6.0+git1`` to (3, 6, 0); an unreadable version is empty and sorts before every other."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def installed_megatron_core() -> str:
    """The release of megatron-core that is installed."""
    return version("megatron-core")
