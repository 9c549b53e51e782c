"""Losses and times in megatron's log line: means over the iterations since the line before.

megatron-core prints a line after the first iteration of a process and keeps that iteration in the
sums for the next line. Where the first iteration ends an interval itself (always with
``--log-interval 1``), the next line contains it again: the second loss is the mean of two, and the
second time contains the compilation in the first step.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron.training import get_args, training

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict


def _starting_anew(original: Any) -> Any:
    def training_log(
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        *rest: Any,
        is_first_iteration: bool = False,
        **more: Any,
    ) -> Any:
        is_first_iteration = is_first_iteration and iteration % get_args().log_interval != 0
        return original(
            loss_dict,
            total_loss_dict,
            learning_rate,
            iteration,
            *rest,
            is_first_iteration=is_first_iteration,
            **more,
        )

    return training_log


def _probe() -> Verdict:
    """The function asks for a whole training run around it, so its text is read."""
    text = inspect.getsource(training.training_log)
    return Verdict.FAULT if "should_reset = not is_first_iteration\n" in text else Verdict.UNKNOWN


PATCH = Patch(
    name="first line of the log",
    target="megatron.training.training:training_log",
    why="with --log-interval 1 the second loss is the mean of two, the second time holds the first "
    "step's compilation",
    replace=_starting_anew,
    probe=_probe,
)
