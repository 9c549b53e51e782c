"""Losses and times in megatron's log line: means over the iterations since the line before, and in
each of them over all tokens that count.

Depends on megatron-core 0.19. It prints a line after the first iteration of a process, started or
resumed, and keeps that iteration in the sums for the next line. Where the first iteration ends an
interval itself (always with ``--log-interval 1``), the next line then repeats it: the second loss
is the mean of two, and the second time contains the compilation in the first step.

It logs the mean over ranks and microbatches of their mean MTP losses, whatever number of tokens
each counted, so that the number depends on the parallel layout.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training import get_args, training


def install() -> None:
    """Patch megatron's log; does nothing when called again."""
    if hasattr(training.training_log, "starts_anew"):
        return
    _start_anew()
    weigh_mtp_by_tokens()


def _start_anew() -> None:
    original = training.training_log

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


def weigh_mtp_by_tokens() -> None:
    """Make the logged MTP loss the sum over all counted positions of a step, over their number."""
    helper: Any = MTPLossLoggingHelper
    save, reduce, track = (
        helper.save_metrics_to_tracker,
        helper.reduce_metrics_in_tracker,
        helper.track_mtp_metrics,
    )
    if hasattr(track, "by_tokens"):
        return

    def save_metrics_to_tracker(
        loss: torch.Tensor, correct: torch.Tensor, total: torch.Tensor, *rest: Any, **more: Any
    ) -> None:
        save(loss * total, correct, total, *rest, **more)

    def reduce_metrics_in_tracker() -> None:
        reduce()
        tracker = helper.tracker
        if "loss_values" in tracker:
            group = tracker.get("avg_group")
            ranks = 1 if group is None else group.size()
            # megatron adds up counts over the ranks, and takes the mean of losses
            tracker["loss_values"] *= ranks / tracker["total_values"].clamp(min=1)

    def track_mtp_metrics(loss_scale: float, *rest: Any, **more: Any) -> None:
        track(1.0, *rest, **more)

    track_mtp_metrics.by_tokens = True  # type: ignore[attr-defined]
    helper.save_metrics_to_tracker = staticmethod(save_metrics_to_tracker)
    helper.reduce_metrics_in_tracker = staticmethod(reduce_metrics_in_tracker)
    helper.track_mtp_metrics = staticmethod(track_mtp_metrics)
