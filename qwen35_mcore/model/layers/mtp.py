"""megatron-core's multi-token-prediction layer, with the router's padding mask left in place."""

from __future__ import annotations

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

    In a HybridModel it holds one layer, as in a GPTModel. megatron builds a stack of two there: no
    CUDA graph takes it, it is recomputed twice, and its balancing loss is logged as that of the
    decoder's first layer.
    """

    def __init__(
        self,
        *args: Any,
        mtp_layer_pattern: str | None = None,
        hybrid_submodules: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)

    def _get_embeddings(
        self, *args: Any, padding_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        input_ids, position_ids, _, decoder_input, hidden_states = super()._get_embeddings(
            *args, padding_mask=None, **kwargs
        )
        return input_ids, position_ids, padding_mask, decoder_input, hidden_states
