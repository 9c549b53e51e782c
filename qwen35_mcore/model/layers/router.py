"""megatron-core's router, with balancing losses that padding and the number of ranks do not change.

Shapes: t tokens of this rank, e experts.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.mcore.imports import TopKRouter, get_moe_metrics_tracker

GLOBAL_LOSS = "global_load_balancing_loss"


class Router(TopKRouter):
    """megatron's TopKRouter with four corrections.

    Padding: where losses are per token, megatron weighs a rank's balancing loss by the rank's
    number of tokens. With a padding mask it takes the number of all ranks instead, because its sum
    over the ranks is in place. Ranks that share a sequence hold different amounts of padding, so
    this class uses the mean over those ranks.

    Weight of the global loss: a rank's part is a mean over the tokens of all ranks, and gradients
    are then averaged over data parallel ranks as well, so that the coefficient shrinks with their
    number. This class keeps the coefficient that was asked for.

    Log of the global loss: megatron adds up the loss that each forward pass saw, but the first
    passes of a step have seen few tokens. This class logs the loss of all tokens of the step. What
    is trained is megatron's: each pass is balanced by the tokens of all ranks in the step so far.

    Counts of the global loss stay float32: bfloat16 would round them and stop counting passes at
    256.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens: torch.Tensor | None = None  # a rank's without padding, where there is any
        if self.global_tokens_per_expert is None:
            return
        for name in ("global_tokens_per_expert", "ga_steps"):
            counts = self._buffers.pop(name)  # buffers are cast with the module
            self._non_persistent_buffers_set.discard(name)
            setattr(self, name, counts)
        self.global_scores = torch.zeros_like(self.global_tokens_per_expert)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        self._tokens = None
        if padding_mask is not None:
            self._tokens = (~padding_mask).sum().float()
            torch.distributed.all_reduce(self._tokens, group=self.tp_cp_group)
            self._tokens /= self.tp_cp_group.size()
        return super().routing(logits, padding_mask)

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
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        *args: Any,
        valid_token_count: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if aux_loss_name == GLOBAL_LOSS:
            aux_loss = aux_loss * (self.tp_dp_cp_group.size() // self.tp_cp_group.size())
        if self._tokens is not None:
            valid_token_count = self._tokens
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            *args,
            valid_token_count=valid_token_count,
            **kwargs,
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
