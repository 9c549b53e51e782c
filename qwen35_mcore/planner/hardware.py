"""GPUs and the nodes they come in, as `gpus.json` lists them.

Bandwidths of links are what a large NCCL transfer reaches, about 80 % of the nominal NVLink rate
and 90 % of the nominal network rate. One H100 was measured; the rest is from data sheets. Nodes
have eight GPUs with NVSwitch and a 400 Gbit/s InfiniBand card for each GPU, 200 Gbit/s for an A100;
GB200 comes in trays of four in racks of 72 (NVL72).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from qwen35_mcore.errors import PlanError

GIB = 2**30
PRECISIONS = ("bf16", "fp8-blockwise", "fp8-tensorwise")


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
    nvlink_bytes_per_s: float
    """One direction, as the next: between the GPUs of a node, or of a rack that NVLink joins."""
    network_bytes_per_s: float
    """Beyond them, of each GPU's own network card."""
    gpus_per_node: int = 8
    nvlink_gpus: int = 8
    """How many GPUs NVLink joins: those of a node, or of a rack."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those of `PRECISIONS` that it has."""
        return PRECISIONS if self.fp8_flops else PRECISIONS[:1]

    def in_nodes_of(self, gpus: int) -> Gpu:
        """The same in nodes of so many GPUs; NVLink that leaves nodes joins as many as before."""
        joined = self.nvlink_gpus if self.nvlink_gpus > self.gpus_per_node else gpus
        return replace(self, gpus_per_node=gpus, nvlink_gpus=joined)

    def peak_flops(self, precision: str) -> float:
        return self.bf16_flops if precision == "bf16" else self.fp8_flops


_TABLE = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))
GPUS = {name: Gpu(name=name, **fields) for name, fields in _TABLE.items()}


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
