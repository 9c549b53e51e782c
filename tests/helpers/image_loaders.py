"""What tests of the loader of images share: data, a loader of them, and what its batches hold."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.data.images.chat import Chat, load_chat
from qwen35_mcore.data.images.convert import convert
from qwen35_mcore.data.images.loader import ImageLoader, image_datasets
from qwen35_mcore.model.vision.rope import rope_index

SEQ, ROWS = 256, 2


def write_data(corpus: Path, output: Path, processor: Path, **options: Any) -> Path:
    convert(inputs=[corpus], output_dir=output, processor=str(processor), **options)
    return output


def tower(chat: Chat) -> VisionConfig:
    assert chat.processor is not None
    return VisionConfig(
        out_hidden_size=64,
        patch_size=4,
        image_token_id=chat.processor.image_token_id,
        video_token_id=chat.processor.video_token_id,
    )


def loaders(data: Path, processor: Path, **options: Any) -> tuple[ImageLoader, ImageLoader | None]:
    return image_datasets(
        **{
            "train": data,
            "processor": str(processor),
            "vision": None if "vision" in options else tower(load_chat(str(processor))),
            "rope_index": rope_index,
            "seq_length": SEQ,
            "micro_batch_size": ROWS,
            "num_workers": 0,
            "shuffle_buffer": 4,
            "packing_buffer": 6,
            **options,
        }
    )


def training(data: Path, processor: Path, **options: Any) -> ImageLoader:
    return loaders(data, processor, **options)[0]


def documents(batch: dict[str, Any]) -> list[tuple[int, slice]]:
    """Row and place of every document of a batch; padding is none."""
    places = []
    for row, padding in enumerate(batch["padding_mask"]):
        length = int((~padding).sum())
        assert not padding[:length].any()
        bounds = [0, length]
        if batch["cu_seqlens"] is not None:
            bounds = [b for b in dict.fromkeys(batch["cu_seqlens"][row].tolist()) if b <= length]
        places += [(row, slice(*pair)) for pair in pairwise(bounds) if length]
    return places


def keys(batches: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """The tokens of every document."""
    return [
        tuple(batch["tokens"][row, place].tolist())
        for batch in batches
        for row, place in documents(batch)
    ]
