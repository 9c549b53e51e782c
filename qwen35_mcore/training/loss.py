"""What training minimises, and the check that stops a run before a NaN reaches its weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import get_args


def loss_function(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
    """What megatron minimises: the sum of the losses that the mask counts.

    Args:
        loss_mask: ``[b, s / cp]`` float, 1 where a token counts.
        output: ``[b, s / cp]`` float, the model's loss of each token.

    Returns:
        The sum, float32; the number of tokens, int32, by which megatron divides the sums of all
        microbatches and ranks; and what its log line shows: by name, ``[sum, tokens]``.

    Raises:
        NonFiniteError: the sum is NaN or infinite, unless --no-check-for-nan-in-loss-and-grad.
    """
    loss = torch.sum(output.float().view(-1) * loss_mask.view(-1).float())
    if get_args().check_for_nan_in_loss_and_grad:
        validate = partial(get_rerun_state_machine().validate_result, result=loss, fatal=True)
        validate(rejection_func=torch.isnan, message="found NaN in local forward loss")
        validate(rejection_func=torch.isinf, message="found Inf in local forward loss")
    tokens = loss_mask.sum().detach().to(torch.int)
    report = torch.stack([loss.detach(), tokens.to(loss.dtype)])
    return loss, tokens, {"lm loss": report}
