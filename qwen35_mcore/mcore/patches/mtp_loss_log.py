"""Log the MTP loss as the mean over all tokens of a step that count, in any parallel layout.

megatron logs the mean over ranks and microbatches of their mean losses, however many tokens each
counted. And with each line it forgets over which ranks: the next forward pass notes them again, but
no replay of a CUDA graph does.
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


def _keeping_groups(original: Any) -> Any:
    def clean_metrics_in_tracker() -> None:
        tracker = MTPLossLoggingHelper.tracker
        groups = {name: tracker.get(name) for name in ("reduce_group", "avg_group")}
        original()
        tracker.update(groups)

    return staticmethod(clean_metrics_in_tracker)


def _probe() -> Verdict:
    """Of losses 1 and 3 of one and of three tokens: is their sum 4, or that of all tokens, 10?"""
    helper = MTPLossLoggingHelper
    for value in (1.0, 3.0):
        number = torch.tensor(value, device="cuda")
        helper.save_metrics_to_tracker(number, number, number, 0, 1)
    total = helper.tracker["loss_values"].item()
    helper.tracker.clear()
    return shows(total == 4.0)


def _probe_groups() -> Verdict:
    helper, one = MTPLossLoggingHelper, torch.ones((), device="cuda")
    helper.save_metrics_to_tracker(one, one, one, 0, 1, avg_group="these ranks")
    helper.clean_metrics_in_tracker()
    kept = helper.tracker["avg_group"]
    helper.tracker.clear()
    return shows(kept is None)


_HELPER = "megatron.core.transformer.multi_token_prediction:MTPLossLoggingHelper"
PATCHES = (
    *(
        Patch(
            name=f"MTP loss by tokens ({name.partition('_')[0]})",
            target=f"{_HELPER}.{name}",
            why="the logged MTP loss depends on the parallel layout where loss masks differ",
            replace=replace,
            probe=_probe,
        )
        for name, replace in (
            ("save_metrics_to_tracker", _adding_sums),
            ("reduce_metrics_in_tracker", _dividing_by_tokens),
            ("track_mtp_metrics", _without_scale),
        )
    ),
    Patch(
        name="MTP loss of a replayed step",
        target=f"{_HELPER}.clean_metrics_in_tracker",
        why="with one CUDA graph of the step the logged MTP loss is that of one rank",
        replace=_keeping_groups,
        probe=_probe_groups,
    ),
)
