"""Positions of text and images in three axes (time, height, width), and the angles they give.

megatron's MultimodalRotaryEmbedding gives each axis one run of neighbouring frequencies and knows
no YaRN; Qwen3.5's axes alternate from frequency to frequency.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import DataError
from qwen35_mcore.model.vision.grids import Grid, Grids, read_grids


def rope_index(
    tokens: Tensor,
    vision: VisionConfig,
    image_grid_thw: Grids = None,
    video_grid_thw: Grids = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """transformers' ``get_rope_index``: positions ``[3, b, s]`` int64 of tokens ``[b, s]``.

    A text token counts one position on in all axes. An image stays where it begins in time, its
    rows and columns count height and width, and text goes on behind the longer of the two. Every
    frame of a video is an image of its own: timestamps are written between them.

    Args:
        image_grid_thw, video_grid_thw: grids of all images and of all videos, row after row.
        attention_mask: ``[b, s]``; positions that are 0 in it are left out, and are 0.
        cu_seqlens: boundaries ``[n + 1]`` of the documents that a row without a mask holds; each of
            them begins at position 0.

    Raises:
        DataError: the image and video tokens are not as many as the grids say.
    """
    videos = read_grids(video_grid_thw, vision)
    grids = {
        vision.image_token_id: iter(read_grids(image_grid_thw, vision)),
        vision.video_token_id: ((1, h, w) for t, h, w in videos for _ in range(t)),
    }
    inner = [] if cu_seqlens is None else cu_seqlens[1:-1].tolist()
    positions = torch.zeros(3, *tokens.shape, dtype=torch.int64)
    for row, row_tokens in enumerate(tokens.cpu()):
        kept = torch.ones_like(row_tokens, dtype=torch.bool)
        if attention_mask is not None:
            kept = attention_mask[row].cpu().bool()
        runs = [
            run
            for document in row_tokens[kept].tensor_split(inner)
            for run in _runs(document.tolist(), grids, vision.spatial_merge_size)
        ]
        if runs:
            positions[:, row, kept] = torch.cat(runs, dim=1)
    if left := sum(1 for iterator in grids.values() for _ in iterator):
        raise _miscounted(f"{left} images or frames of videos without tokens")
    return positions.to(tokens.device)


def _runs(ids: list[int], grids: dict[int, Iterator[Grid]], merge: int) -> Iterator[Tensor]:
    """Positions of each run of text, and of each image; ``[3, tokens]``."""
    start = 0
    for kind, run in groupby(ids, key=lambda token: token if token in grids else None):
        length = sum(1 for _ in run)
        if kind is None:
            yield torch.arange(start, start + length).expand(3, -1)
            start += length
            continue
        while length:
            t, h, w = next(grids[kind], (0, 0, 0))
            h, w = h // merge, w // merge
            if not 0 < t * h * w <= length:
                raise _miscounted(
                    f"a run of {length} tokens {kind} for an image of {t * h * w}"
                    if t
                    else f"{length} tokens {kind} without an image"
                )
            axes = torch.meshgrid(*(torch.arange(n) for n in (t, h, w)), indexing="ij")
            yield start + torch.stack(axes).flatten(1)
            start += max(h, w)
            length -= t * h * w


def _miscounted(got: str) -> DataError:
    return DataError(
        "the text has other numbers of image tokens than the images make",
        got=got,
        allowed="frames x rows x columns / merge size squared tokens for every image",
        fix="let transformers' processor make tokens and grids, and cut no image in two",
    )


def mrope_angles(positions: Tensor, frequencies: Tensor, section: Sequence[int]) -> Tensor:
    """Angles of interleaved MRoPE, ``[s, b, 1, 2 f]`` float32, as megatron's attention takes them.

    Args:
        positions: ``[3, b, s]``.
        frequencies: ``[f]`` float32.
        section: how many of the frequencies belong to time, height and width. They take turns, and
            time takes what is left when the turns of the others are over.
    """
    axis = torch.zeros(len(frequencies), dtype=torch.int64)
    for number in (1, 2):
        axis[number : 3 * section[number] : 3] = number
    turned = positions[axis.to(positions.device)].float() * frequencies[:, None, None]  # f b s
    angles = turned.permute(2, 1, 0)
    return torch.cat([angles, angles], dim=-1).unsqueeze(2)
