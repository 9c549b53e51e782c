"""What is known of a machine and its packages, which decides the kernels that can run there.

`gather_facts` looks; the rules in ``Kernels.support`` judge, and look at nothing else. A preflight
report prints the same facts and the same answers as a run acts on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Support(NamedTuple):
    """Whether kernels can run, why (not), and what would change a no."""

    ok: bool
    reason: str
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """What the rules need to know of a machine. Versions are None where nothing is installed."""

    device_type: str
    capability: tuple[int, int] | None = None
    """CUDA compute capability of the device, None off CUDA."""
    fla: str | None = None
    triton: str | None = None
    tilelang: str | None = None
    flash_qla: str | None = None
    nvcc: bool = False
    """A CUDA compiler that tilelang can call: without one FLA does not use tilelang."""
    fla_switches: tuple[str, ...] = ()
    """FLA's own environment switches that are set to turn something off."""


@dataclass(frozen=True)
class Workload:
    """What kernels are asked to compute: the dtype of q, k and v, and the head dims."""

    dtype: torch.dtype
    key_head_dim: int = 128
    value_head_dim: int = 128


def gather_facts(device: torch.device) -> KernelFacts:
    """The facts of this process and device. Imports fla only for a CUDA device."""
    on_cuda = device.type == "cuda" and torch.cuda.is_available()
    fla = _version_of("fla", "fla-core", "flash-linear-attention")
    return KernelFacts(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if on_cuda else None,
        fla=fla,
        triton=_version_of("triton", "triton", "pytorch-triton"),
        tilelang=_version_of("tilelang", "tilelang"),
        flash_qla=_version_of("flash_qla", "flash-qla"),
        nvcc=_fla_finds_nvcc() if on_cuda and fla else False,
        fla_switches=_fla_switches_off(),
    )


def _version_of(module: str, *distributions: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    # Put on sys.path without its metadata, as on machines that reach no package index.
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


def _fla_finds_nvcc() -> bool:
    try:
        from fla.utils import has_usable_nvcc
    except ImportError:
        return False
    return bool(has_usable_nvcc())


def _fla_switches_off() -> tuple[str, ...]:
    off = {"FLA_TILELANG": "0", "FLA_FLASH_QLA": "0", "FLA_DISABLE_BACKEND_DISPATCH": "1"}
    return tuple(f"{name}={value}" for name, value in off.items() if os.environ.get(name) == value)
