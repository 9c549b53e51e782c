"""A word embedding that also looks up the tower's outputs.

Ids below zero stand for the tower's outputs, -1 for the first. Whatever moves the ids (MTP's shift
by one, packing) moves the images with them, and MTP's layers embed images as the model does.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from qwen35_mcore.model.vision.grids import Grids, merged_tokens, read_grids


class WordAndImageEmbedding(WordEmbedding):
    """Rows of the vocabulary, and the tower's outputs for ids below zero."""

    features: Tensor | None = None
    """The tower's outputs, ``[features, hidden]``, during a forward pass that has any."""

    received: Iterator[Tensor] | None = None
    """On a stage without the tower: what `images` of the first stage is for the next calls."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``[b, s]`` to ``[b, s, hidden]``, or this rank's part of ``[s, b, hidden]``."""
        if self.features is None and self.received is None:
            return super().forward(ids)
        words = super().forward(ids.clamp(min=0))
        images = self.images(ids) if self.received is None else next(self.received)
        is_image = self._part(ids) < 0
        if not self.reduce_scatter_embeddings:
            is_image, images = is_image.transpose(0, 1), images.transpose(0, 1)  # s b -> b s
        return torch.where(is_image.unsqueeze(-1), images.to(words.dtype), words)

    def images(self, ids: Tensor) -> Tensor:
        """This rank's part of ``[s, b, hidden]``: the tower's outputs where ids ``[b, s]`` are
        below zero, elsewhere anything."""
        here, features = self._part(ids), self.features
        if features is None:
            return self.weight.new_zeros(*here.shape, self.embedding_dim)
        if self.reduce_scatter_embeddings:
            # each rank sees some of the images: its gradients of them are a part of a sum
            features = copy_to_tensor_model_parallel_region(features, group=self.tp_group)
        return F.embedding((-1 - here).clamp(min=0), features)

    def _part(self, ids: Tensor) -> Tensor:
        """This rank's part of ``[s, b]``."""
        by_sequence = ids.transpose(0, 1).contiguous()  # b s -> s b
        if not self.reduce_scatter_embeddings:
            return by_sequence
        return scatter_to_sequence_parallel_region(by_sequence, group=self.tp_group)


def mark_images(tokens: Tensor, vision: VisionConfig) -> Tensor:
    """Tokens ``[...]`` int64 with -1 in place of image and video tokens."""
    is_image = (tokens == vision.image_token_id) | (tokens == vision.video_token_id)
    return tokens.masked_fill(is_image, -1)


def place_features(
    tokens: Tensor,
    vision: VisionConfig,
    image_grid_thw: Grids = None,
    video_grid_thw: Grids = None,
) -> Tensor:
    """Tokens ``[b, s]`` with ids below zero for image and video tokens, in order, row after row.

    Args:
        image_grid_thw, video_grid_thw: grids of all images and of all videos, row after row.

    Raises:
        DataError: there are not as many tokens of a kind as the tower makes outputs.
    """
    first = 0
    for name, token, grid_thw in (
        ("image", vision.image_token_id, image_grid_thw),
        ("video", vision.video_token_id, video_grid_thw),
    ):
        expected = merged_tokens(read_grids(grid_thw, vision), vision)
        place = tokens == token
        order = place.flatten().cumsum(0)
        if (count := int(order[-1])) != expected:
            raise DataError(
                f"the text has other numbers of {name} tokens than the {name}s make",
                got=f"{count} tokens {token}",
                allowed=f"{expected}",
                fix="let transformers' processor make both, and cut no sequence within an image",
            )
        tokens = torch.where(place, -order.view_as(tokens) - first, tokens)
        first += expected
    return tokens
