"""Gradients of a GatedDeltaNet's kernels against the reference in float64.

Everything between the two projections is checked, as the layer calls it: convolution, delta rule,
norm and gate. Issue 640 of flash-linear-attention gave wrong gradients for months; this finds such
a thing in seconds.

Shapes: s tokens, b batch, c channels of the projection, w taps, h value heads, v value head size.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.shapes import GdnShape
from qwen35_mcore.doctor.gradient_result import GradientCheck, Quantity
from qwen35_mcore.kernels import reference
from qwen35_mcore.kernels.base import DeltaRuleInputs, Kernels
from qwen35_mcore.kernels.facts import Workload
from qwen35_mcore.kernels.registry import select_kernels
from qwen35_mcore.kernels.torch_kernels import TorchKernels

EPS = 1e-6
TAPS = 4
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Relative error by norm. Sound kernels have up to 9e-3 in bfloat16 and 1e-6 in float32."""


@dataclass(frozen=True)
class Case:
    """Sizes of one check."""

    shape: GdnShape
    tokens: int


GPU_CASE = Case(get_flavor("35b-a3b").gdn_shape, 320)
"""A published size: some kernels are compiled for a number of heads, and the result kept."""
CPU_CASE = Case(get_flavor("tiny-dense").gdn_shape.split(2), 160)


class Definition(TorchKernels):
    """The reference with the delta rule token by token, for checking the chunked form itself."""

    def gated_delta_rule(self, inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor | None]:
        """See `Kernels.gated_delta_rule`; q and k are not normalised yet."""
        return reference.recurrent_gated_delta_rule(
            inputs.q_bshk,
            inputs.k_bshk,
            inputs.v_bshv,
            reference.decay_gate(inputs.a_bsh, inputs.A_log, inputs.dt_bias),
            inputs.b_bsh.sigmoid(),
            use_qk_l2norm=True,
        )


def check_gradients() -> GradientCheck:
    """Check the kernels that training would use on this machine, on the current device.

    Raises:
        KernelError: no kernels can run here.
    """
    if torch.cuda.is_available():
        device, dtype, case = torch.device("cuda"), torch.bfloat16, GPU_CASE
        exact: Kernels = TorchKernels("chunked, float64")
    else:
        device, dtype, case = torch.device("cpu"), torch.float32, CPU_CASE
        exact = Definition("recurrence, float64")
    kernels = select_kernels("auto", device, Workload(dtype))
    try:
        with untuned():
            return compare(kernels, exact, case, device, dtype)
    except Exception as error:  # Triton's OutOfResources is no RuntimeError
        if "out of resource" not in str(error):
            raise
    # the first configuration is too large for this GPU: let Triton find one that fits
    return compare(kernels, exact, case, device, dtype)


def compare(
    kernels: Kernels,
    exact: Kernels,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
) -> GradientCheck:
    """Outputs and gradients of ``kernels`` in ``dtype`` against ``exact`` in float64."""
    started = time.monotonic()
    inputs = random_inputs(case, device, dtype)
    got = run(kernels, inputs, case.shape)
    want = run(exact, {name: value.double() for name, value in inputs.items()}, case.shape)
    allowed = ALLOWED[dtype]
    quantities = tuple(
        Quantity(name, relative_error(got[name], want[name]), allowed) for name in want
    )
    seconds = round(time.monotonic() - started, 2)
    name = str(dtype).removeprefix("torch.")
    return GradientCheck(kernels.name, name, seconds, quantities)


def random_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A projection and parameters, with heads that forget at once and heads that hardly do."""
    shape, tokens = case.shape, case.tokens
    generator = torch.Generator().manual_seed(640)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "x_sbc": normal(tokens, 1, shape.in_proj_width).to(device, dtype),
        "conv_cw": normal(shape.conv_width, TAPS, scale=0.5).to(device, dtype),
        "A_log": torch.linspace(-5, 2, shape.value_heads).to(device),
        "dt_bias": normal(shape.value_heads).to(device),
        "norm_v": (1 + normal(shape.value_head_dim, scale=0.2)).to(device),
        "grad_sbc": normal(tokens, 1, shape.value_width).to(device, dtype),
    }


def run(kernels: Kernels, inputs: dict[str, Tensor], shape: GdnShape) -> dict[str, Tensor]:
    """Output, and the gradient of every input by the part of the projection it belongs to."""
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items() if n != "grad_sbc"}
    q, k, v, z, b, a = kernels.prologue(leaves["x_sbc"], leaves["conv_cw"], shape)
    o_bshv, _ = kernels.gated_delta_rule(
        DeltaRuleInputs(
            q_bshk=q,
            k_bshk=k,
            v_bshv=v,
            a_bsh=a,
            b_bsh=b,
            A_log=leaves["A_log"],
            dt_bias=leaves["dt_bias"],
            qk_normalized=kernels.normalizes(shape),
        )
    )
    y_sbc = kernels.epilogue(o_bshv, z, leaves["norm_v"], EPS)
    y_sbc.backward(inputs["grad_sbc"])
    gradients = {name: _gradient(leaf) for name, leaf in leaves.items()}
    sizes = (*shape.qkv_widths, *shape.in_proj_widths[1:])
    parts = gradients.pop("x_sbc").split(sizes, dim=-1)
    by_part = {f"d {n}": p for n, p in zip(("q", "k", "v", "z", "b", "a"), parts, strict=True)}
    names = {"conv_cw": "d conv1d", "norm_v": "d norm", "A_log": "d A_log", "dt_bias": "d dt_bias"}
    return {"output": y_sbc.detach()} | by_part | {names[n]: g for n, g in gradients.items()}


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def relative_error(got: Tensor, want: Tensor) -> float:
    """By norm, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """One launch configuration for every Triton kernel loaded so far: tuning takes minutes.

    What a kernel computes does not depend on it, unless Triton compiles one of them wrongly.
    """
    tuners = {id(tuner): tuner for tuner in _loaded_tuners()}.values()
    saved = [(tuner, tuner.configs) for tuner in tuners]
    for tuner, configs in saved:
        tuner.configs = configs[:1]
    try:
        yield
    finally:
        for tuner, configs in saved:
            tuner.configs = configs


def _loaded_tuners() -> Iterator[Any]:
    """Triton wraps a kernel in tuners and heuristics, each with the next one as ``fn``."""
    ours = [m for n, m in list(sys.modules.items()) if n.split(".")[0] in ("fla", "qwen35_mcore")]
    for module in ours:
        for kernel in list(vars(module).values()):
            while type(kernel).__module__.split(".")[0] in ("fla", "triton"):
                if isinstance(getattr(kernel, "configs", None), list):
                    yield kernel
                kernel = getattr(kernel, "fn", None)
