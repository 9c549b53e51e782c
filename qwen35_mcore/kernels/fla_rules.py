"""Where flash-linear-attention's kernels train correctly, as rules over `KernelFacts`."""

from __future__ import annotations

import torch

from qwen35_mcore.kernels.facts import KernelFacts, Support, Workload
from qwen35_mcore.versions import release

FLA_MINIMUM = (0, 6)
FLA_MAX_HEAD_DIM = 256
FLASH_QLA_HEAD_DIM = 128
AMPERE = (8, 0)
HOPPER_MAJOR = 9
FLASH_QLA_MAJORS = (9, 10)
# fla-org/flash-linear-attention issue 640: wrong gradients of the gated backward, first and
# last Triton release that has them.
BAD_TRITON_FROM, BAD_TRITON_BEFORE = (3, 4, 0), (3, 7, 1)


_16_BIT = (torch.bfloat16, torch.float16)


def fla_support(facts: KernelFacts, workload: Workload) -> Support:
    """Whether FLA's kernels train correctly on this machine with this workload."""
    if facts.device_type != "cuda" or facts.capability is None:
        reason = f"FLA's kernels need a CUDA device, this one is {facts.device_type}"
        return Support(False, reason, "run on a CUDA device, or pass --gdn-kernel torch")
    if facts.capability < AMPERE:
        got = ".".join(map(str, facts.capability))
        return Support(
            False, f"needs compute capability 8.0 or newer, got {got}", "pass --gdn-kernel torch"
        )
    if facts.fla is None:
        return Support(False, "flash-linear-attention is not installed", _install_fla())
    if release(facts.fla) < FLA_MINIMUM:
        reason = f"grouped value heads and in-kernel gates need FLA 0.6, got {facts.fla}"
        return Support(False, reason, _install_fla())
    if workload.dtype not in _16_BIT:
        reason = f"FLA's matrix products are 16-bit or TF32, which {workload.dtype} is not"
        return Support(False, reason, "train in bfloat16, or pass --gdn-kernel torch")
    dims = workload.key_head_dim, workload.value_head_dim
    if max(dims) > FLA_MAX_HEAD_DIM or any(dim % 2 for dim in dims):
        reason = f"head dims must be even and at most {FLA_MAX_HEAD_DIM}, got {_pair(dims)}"
        return Support(False, reason, "pass --gdn-kernel torch")
    return _fla_backward_support(facts)


def _fla_backward_support(facts: KernelFacts) -> Support:
    """FLA on Hopper computes wrong gradients with some Triton releases, unless tilelang does it."""
    versions = f"FLA {facts.fla}, Triton {facts.triton}"
    on_hopper = facts.capability is not None and facts.capability[0] == HOPPER_MAJOR
    if not on_hopper or not _triton_is_bad(facts.triton):
        return Support(True, versions)
    tilelang = tilelang_support(facts)
    if tilelang.ok:
        return Support(True, f"{versions}, the backward by {tilelang.reason}")
    return Support(
        False,
        f"the gated backward is wrong on Hopper with Triton {facts.triton} (3.4.0 to 3.7.0, FLA "
        f"issue 640), and tilelang cannot replace it: {tilelang.reason}",
        f"{tilelang.fix}, or use a torch that brings Triton 3.7.1 or newer",
    )


def tilelang_support(facts: KernelFacts) -> Support:
    """Whether FLA can use tilelang's kernels."""
    if facts.tilelang is None:
        return Support(False, "it is not installed", "pip install tilelang")
    if not facts.nvcc:
        return Support(False, "FLA finds no nvcc", "install a CUDA toolkit or nvidia-cuda-nvcc")
    return _switched_off(facts, "FLA_TILELANG") or Support(True, f"tilelang {facts.tilelang}")


def flash_qla_support(facts: KernelFacts, workload: Workload) -> Support:
    """Whether FLA hands the delta rule to FlashQLA, given that FLA itself can run."""
    if facts.flash_qla is None:
        return Support(False, "it is not installed", "pip install flash-qla")
    if off := _switched_off(facts, "FLA_FLASH_QLA"):
        return off
    if facts.capability is None or facts.capability[0] not in FLASH_QLA_MAJORS:
        return Support(False, f"it needs compute capability 9 or 10, got {facts.capability}")
    if facts.tilelang is None or not facts.nvcc:
        return Support(False, "it needs tilelang and nvcc", "pip install tilelang nvidia-cuda-nvcc")
    if workload.dtype not in _16_BIT:
        return Support(False, f"it needs a 16-bit dtype, got {workload.dtype}")
    dims = workload.key_head_dim, workload.value_head_dim
    if set(dims) != {FLASH_QLA_HEAD_DIM}:
        return Support(False, f"it needs head dims of {FLASH_QLA_HEAD_DIM}, got {_pair(dims)}")
    return Support(True, f"version {facts.flash_qla}")


def _pair(dims: tuple[int, int]) -> str:
    return f"{dims[0]} and {dims[1]}"


def _install_fla() -> str:
    return 'pip install "flash-linear-attention>=0.6,<0.7"'


def _triton_is_bad(version: str | None) -> bool:
    return version is not None and BAD_TRITON_FROM <= release(version) < BAD_TRITON_BEFORE


def _switched_off(facts: KernelFacts, name: str) -> Support | None:
    for switch in facts.fla_switches:
        variable = switch.partition("=")[0]
        if variable in (name, "FLA_DISABLE_BACKEND_DISPATCH"):
            return Support(False, f"it is turned off by {switch}", f"unset {variable}")
    return None
