"""Kernels of the gated delta net: reference mathematics, FLA, and the explicit choice of one.

`reference` is the specification; `dispatch.select_backend` picks the kernels a layer calls;
`support` holds the rules it goes by. Importing this package never imports FLA.
"""

from __future__ import annotations

from qwen35_mcore.kernels.registry import BACKENDS, KernelBackend, select_backend, supports
from qwen35_mcore.kernels.support import KernelFacts, Support, gather_facts

__all__ = [
    "BACKENDS",
    "KernelBackend",
    "KernelFacts",
    "Support",
    "gather_facts",
    "select_backend",
    "supports",
]
