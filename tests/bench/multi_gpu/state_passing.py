"""Context parallelism of the delta rule on two ranks, in two ways, against one rank.

All-to-all: ranks exchange the sequence for heads, and each works on the whole sequence. State
passing: each works on its part of the sequence and hands the recurrent state on. The model's layer
has the first; the second exists as far as the kernels (`ops.fla`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from qwen35_mcore.layers.core_attention import zigzag_positions
from qwen35_mcore.mcore_compat import gather_heads, scatter_heads
from qwen35_mcore.ops.dispatch import select_backend
from qwen35_mcore.ops.fla import zigzag_cp_context

WAYS = ("all-to-all", "state passing")
TAPS = 4


@dataclass(frozen=True)
class Sizes:
    """Heads of a delta rule; ``head`` is the size of each."""

    key_heads: int
    value_heads: int
    head: int
    tokens: int

    @property
    def channels(self) -> tuple[int, int, int]:
        """Of q, k and v."""
        key = self.key_heads * self.head
        return key, key, self.value_heads * self.head


@dataclass
class Inputs:
    """Raw projections and weights: x ``[1, s, q | k | v]``, a and b ``[1, s, value heads]``."""

    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    conv: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor

    def leaves(self) -> Inputs:
        """Copies that collect gradients."""
        return Inputs(**{k: v.detach().clone().requires_grad_() for k, v in vars(self).items()})

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, tensor in vars(self).items():
            assert tensor.grad is not None, name
            found[name] = tensor.grad
        return found


ALONG_SEQUENCE = ("x", "a", "b")


def random_inputs(sizes: Sizes, dtype: torch.dtype, device: Any) -> Inputs:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads, channels = sizes.value_heads, sum(sizes.channels)
    return Inputs(
        x=draw(1, sizes.tokens, channels),
        a=draw(1, sizes.tokens, heads),
        b=draw(1, sizes.tokens, heads),
        conv=draw(channels, TAPS) / 2,
        A_log=draw(heads, dtype=torch.float32).abs().log1p(),
        dt_bias=draw(heads, dtype=torch.float32),
    )


def mix(kernel: Any, i: Inputs, sizes: Sizes, share: int = 1, context: Any = None) -> torch.Tensor:
    """Convolution and delta rule, ``[1, s, value heads / share, head]``."""
    y = kernel.causal_conv1d(i.x, i.conv, cp_context=context)
    parts = y.split([n // share for n in sizes.channels], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, sizes.head)) for part in parts)
    return kernel.gated_delta_rule(q, k, v, i.a, i.b, i.A_log, i.dt_bias, cp_context=context)[0]


def by_state_passing(kernel: Any, local: Inputs, sizes: Sizes, group: Any) -> torch.Tensor:
    context = zigzag_cp_context(sizes.tokens, group, TAPS, local.x.device)
    return mix(kernel, local, sizes, context=context)


def by_all_to_all(kernel: Any, local: Inputs, sizes: Sizes, group: Any) -> torch.Tensor:
    """Heads of this rank over the whole sequence, and back."""
    ranks, rank = group.size(), group.rank()
    sections = (*sizes.channels, sizes.value_heads, sizes.value_heads)
    everything = torch.cat([local.x, local.a, local.b], dim=-1).transpose(0, 1)
    mine, _ = gather_heads(everything, sections, group, None, sizes.tokens)
    x, a, b = mine.transpose(0, 1).split(
        [sum(sizes.channels) // ranks, *[sizes.value_heads // ranks] * 2], dim=-1
    )

    def own(weight: torch.Tensor) -> torch.Tensor:
        return weight.chunk(ranks)[rank]

    conv = torch.cat([own(part) for part in local.conv.split(sizes.channels)])
    heads = Inputs(x.contiguous(), a, b, conv, own(local.A_log), own(local.dt_bias))
    out_sbc = mix(kernel, heads, sizes, share=ranks).flatten(2).transpose(0, 1)
    back = scatter_heads(out_sbc.contiguous(), group, None).transpose(0, 1)
    return back.unflatten(-1, (-1, sizes.head))


def errors(way: str, sizes: Sizes, dtype: torch.dtype, wrong: float = 1.0) -> dict[str, float]:
    """Relative errors, on this rank, of output and gradients against the whole sequence.

    Args:
        wrong: a factor on the gradient that arrives at the last rank's output; other than 1 it
            shows that the comparison notices.
    """
    group, device = dist.group.WORLD, torch.cuda.current_device()
    assert group is not None
    kernel = select_backend(
        "auto", device=torch.device(device), dtype=dtype, key_dim=sizes.head, value_dim=sizes.head
    )
    positions = zigzag_positions(sizes.tokens, group.size())[group.rank()].to(device)
    inputs = random_inputs(sizes, dtype, device)
    whole = inputs.leaves()
    expected = mix(kernel, whole, sizes)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6))
    gradient = gradient.to(device, dtype)
    expected.backward(gradient)

    def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, positions] if name in ALONG_SEQUENCE else tensor

    local = Inputs(**{name: part(name, t) for name, t in vars(inputs).items()}).leaves()
    run = by_state_passing if way == "state passing" else by_all_to_all
    output = run(kernel, local, sizes, group)
    last = group.rank() == group.size() - 1
    output.backward(gradient[:, positions] * (wrong if last else 1.0))
    found = {"output": relative(output, expected[:, positions])}
    for name, value in local.gradients().items():
        if name not in ALONG_SEQUENCE:
            dist.all_reduce(value, group=group)
        found[name] = relative(value, part(name, whole.gradients()[name]))
    return found


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.float() - expected.float()).norm() / expected.float().norm())
