"""Log the MTP loss as the mean over all tokens of a step that count, in any parallel layout.

megatron logs the mean over ranks and microbatches of their mean losses, however many tokens each
counted.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _adding_sums(original: Any) -> Any:
    def save_metrics_to_tracker(
        loss: torch.Tensor, correct: torch.Tensor, total: torch.Tensor, *rest: Any, **more: Any
    ) -> None:
        original(loss * total, correct, total, *rest, **more)

    return staticmethod(save_metrics_to_tracker)


def _dividing_by_tokens(original: Any) -> Any:
    def reduce_metrics_in_tracker() -> None:
        original()
        tracker = MTPLossLoggingHelper.tracker
        if "loss_values" in tracker:
            group = tracker.get("avg_group")
            ranks = 1 if group is None else group.size()
            # megatron adds up counts over the ranks, and takes the mean of losses
            tracker["loss_values"] *= ranks / tracker["total_values"].clamp(min=1)

    return staticmethod(reduce_metrics_in_tracker)


def _without_scale(original: Any) -> Any:
    def track_mtp_metrics(loss_scale: float, *rest: Any, **more: Any) -> None:
        original(1.0, *rest, **more)

    return staticmethod(track_mtp_metrics)


def _probe() -> Verdict:
    """Of losses 1 and 3 of one and of three tokens: is their sum 4, or that of all tokens, 10?"""
    helper = MTPLossLoggingHelper
    for value in (1.0, 3.0):
        number = torch.tensor(value, device="cuda")
        helper.save_metrics_to_tracker(number, number, number, 0, 1)
    total = helper.tracker["loss_values"].item()
    helper.tracker.clear()
    return shows(total == 4.0)


PATCHES = tuple(
    Patch(
        name=f"MTP loss by tokens ({name.partition('_')[0]})",
        target=f"megatron.core.transformer.multi_token_prediction:MTPLossLoggingHelper.{name}",
        why="the logged MTP loss depends on the parallel layout where loss masks differ",
        replace=replace,
        probe=_probe,
    )
    for name, replace in (
        ("save_metrics_to_tracker", _adding_sums),
        ("reduce_metrics_in_tracker", _dividing_by_tokens),
        ("track_mtp_metrics", _without_scale),
    )
)
