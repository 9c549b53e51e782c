"""The releases this package was tested with, where another one may run wrongly."""

from __future__ import annotations

import re
from importlib.metadata import version


def release(version: str) -> tuple[int, ...]:
    """``3.6.0+git1`` to (3, 6, 0); an unreadable version is empty and sorts before every other."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


PYTHON = (3, 12)
TESTED_MEGATRON_CORE = ("0.19.2",)
"""Exact releases. On another one of their series probes decide what is patched (mcore/patches)."""
MEGATRON_CORE = release(TESTED_MEGATRON_CORE[-1])[:2]
"""The series of the tested releases; another series is refused."""
TRANSFORMER_ENGINE = (2, 20)


def installed_megatron_core() -> str:
    """The release of megatron-core that is installed."""
    return version("megatron-core")
