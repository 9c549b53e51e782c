"""Loaders of a run's microbatches from folders that `qwen35 data images` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen35_mcore.config.vision import VisionConfig

if TYPE_CHECKING:
    from torch import Tensor

BadSamples = Literal["error", "skip"]
Positions = Callable[["Tensor", VisionConfig, "Tensor | None", "Tensor | None"], "Tensor"]
"""`qwen35_mcore.model.vision.rope.rope_index`: tokens, tower, grids of images and of videos."""
Batch = dict[str, Any]


class ImageLoader:
    """Microbatches of one data-parallel rank, without end: an iterator that can be continued.

    Each is a dict of CPU tensors, b rows (``micro_batch_size``) of s tokens (``seq_length``):
        tokens: ``[b, s]`` int64, image and video tokens in place.
        labels: ``[b, s]`` int64, the token that follows; 0 where the loss mask is.
        loss_mask: ``[b, s]`` float32, 1 where the label belongs to an answer.
        position_ids: ``[3, b, s]`` int64 of `rope_index`, from 0 in every document; without a tower
            ``[b, s]``.
        padding_mask: ``[b, s]`` bool, true where there is no token.
        attention_mask: None.
        pixel_values, pixel_values_videos: ``[patches, patch_values]`` float32, row after row, in
            the order of their tokens; None where there is none.
        image_grid_thw, video_grid_thw: ``[images, 3]`` int64, or None.
        cu_seqlens, max_seqlen: of packed rows, as megatron's own datasets give them: ``[b, n]``
            int32, from 0 to s in every row, filled up with s to the row that has most documents;
            ``[b]`` int32. Padding at the end of a row is a document of its own. None where a
            row is one document.
    """

    def __iter__(self) -> ImageLoader:
        return self

    def __next__(self) -> Batch:
        raise NotImplementedError

    def save_state(self) -> dict[str, Any]:
        """Where this rank is: plain numbers, and ``energon``, bytes. Of every data-parallel rank
        its own."""
        raise NotImplementedError

    def restore_state(self, state: dict[str, Any]) -> None:
        """Continue with the sample after the last one before `save_state`; before the first
        ``next``.

        Raises:
            DataError: it is of other data, or of another number of ranks or workers, rows or tokens
                in a row, packing or seed.
        """
        raise NotImplementedError


def image_datasets(
    *,
    train: Path | str,
    valid: Path | str | None = None,
    processor: str,
    vision: VisionConfig | None,
    rope_index: Positions | None,
    seq_length: int,
    micro_batch_size: int,
    packing: bool = False,
    dp_rank: int = 0,
    dp_size: int = 1,
    num_workers: int = 2,
    seed: int = 1234,
    shuffle_buffer: int = 100,
    packing_buffer: int = 100,
    bad_samples: BadSamples = "error",
    valid_micro_batch_size: int | None = None,
) -> tuple[ImageLoader, ImageLoader | None]:
    """Loaders of training and of validation data.

    Args:
        train: a folder of `qwen35 data images`, of which the split ``train`` is read, or a metadataset
            (``.yaml``) of Energon's that blends several.
        valid: the same, of which the split ``val`` is read. None: that of ``train``, and no loader
            where it has none.
        processor: the model's Hugging Face folder or name: tokenizer, chat template and
            ``preprocessor_config.json``.
        vision: the model's tower; None for a text model, which refuses samples with images.
        rope_index: `qwen35_mcore.model.vision.rope.rope_index`, where there is a tower.
        packing: put several documents into a row, kept apart by ``cu_seqlens``; else a row is one
            document, filled up with padding.
        dp_rank, dp_size: which part of the samples; ranks have no sample in common.
        num_workers: processes of a rank that read and encode; 0 is this process.
        seed: of the order of the samples.
        shuffle_buffer: samples of which the next one is drawn.
        packing_buffer: samples that are packed together.
        bad_samples: what a sample does that cannot be used (an image that does not open, more
            tokens than a row): stop with an error, or be left out with a warning.
        valid_micro_batch_size: rows of a validation batch, where they differ.

    Raises:
        ConfigError: the extra ``vision`` is not installed.
        DataError: a folder is none of Energon's, the processor cannot be loaded or contradicts the
            tower, or there are fewer samples than ranks and workers.
    """
    raise NotImplementedError
