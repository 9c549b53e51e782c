"""megatron-core's multi-token-prediction layer: its padding mask, and what it recomputes."""

from __future__ import annotations

import copy
from typing import Any

import torch

from qwen35_mcore.mcore.imports import MultiTokenPredictionLayer


class MTPLayer(MultiTokenPredictionLayer):
    """megatron's MTP layer with two corrections.

    A position is padding for MTP where it is padding for the decoder.

    megatron moves the padding mask one position to the left, together with the tokens. A document's
    last token then counts as padding, and the last position of its padding as a token. Under
    sequence parallelism the shapes do not fit either: the mask is a part of the sequence and the
    tokens are all of it.

    In a HybridModel this layer holds a stack. Its balancing loss is logged as MTP's; megatron takes
    it for that of the decoder's first layer. The stack is not recomputed by itself, because this
    layer recomputes all that is in it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.mtp_layer_pattern is None:
            return
        stack = self.mtp_model_layer
        stack.config = copy.copy(stack.config)
        stack.config.recompute_granularity = None
        for half in stack.layers:
            if half.is_moe_layer:
                half.is_mtp_layer = half.mlp.is_mtp_layer = half.mlp.router.is_mtp_layer = True

    def _get_embeddings(
        self, *args: Any, padding_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        input_ids, position_ids, _, decoder_input, hidden_states = super()._get_embeddings(
            *args, padding_mask=None, **kwargs
        )
        return input_ids, position_ids, padding_mask, decoder_input, hidden_states
