"""Snapshots for the doctor: plain data, so machines with GPUs are examined without one."""

from __future__ import annotations

import dataclasses
from typing import Any

from qwen35_mcore.doctor.snapshot import Gpu, Package, Snapshot

H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory_gib=79.1)
HOPPER_KERNELS = {
    "device_type": "cuda",
    "capability": (9, 0),
    "fla": "0.6.0",
    "triton": "3.6.0",
    "tilelang": "0.1.15",
    "flash_qla": "0.1.3",
    "nvcc": True,
    "fla_switches": (),
}
VERSIONS = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "megatron-core": "0.19.2",
    "transformer-engine": "2.20.2",
    "flash-linear-attention": "0.6.0",
    "tilelang": "0.1.15",
    "flash-qla": "0.1.3",
    "transformers": "5.23.0",
    "psutil": "7.2.2",
}
SOUND = Snapshot(
    python="3.12.3",
    packages={name: Package(version=version) for name, version in VERSIONS.items()},
    torch_cuda="13.0",
    nccl="2.28.9",
    driver="580.159.04",
    gpus=(H100,),
    te_cuda_major=13,
    shm_gib=64.0,
    kernels=HOPPER_KERNELS,
)
CPU_KERNELS = {"device_type": "cpu", "fla": "0.6.0", "triton": "3.6.0"}
LAPTOP = dataclasses.replace(
    SOUND,
    packages={name: SOUND.packages[name] for name in ("torch", "megatron-core", "psutil")},
    nccl=None,
    driver=None,
    gpus=(),
    te_cuda_major=None,
    kernels=CPU_KERNELS,
)


def but(machine: Snapshot = SOUND, /, **changes: Any) -> Snapshot:
    return dataclasses.replace(machine, **changes)


def packages(machine: Snapshot = SOUND, /, **changes: Package | None) -> Snapshot:
    """The machine with packages (spelt with underscores) changed, or removed where None."""
    renamed = {name.replace("_", "-"): package for name, package in changes.items()}
    merged = dict(machine.packages) | renamed
    return but(machine, packages={name: p for name, p in merged.items() if p is not None})


def kernels(**changes: Any) -> Snapshot:
    return but(kernels=HOPPER_KERNELS | changes)


BROKEN = Package(version="9.9.9", error="OSError: undefined symbol")
