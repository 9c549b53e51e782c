"""The model on megatron's GPTModel, where a layer is a token mixer and its feed-forward."""

from __future__ import annotations

from typing import Any

from qwen35_mcore.mcore.imports import GPTModel
from qwen35_mcore.mcore.vocabulary_layers import vocabulary_layers
from qwen35_mcore.model.corrections import Corrections
from qwen35_mcore.model.layers.vocabulary import OutputLayer, WordEmbedding


class Qwen35Model(Corrections, GPTModel):
    """megatron's GPTModel, corrected as `Corrections` says."""

    word_embedding: type = WordEmbedding
    """What looks tokens up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with vocabulary_layers(OutputLayer, self.word_embedding):
            super().__init__(*args, **kwargs)
        self._correct_modules(self.rotary_percent, self.rotary_base)

    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._preprocess(*args, **kwargs)
        if self.pre_process:  # megatron has taken this rank's part of the padding mask
            return prepared
        return (*prepared[:5], self._own_part(prepared[5]), *prepared[6:])

    def _postprocess(self, *args: Any, **kwargs: Any) -> Any:
        with self._mtp_weights(kwargs["labels"], kwargs["loss_mask"], kwargs["packed_seq_params"]):
            return super()._postprocess(*args, **kwargs)
