"""Losses and times in megatron's log line: means over the iterations since the line before.

Depends on megatron-core 0.19: it prints a line after the first iteration of a process, started or
resumed, and keeps that iteration in the sums for the next line. Where the first iteration ends an
interval itself (always with ``--log-interval 1``), the next line then repeats it: the second loss
is the mean of two, and the second time contains the compilation in the first step.
"""

from __future__ import annotations

from typing import Any

from megatron.training import get_args, training


def install() -> None:
    """Patch ``megatron.training.training``; does nothing when called again."""
    original = training.training_log
    if hasattr(original, "starts_anew"):
        return

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

    training_log.starts_anew = True  # type: ignore[attr-defined]
    training.training_log = training_log
