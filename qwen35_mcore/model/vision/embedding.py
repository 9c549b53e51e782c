"""A word embedding that also looks up the tower's outputs.

Ids below zero stand for the tower's outputs, -1 for the first. Whatever moves the ids (MTP's shift
by one, packing) moves the images with them, and MTP's layers embed images as the model does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import DataError
from qwen35_mcore.mcore.imports import (
    copy_to_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from qwen35_mcore.model.layers.vocabulary import WordEmbedding


class WordAndImageEmbedding(WordEmbedding):
    """Rows of the vocabulary, and rows of ``features`` for ids below zero."""

    features: Tensor | None = None
    """The tower's outputs, ``[features, hidden]``, during a forward pass that has any."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[b, s]`` to ``[b, s, hidden]``, or this rank's part of ``[s, b, hidden]``."""
        features = self.features
        if features is None:
            return super().forward(ids)
        words = super().forward(ids.clamp(min=0))
        if self.reduce_scatter_embeddings:
            by_sequence = ids.transpose(0, 1).contiguous()  # b s -> s b
            ids = scatter_to_sequence_parallel_region(by_sequence, group=self.tp_group)
            # each rank sees some of the images: its gradients of them are a part of a sum
            features = copy_to_tensor_model_parallel_region(features, group=self.tp_group)
        images = F.embedding((-1 - ids).clamp(min=0), features)
        return torch.where((ids < 0).unsqueeze(-1), images.to(words.dtype), words)


def place_features(tokens: Tensor, vision: VisionConfig, images: int, videos: int) -> Tensor:
    """Tokens ``[b, s]`` with ids below zero for image and video tokens, in order, row after row.

    Args:
        images, videos: how many outputs of the tower are of images, and behind them, of videos.

    Raises:
        DataError: there are not as many tokens of a kind as outputs.
    """
    kinds = (("image", vision.image_token_id, images), ("video", vision.video_token_id, videos))
    places = [tokens == token for _, token, _ in kinds]
    counts = torch.stack([place.sum() for place in places]).tolist()
    for (name, token, expected), count in zip(kinds, counts, strict=True):
        if count != expected:
            raise DataError(
                f"the text has other numbers of {name} tokens than the {name}s make",
                got=f"{count} tokens {token}",
                allowed=f"{expected}",
                fix="let transformers' processor make both, and cut no sequence within an image",
            )
    first = 0
    for place, (_, _, count) in zip(places, kinds, strict=True):
        order = place.flatten().cumsum(0).view_as(tokens)
        tokens = torch.where(place, -order - first, tokens)
        first += count
    return tokens
