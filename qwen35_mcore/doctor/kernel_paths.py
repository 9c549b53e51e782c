"""Which code computes each part of a model, by the same decisions that training makes.

Everything here asks: `kernels.registry`, `model.spec_providers` and `training.arguments` decide. On
a machine without GPU the questions are asked for a Hopper GPU with the packages installed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.doctor.snapshot import Finding, Level, Snapshot
from qwen35_mcore.errors import KernelError
from qwen35_mcore.kernels.facts import KernelFacts, Workload
from qwen35_mcore.kernels.fla_rules import flash_qla_support
from qwen35_mcore.kernels.registry import choose_kernels
from qwen35_mcore.model.spec_providers import choose_experts
from qwen35_mcore.training.arguments import run_defaults

HOPPER = (9, 0)
FP8_FROM = (8, 9)  # compute capability of the first GPUs with FP8 matrix units
MODEL = get_flavor("35b-a3b")  # every published size has its head dimensions and kinds of layer


@dataclass(frozen=True, kw_only=True)
class KernelPath:
    """What computes one part of the model, and why; ``ok`` is False where nothing can."""

    part: str
    path: str
    why: str
    ok: bool = True


def kernel_facts(machine: Snapshot) -> KernelFacts:
    """What the kernels' own rules judge: this machine."""
    return KernelFacts(**machine.kernels)


def imagined_gpu(machine: Snapshot) -> KernelFacts:
    """The same packages on a Hopper GPU, with a CUDA compiler."""
    return replace(kernel_facts(machine), device_type="cuda", capability=HOPPER, nvcc=True)


def training_paths(machine: Snapshot) -> list[KernelPath]:
    """Of training on this machine, in bfloat16 on a GPU and float32 on a CPU."""
    if machine.on_gpu:
        return _on_gpu(machine, kernel_facts(machine))
    return list(_on_cpu(kernel_facts(machine)))


def imagined_paths(machine: Snapshot) -> list[KernelPath]:
    """Of training on a Hopper GPU with this installation's packages."""
    return _on_gpu(machine, imagined_gpu(machine))


def kernel_findings(machine: Snapshot) -> Iterator[Finding]:
    """What the choice of GDN kernels finds wrong with this machine; nothing without a GPU."""
    if not machine.on_gpu:
        return
    facts = kernel_facts(machine)
    try:
        choose_kernels("auto", facts, Workload(torch.bfloat16))
    except KernelError as error:
        yield Finding(rule="gdn-kernels", level=Level.ERROR, what=error.what, fix=error.fix)
        return
    flash_qla = flash_qla_support(facts, Workload(torch.bfloat16))
    if not flash_qla.ok:
        yield Finding(
            rule="flash-qla",
            level=Level.NOTE,
            what=f"FlashQLA does not take the delta rule: {flash_qla.reason}; FLA's own kernels do",
            fix=flash_qla.fix,
        )


def _on_gpu(machine: Snapshot, facts: KernelFacts) -> list[KernelPath]:
    paths = [_delta_rule(facts, torch.bfloat16), _around_delta_rule()]
    te = machine.packages.get("transformer-engine")
    if te is None or te.error:
        parts = "attention, linears, experts, optimizer"
        why = te.error if te and te.error else "Transformer Engine is not installed"
        return [*paths, KernelPath(part=parts, path="none", why=why, ok=False)]
    return [*paths, *_by_transformer_engine(facts.capability or HOPPER)]


def _by_transformer_engine(capability: tuple[int, int]) -> Iterator[KernelPath]:
    defaults = run_defaults(MODEL, on_cpu=False)
    yield KernelPath(
        part="attention",
        path="Transformer Engine, cuDNN's fused kernel",
        why=f"the only fast one at head dim {MODEL.head_dim}",
    )
    yield KernelPath(
        part="norms and linears",
        path="Transformer Engine, norm and linear in one module",
        why="megatron's --transformer-impl transformer_engine, its default",
    )
    yield _experts("experts, bf16", fp8=None)
    if capability >= FP8_FROM:
        yield _experts("experts, FP8", fp8="hybrid")
    fused = [kind for kind in ("router", "permute") if defaults[f"moe_{kind}_fusion"]]
    yield KernelPath(
        part="routing and permutation",
        path="Transformer Engine's fused kernels" if fused else "plain torch",
        why=f"defaults of this package: {' and '.join(fused) or 'neither'} fused",
    )
    yield KernelPath(
        part="weight gradients",
        path="added to the main gradient by each layer, in the linears inside the matrix product",
        why="megatron's --gradient-accumulation-fusion, its default",
    )
    yield KernelPath(
        part="optimizer",
        path="Transformer Engine's fused Adam",
        why="megatron-core prefers it to apex's and torch's",
    )


def _on_cpu(facts: KernelFacts) -> Iterator[KernelPath]:
    why = "no GPU here"
    impl = run_defaults(MODEL, on_cpu=True)["transformer_impl"]
    yield _delta_rule(facts, torch.float32)
    yield KernelPath(part="attention, norms, linears", path=f"plain torch ({impl})", why=why)
    yield KernelPath(part="experts", path="stacked weights, a loop over experts", why=why)
    yield KernelPath(part="optimizer", path="our Adam in plain torch", why=why)


def _delta_rule(facts: KernelFacts, dtype: torch.dtype) -> KernelPath:
    workload = Workload(dtype)
    try:
        choice = choose_kernels("auto", facts, workload)
    except KernelError as error:
        return KernelPath(part="GDN delta rule", path="none", why=error.what, ok=False)
    path = choice.kernels.delta_rule_by(facts, workload)
    return KernelPath(part="GDN delta rule", path=path, why=choice.reason)


def _around_delta_rule() -> KernelPath:
    part = "GDN convolution, norms, gate"
    try:
        from qwen35_mcore.kernels import fused_triton
    except ImportError as error:
        return KernelPath(part=part, path="none", why=f"Triton: {error}", ok=False)
    shape = MODEL.gdn_shape
    if fused_triton.supports(shape.key_head_dim, shape.value_head_dim):
        why = f"head dims {shape.key_head_dim} and {shape.value_head_dim} fit one program"
        return KernelPath(part=part, path="one Triton kernel before, one behind", why=why)
    return KernelPath(part=part, path="FLA, a kernel each", why="head dims do not fit one program")


def _experts(part: str, fp8: str | None) -> KernelPath:
    run: Any = SimpleNamespace(
        fp8=fp8,
        fp4=None,
        delay_wgrad_compute=False,
        params_dtype=torch.bfloat16,
        transformer_impl="transformer_engine",
        moe_experts="auto",
    )
    name, why = choose_experts(run)
    path = "grouped_mm, one kernel for all of them" if name == "grouped_mm" else "TE grouped linear"
    return KernelPath(part=part, path=path, why=why)
