"""Notice NaN behind a step on a GPU.

Depends on megatron-core 0.19: its checks wait for the device inside the step, once for each loss
and each bucket of gradients, and with ``--cuda-graph-impl full_iteration`` it insists on
``--no-check-for-nan-in-loss-and-grad``. The norm of all gradients is on the host behind every step,
since megatron takes its maximum over the model's ranks there; nothing waits for it a second time. A
loss that is NaN or infinite makes it so. By then the weights in memory are lost, but no later step
and no checkpoint follows.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from megatron.training import arguments, get_args

from qwen35_mcore.mcore.non_finite import non_finite
from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict

GRADIENT_NORM = 5
"""Its place in what megatron's train_step returns."""


def _checked(original: Any) -> Any:
    def train_step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        norm = result[GRADIENT_NORM]
        checked = get_args().check_behind_step and norm is not None
        if checked and not math.isfinite(norm):
            raise non_finite("the norm of all gradients is not finite", norm)
        return result

    return train_step


def _probe() -> Verdict:
    """The check wants every argument of a run, so its text is read."""
    text = inspect.getsource(arguments.validate_args)
    insists = "assert not args.check_for_nan_in_loss_and_grad" in text
    return Verdict.FAULT if insists else Verdict.UNKNOWN


PATCH = Patch(
    name="check behind a step",
    target="megatron.training.training:train_step",
    why="megatron's checks for NaN wait for the device inside the step, and one CUDA graph of the "
    "step allows none",
    replace=_checked,
    probe=_probe,
)
