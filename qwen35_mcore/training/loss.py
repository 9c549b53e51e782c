"""What training minimises, and the check that stops a run at a loss of NaN or infinity."""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.mcore.imports import get_args, get_rerun_state_machine
from qwen35_mcore.mcore.non_finite import non_finite

MESSAGE = "found NaN or infinity in local forward loss"


def loss_function(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
    """What megatron minimises: the sum of the losses that the mask counts.

    Args:
        loss_mask: ``[b, s / cp]`` float, 1 where a token counts.
        output: ``[b, s / cp]`` float, the model's loss of each token.

    Returns:
        The sum, float32; the number of tokens, int32, by which megatron divides the sums of all
        microbatches and ranks; and what its log line shows: by name, ``[sum, tokens]``.

    Raises:
        NonFiniteError: the sum is NaN or infinite, where `nan_checks` has losses
            looked at: training on a GPU has its gradients looked at, behind the step.
    """
    loss = torch.sum(output.float().view(-1) * loss_mask.view(-1).float())
    args = get_args()
    trains = torch.is_grad_enabled()
    if args.check_for_nan_in_loss_and_grad if trains else args.check_evaluation:
        _check(loss)
    tokens = loss_mask.sum().detach().to(torch.int)
    report = torch.stack([loss.detach(), tokens.to(loss.dtype)])
    return loss, tokens, {"lm loss": report}


def _check(loss: torch.Tensor) -> None:
    """Megatron's machine decides what follows: with --rerun-mode it runs the step again to find out
    why; by default it raises. Waits for the device."""
    try:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=lambda loss: not loss.isfinite(),
            message=MESSAGE,
            fatal=True,
        )
    except RuntimeError:
        raise non_finite(MESSAGE, loss.item()) from None
