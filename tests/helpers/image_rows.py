"""Runs of the training script on rows with images, without files: a loader in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.data.images.loader import ImageLoader
from qwen35_mcore.model.vision.rope import rope_index
from tests.helpers.text_data import make_bpe
from tests.helpers.vision import VisionBatch


class MemoryLoader(ImageLoader):
    """Rows of a batch in order, again and again; each data-parallel rank takes its share of the
    rows that come next."""

    def __init__(self, batch: VisionBatch, dp_rank: int, dp_size: int, micro_batch_size: int):
        self.batch, self.rank, self.ranks, self.rows = batch, dp_rank, dp_size, micro_batch_size
        self.read = 0

    def __next__(self) -> dict[str, Any]:
        first = (self.read * self.ranks + self.rank) * self.rows % len(self.batch.rows)
        self.read += 1
        sample = self.batch.sample(first, self.rows)
        images = self.batch.images(first, self.rows)
        positions = rope_index(
            sample["tokens"],
            VisionConfig.of(self.batch.config),
            images.get("image_grid_thw"),
            images.get("video_grid_thw"),
        )
        padding = torch.zeros_like(sample["tokens"], dtype=torch.bool)
        return sample | images | {"position_ids": positions, "padding_mask": padding}

    def save_state(self) -> dict[str, Any]:
        return {"read": self.read}

    def restore_state(self, state: dict[str, Any]) -> None:
        self.read = state["read"]

    def close(self) -> None:
        """It has no workers."""


def use_memory(script: Any) -> None:
    """Let a run of the script read ``--image-data`` and ``--image-valid-data`` as `write` wrote
    them; for `ScriptServer.start`."""
    from qwen35_mcore.training import image_data
    from qwen35_mcore.training.checks import run

    image_data.image_datasets = _loaders  # type: ignore[assignment]
    run.check_conversations = lambda args, model_config: None


def _loaders(
    *, train: str, valid: str | None, dp_rank: int, dp_size: int, micro_batch_size: int, **_: Any
) -> Any:
    def loader(path: str) -> MemoryLoader:
        batch = torch.load(path, weights_only=False)
        return MemoryLoader(batch, dp_rank, dp_size, micro_batch_size)

    return loader(train), None if valid is None else loader(valid)


def write(path: Path, batch: VisionBatch) -> Path:
    """Rows for `use_memory`."""
    torch.save(batch, path)
    return path


def model_folder(folder: Path, config: Qwen35Config) -> Path:
    """A folder with the model's config and a tokenizer."""
    return write_config(make_bpe(folder), config)


def write_config(folder: Path, config: Qwen35Config) -> Path:
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder
