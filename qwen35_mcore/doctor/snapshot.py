"""What the rules know of a machine, and what they say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

PACKAGES = {
    # name in reports: (module to look for, distributions that bring it)
    "torch": ("torch", ("torch",)),
    "triton": ("triton", ("triton", "pytorch-triton")),
    "megatron-core": ("megatron.core", ("megatron-core",)),
    "transformer-engine": (
        "transformer_engine",
        ("transformer-engine", "transformer-engine-cu13", "transformer-engine-cu12"),
    ),
    "flash-linear-attention": ("fla", ("fla-core", "flash-linear-attention")),
    "tilelang": ("tilelang", ("tilelang",)),
    "flash-qla": ("flash_qla", ("flash-qla",)),
    "apex": ("apex", ("apex",)),
    "transformers": ("transformers", ("transformers",)),
    "psutil": ("psutil", ("psutil",)),
}


class Level(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """Training would not start, or would be wrong or slow without a message."""
    WARNING = "warning"
    """May go wrong; nobody has tested it."""
    NOTE = "note"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule found: the problem, and how to fix it."""

    rule: str
    level: Level
    what: str
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package. ``error`` says why it does not import, None where it does."""

    version: str
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device that torch sees."""

    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A machine as training would find it. Everything here is plain data."""

    python: str
    packages: Mapping[str, Package]
    """By the names of `PACKAGES`; what is not installed is absent."""
    torch_cuda: str | None = None
    """CUDA version that torch was built for, None for a CPU build."""
    nccl: str | None = None
    driver: str | None = None
    """Version of the NVIDIA kernel driver; a machine that has one has GPUs."""
    gpus: tuple[Gpu, ...] = ()
    cuda_error: str | None = None
    """Why torch reaches no device although the driver is there."""
    te_cuda_major: int | None = None
    """CUDA version that Transformer Engine's wheel was built for."""
    apex_is_nvidia: bool | None = None
    """None without a package of that name."""
    data_helpers: bool = True
    """megatron-core's compiled dataset helpers are there."""
    shm_gib: float | None = None
    """Size of /dev/shm, through which data loaders and NCCL pass memory."""
    kernels: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `kernels.facts.KernelFacts`; empty where torch or FLA is broken."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The variables of this process that any rule reads."""

    @property
    def on_gpu(self) -> bool:
        """Whether training would run on a GPU here."""
        return bool(self.gpus)

    def works(self, package: str) -> bool:
        """Whether a package is installed and imports."""
        return package in self.packages and self.packages[package].error is None
