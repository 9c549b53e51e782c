"""GPUs and the nodes they come in, as data.

Bandwidths of links are what a large NCCL transfer reaches, about 80 % of the nominal NVLink rate
and 90 % of the nominal network rate. One H100 was measured; the rest is from data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

from qwen35_mcore.errors import PlanError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Link:
    """Latency and bandwidth of one GPU's connection, in one direction."""

    alpha_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a node, and how it reaches the others."""

    name: str
    card: str
    """What ``torch.cuda.get_device_name`` prints."""
    bf16_flops: float
    """Dense tensor-core operations a second, as the next."""
    fp8_flops: float
    """0: it has no FP8 tensor cores."""
    memory_bytes: int
    """What the driver reports as total."""
    bytes_per_s: float
    nvlink: Link
    """Between the GPUs of a node, or of a rack that NVLink joins."""
    network: Link
    """Beyond them, for each GPU's own network card."""
    gpus_per_node: int = 8
    nvlink_gpus: int = 8
    """How many GPUs NVLink joins: those of a node, or of a rack."""

    @property
    def has_fp8(self) -> bool:
        return self.fp8_flops > 0

    def in_nodes_of(self, gpus: int) -> Gpu:
        """The same in nodes of so many GPUs; NVLink that leaves nodes joins as many as before."""
        joins_racks = self.nvlink_gpus > self.gpus_per_node
        joined = self.nvlink_gpus if joins_racks else gpus
        return replace(self, gpus_per_node=gpus, nvlink_gpus=joined)

    def peak_flops(self, precision: str) -> float:
        """Peak of a precision name of `choices.PRECISIONS`."""
        return self.bf16_flops if precision == "bf16" else self.fp8_flops


_H100 = Gpu(
    name="h100-80g",
    card="NVIDIA H100 80GB HBM3",
    bf16_flops=989e12,
    fp8_flops=1979e12,
    memory_bytes=81_559 * 2**20,
    bytes_per_s=3.35e12,
    nvlink=Link(alpha_s=8e-6, bytes_per_s=360e9),
    network=Link(alpha_s=18e-6, bytes_per_s=45e9),
)
_H200 = replace(
    _H100, name="h200-141g", card="NVIDIA H200", memory_bytes=143_771 * 2**20, bytes_per_s=4.8e12
)
_B200 = replace(
    _H100,
    name="b200-180g",
    card="NVIDIA B200",
    bf16_flops=2250e12,
    fp8_flops=4500e12,
    memory_bytes=183_359 * 2**20,
    bytes_per_s=8.0e12,
    nvlink=Link(alpha_s=8e-6, bytes_per_s=720e9),
)
_GB200 = replace(
    _B200,
    name="gb200-186g",
    card="NVIDIA GB200",
    bf16_flops=2500e12,
    fp8_flops=5000e12,
    memory_bytes=189_471 * 2**20,
    gpus_per_node=4,
    nvlink_gpus=72,
)
_A100 = replace(
    _H100,
    name="a100-80g",
    card="NVIDIA A100-SXM4-80GB",
    bf16_flops=312e12,
    fp8_flops=0.0,
    memory_bytes=81_251 * 2**20,
    bytes_per_s=2.039e12,
    nvlink=Link(alpha_s=8e-6, bytes_per_s=240e9),
    network=Link(alpha_s=18e-6, bytes_per_s=22.5e9),
)
GPUS = {gpu.name: gpu for gpu in (_H100, _H200, _B200, _GB200, _A100)}
"""Nodes of eight GPUs with NVSwitch and one 400 Gbit/s InfiniBand card for each GPU, 200 Gbit/s for
an A100; of GB200, trays of four in racks of 72 (NVL72)."""


def get_gpu(name: str) -> Gpu:
    """The GPU of a name, upper or lower case, also without its memory size. Raises PlanError with
    the nearest names where there is none."""
    spelling = name.strip().lower().replace("_", "-")
    for key, gpu in GPUS.items():
        if spelling in (key, key.partition("-")[0]):
            return gpu
    near = get_close_matches(spelling, GPUS, n=2, cutoff=0.3)
    fix = f"did you mean {' or '.join(near)}?" if near else "name the nearest of these"
    raise PlanError("there is no such GPU", got=name, allowed=", ".join(GPUS), fix=fix)
