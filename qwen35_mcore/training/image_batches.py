"""A rank's part of a microbatch of conversations, with or without images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.mcore.imports import flatten_batch_for_packed_sequences, mpu
from qwen35_mcore.model.vision.embedding import place_features
from qwen35_mcore.training.packed_documents import batch_on_this_cp_rank

PATCHES = ("pixel_values", "pixel_values_videos")
GRIDS = ("image_grid_thw", "video_grid_thw")
IMAGES = (*PATCHES, *GRIDS)
"""What the vision-language model takes beside the arguments of a text model."""
_ROWS = ("tokens", "labels", "loss_mask", "padding_mask")
_DOCUMENTS = ("cu_seqlens", "max_seqlen")
_KEYS = (*_ROWS, "position_ids", *_DOCUMENTS, *IMAGES)
_DTYPES = {
    "loss_mask": torch.float32,
    "padding_mask": torch.bool,
    **dict.fromkeys(_DOCUMENTS, torch.int32),
    **dict.fromkeys(PATCHES, torch.float32),
}
"""Of all others int64."""
_DIMENSIONS, _ABSENT = 3, -1


def broadcast_batch(given: dict[str, Any] | None, *, patches: bool) -> dict[str, Tensor | None]:
    """The microbatch of tensor-parallel rank 0 on every rank of its group, on its device.

    Sizes differ from microbatch to microbatch, so they travel first.

    Args:
        given: of `ImageLoader`, on rank 0; None on other ranks.
        patches: whether this pipeline stage holds the tower; else patches stay where they are.
    """
    names = [name for name in _KEYS if patches or name not in PATCHES]
    batch: dict[str, Tensor | None] = {name: (given or {}).get(name) for name in names}
    sizes = torch.full((len(names), _DIMENSIONS), _ABSENT, dtype=torch.int64)
    for row, value in zip(sizes, batch.values(), strict=True):
        if value is not None:
            row[: value.dim()] = torch.tensor(value.shape)
    for name, row in zip(names, _from_rank_0(sizes).tolist(), strict=True):
        shape = [size for size in row if size != _ABSENT]
        if shape:
            value = batch[name]
            if value is None:
                value = torch.empty(shape, dtype=_DTYPES.get(name, torch.int64))
            batch[name] = _from_rank_0(value)
    return dict.fromkeys(_KEYS) | batch


def _from_rank_0(value: Tensor) -> Tensor:
    value = value.cuda(non_blocking=True).contiguous()
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            value,
            mpu.get_tensor_model_parallel_src_rank(),
            group=mpu.get_tensor_model_parallel_group(),
        )
    return value


def part_of_this_rank(
    batch: dict[str, Tensor | None], vision: VisionConfig | None, cp_group: Any, **split: Any
) -> dict[str, Tensor | None]:
    """This context-parallel rank's part of a microbatch: of the rows, and of their positions in
    each axis. Images stay whole, and their places are marked before the rows are split.

    Args:
        batch: of `broadcast_batch`.
        vision: the model's tower; None for a text model.
        split: arguments of `batch_on_this_cp_rank`.

    Raises:
        DataError: there are not as many image or video tokens as the grids say.
    """
    images = {name: batch[name] for name in IMAGES}
    images |= {name: grids.cpu() for name in GRIDS if (grids := batch[name]) is not None}
    rows = {name: batch[name] for name in (*_ROWS, *_DOCUMENTS)}
    tokens, positions = batch["tokens"], batch["position_ids"]
    assert tokens is not None
    assert positions is not None
    if vision is not None and cp_group.size() > 1:
        rows["tokens"] = place_features(tokens, vision, *(images[name] for name in GRIDS))
    axes = list(positions) if positions.dim() == 3 else [positions]
    if rows["cu_seqlens"] is not None:
        rows = flatten_batch_for_packed_sequences(rows)
        rows["padding_mask"] = rows["padding_mask"].reshape(1, -1)
        axes = [axis.reshape(1, -1) for axis in axes]
    parts = [
        batch_on_this_cp_rank(rows | {"position_ids": axis}, cp_group, **split) for axis in axes
    ]
    here = torch.stack([part["position_ids"] for part in parts])
    return parts[0] | images | {"position_ids": here if positions.dim() == 3 else here[0]}
