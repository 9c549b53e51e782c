"""What follows from the grids of images alone: coordinates, learned positions, sequences.

Shapes: n patches of all images together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import DataError

Grid = tuple[int, int, int]
Grids = Tensor | Sequence[Sequence[int]] | None
"""Grids as transformers' processors give them, ``[images, 3]`` int64; None: no image."""


def read_grids(grid_thw: Grids, vision: VisionConfig) -> list[Grid]:
    """Grids as plain numbers.

    Raises:
        DataError: a grid is empty, or the merger's blocks do not divide it.
    """
    if grid_thw is None:
        return []
    rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    grids = [(int(t), int(h), int(w)) for t, h, w in rows]
    merge = vision.spatial_merge_size
    for grid in grids:
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise DataError(
                "an image's grid cannot be merged",
                got=f"{grid} frames, rows and columns of patches",
                allowed=f"positive numbers, rows and columns multiples of {merge}",
                fix=f"resize images to multiples of {merge * vision.patch_size} pixels",
            )
    return grids


def merged_tokens(grids: Sequence[Grid], vision: VisionConfig) -> int:
    """Outputs of the merger, which is as many tokens of text."""
    return sum(t * h * w for t, h, w in grids) // vision.spatial_merge_size**2


def frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches of every frame: a patch attends to those of its own frame."""
    return [h * w for t, h, w in grids for _ in range(t)]


def patch_coordinates(grids: Sequence[Grid], vision: VisionConfig) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in its frame, ``[n]`` int64."""
    m = vision.spatial_merge_size
    rows, columns = [], []
    for t, h, w in grids:
        blocks = (t, h // m, w // m, m, m)
        rows.append(torch.arange(h).view(h // m, 1, m, 1).expand(blocks).flatten())
        columns.append(torch.arange(w).view(1, w // m, 1, m).expand(blocks).flatten())
    return torch.cat(rows), torch.cat(columns)


def position_taps(grids: Sequence[Grid], vision: VisionConfig) -> tuple[Tensor, Tensor]:
    """Which learned positions a patch has, ``[n, 4]`` int64, and their weights, float32.

    The grid of learned positions is stretched over every frame, corner on corner, and read
    bilinearly: transformers' ``get_vision_interpolation_indices_and_weights``.
    """
    rows, columns = patch_coordinates(grids, vision)
    counts = torch.tensor([t * h * w for t, h, w in grids])
    heights, widths = (
        torch.tensor([grid[axis] for grid in grids]).repeat_interleave(counts) for axis in (1, 2)
    )
    side = vision.positions_per_side
    row_taps, row_weights = _axis_taps(rows, heights, side)
    column_taps, column_weights = _axis_taps(columns, widths, side)
    indices = row_taps[:, :, None] * side + column_taps[:, None, :]
    weights = row_weights[:, :, None] * column_weights[:, None, :]
    return indices.flatten(1), weights.flatten(1)


def _axis_taps(index: Tensor, length: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The two neighbours among ``side`` of each position on an axis of ``length``, and weights."""
    place = index.float() * (side - 1) / (length - 1).clamp(min=1)
    floor = place.floor()
    offsets = torch.arange(2)
    taps = (floor.long()[:, None] + offsets).clamp(max=side - 1)
    weights = 1 - (place[:, None] - floor[:, None] - offsets).abs()
    return taps, weights


def rotary_angles(grids: Sequence[Grid], vision: VisionConfig) -> Tensor:
    """The angles of every patch and channel of a head, ``[n, 1, 1, head_dim]`` float32.

    A quarter of the channels turns with the row, a quarter with the column, and so again in the
    second half, with which the first is rotated.
    """
    half = vision.head_dim // 2
    frequencies = 1.0 / (vision.rope_theta ** (torch.arange(0, half, 2).float() / half))
    coordinates = patch_coordinates(grids, vision)
    angles = torch.cat([axis[:, None].float() * frequencies for axis in coordinates], dim=-1)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]
