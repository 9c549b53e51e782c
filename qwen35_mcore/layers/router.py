"""megatron-core's router, with balancing losses that padding and the number of ranks do not change.

Shapes: t tokens of this rank, e experts.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.mcore_compat import TopKRouter, get_moe_metrics_tracker

GLOBAL_LOSS = "global_load_balancing_loss"


class Router(TopKRouter):
    """megatron's TopKRouter with three corrections.

    Padding: where losses are per token, megatron weighs a rank's balancing loss by the tokens of
    this rank. Ranks that share a sequence hold different amounts of padding, so here it is the mean
    over those ranks.

    The global loss in the log: megatron adds up what each forward pass saw, and the first pass of a
    step has seen few tokens, more of them the more data parallel ranks there are. Here it is the
    loss of all tokens of the step. What is trained is megatron's: each pass is balanced by the
    tokens of all ranks in the step so far.

    The global loss's counts stay float32: a model in bfloat16 would round them, and stop counting
    passes at 256.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.global_tokens_per_expert is None:
            return
        for name in ("global_tokens_per_expert", "ga_steps"):
            counts = self._buffers.pop(name)  # buffers are cast with the module
            self._non_persistent_buffers_set.discard(name)
            setattr(self, name, counts)
        self.global_scores = torch.zeros_like(self.global_tokens_per_expert)

    def _apply_global_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        if self.global_tokens_per_expert is not None:
            self.global_scores += scores_for_aux_loss.detach().sum(0)  # t e -> e
        return super()._apply_global_aux_loss(
            probs, scores_for_aux_loss, routing_map, with_padding_mask
        )

    def attach_and_log_load_balancing_loss(
        self,
        *args: Any,
        valid_token_count: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if isinstance(valid_token_count, torch.Tensor):  # not all tokens count
            valid_token_count = valid_token_count.detach().clone()
            torch.distributed.all_reduce(valid_token_count, group=self.tp_cp_group)
            valid_token_count /= self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(
            *args, valid_token_count=valid_token_count, **kwargs
        )

    def reset_global_aux_loss_tracker(self) -> None:
        """Called once a step, after its last backward pass."""
        if self.global_tokens_per_expert is not None:
            self._log_global_loss()
            self.global_scores.zero_()
        super().reset_global_aux_loss_tracker()

    def _log_global_loss(self) -> None:
        """This rank's part of ``e * sum(share of choices * mean probability)`` over the step, times
        the passes that megatron's log divides by."""
        entry = get_moe_metrics_tracker().metrics.get(GLOBAL_LOSS)
        if entry is None:
            return
        choices = self.global_tokens_per_expert.sum().clamp(min=1)
        share = self.global_tokens_per_expert / choices
        probability = self.global_scores * self.topk / choices
        layer = self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0)
        entry.values[layer - 1] = self.num_experts * (share @ probability) * self.ga_steps
