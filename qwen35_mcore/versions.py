"""The releases this package was tested with, where another one may run wrongly."""

from __future__ import annotations

import re

PYTHON = (3, 12)
MEGATRON_CORE = (0, 19)
TRANSFORMER_ENGINE = (2, 20)


def release(version: str) -> tuple[int, ...]:
    """``3.6.0+git1`` to (3, 6, 0); an unreadable version is empty and sorts before every other."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()
