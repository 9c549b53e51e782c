"""Weight gradients that a layer adds to megatron's main gradient by itself.

Megatron's DDP keeps the sum over microbatches in ``weight.main_grad`` and adds ``weight.grad`` to
it in a hook behind autograd. A layer that adds its gradient in its backward pass says so to the
hook, and gives autograd a placeholder of the weight's size: the hook has to run where gradients are
computed, and autograd runs it elsewhere when it gets none.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor


def takes_gradient(weight: Any) -> bool:
    """Whether megatron's DDP holds a main gradient for this weight."""
    return weight.requires_grad and getattr(weight, "main_grad", None) is not None


def mark_added(weight: Any) -> Tensor | None:
    """Tell DDP's hook that ``weight.main_grad`` has the gradient of this use of the weight.

    Returns:
        What the backward pass of the use returns for the weight: for the first use in a pass a
        placeholder without content (zeros where the hook adds it all the same, as to a weight that
        two layers share), and None for the others, which autograd would add to it.
    """
    weight.grad_added_to_main_grad = True
    if not hasattr(weight, "_placeholder_given"):
        weight.register_post_accumulate_grad_hook(_end_pass)
    elif weight._placeholder_given:
        return None
    weight._placeholder_given = True
    zeros = getattr(weight, "zero_out_wgrad", False)
    # a view of its own: autograd takes over what nobody else holds, and copies the rest
    return _placeholder(tuple(weight.shape), weight.dtype, weight.device, zeros).detach()


def _end_pass(weight: Any) -> None:
    weight._placeholder_given = False


@functools.cache
def _placeholder(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zeros: bool
) -> Tensor:
    if device.type == "cuda" and importlib.util.find_spec("transformer_engine"):
        from transformer_engine.pytorch.module.base import get_dummy_wgrad

        return get_dummy_wgrad(list(shape), dtype, zero=zeros)  # its own layers have the same
    return (torch.zeros if zeros else torch.empty)(shape, dtype=dtype, device=device)
