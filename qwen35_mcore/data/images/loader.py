"""Loaders of a run's microbatches from folders that `qwen35 data images` wrote."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.data.images.rules import BadSamples, Positions
from qwen35_mcore.errors import DataError

Batch = dict[str, Any]
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError)


class ImageLoader:
    """Microbatches of one data-parallel rank, without end: an iterator that can be continued.

    Validation data begin again where they end. Each microbatch is a dict of CPU tensors, b rows
    (``micro_batch_size``) of s tokens (``seq_length``):

    - ``tokens``: ``[b, s]`` int64, image and video tokens in place.
    - ``labels``: ``[b, s]`` int64, the token that follows in the document; 0 where none does.
    - ``loss_mask``: ``[b, s]`` float32, 1 where the label belongs to an answer.
    - ``position_ids``: ``[3, b, s]`` int64 of ``rope_index``, from 0 in every document; without a
      tower ``[b, s]``.
    - ``padding_mask``: ``[b, s]`` bool, true where there is no token.
    - ``attention_mask``: None.
    - ``pixel_values``, ``pixel_values_videos``: ``[patches, patch_values]`` float32, row after row,
      in the order of their tokens; None where there is none.
    - ``image_grid_thw``, ``video_grid_thw``: ``[images, 3]`` int64, or None.
    - ``cu_seqlens``, ``max_seqlen``: of packed rows, as megatron's own datasets give them:
      ``[b, n]`` int32, from 0 to s in every row, filled up with s to the row that has most
      documents; ``[b]`` int32. Padding at the end of a row is a document of its own. None where a
      row is one document.

    Samples that are left out are named on standard error, with their number so far.
    """

    def __init__(self, loader: Any, settings: dict[str, Any], name: str) -> None:
        self._loader, self._settings, self._name = loader, settings, name
        self._batches: Any = None
        self.left_out = 0

    def __iter__(self) -> ImageLoader:
        return self

    def __next__(self) -> Batch:
        """Raises DataError for a bad sample, unless such samples are left out."""
        batch: Batch = self._next()
        for message in batch.pop("left_out"):
            self.left_out += 1
            print(
                f"warning: a sample of the {self._name} data is left out, {self.left_out:,} so far "
                f"on this rank: {message}",
                file=sys.stderr,
                flush=True,
            )
        return batch

    def close(self) -> None:
        """End the workers; there are no more microbatches then.

        Left to torch, at the end of the process or as garbage, workers are not told to end, and it
        waits five seconds for each.
        """
        if (workers := self._loader._iterator) is not None:
            workers._shutdown_workers()

    def __del__(self) -> None:
        self.close()

    def save_state(self) -> dict[str, Any]:
        """Where this rank is: plain values, and ``energon``, bytes. Every data-parallel rank has
        its own."""
        energon = pickle.dumps(self._loader.save_state_rank())
        return {"settings": self._settings, "left_out": self.left_out, "energon": energon}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Continue with the sample after the last one before `save_state`; before the first
        ``next``.

        The bytes are a pickle: states come from nobody but this run's own checkpoints.

        Raises:
            DataError: it is of other data, or of another rank, number of ranks or workers, batch,
                length, packing, buffer or seed.
        """
        saved = state["settings"]
        others = [key for key in self._settings if saved.get(key) != self._settings[key]]
        if others:
            raise DataError(
                f"the position in the {self._name} data belongs to other settings",
                got=", ".join(f"{key} {self._settings[key]}" for key in others),
                allowed=", ".join(f"{key} {saved.get(key)}" for key in others),
                fix="resume with those, or begin the data anew without their position",
            )
        self.left_out = state["left_out"]
        self._loader.restore_state_rank(pickle.loads(state["energon"]))

    def _next(self) -> Batch:
        from qwen35_mcore.data.images.samples import refused

        try:
            for _ in range(2):
                if self._batches is None:
                    self._batches = iter(self._loader)
                for batch in self._batches:
                    return batch
                self._batches = None
        except Exception as error:
            if bad := refused(error):
                raise bad from None
            raise
        raise DataError(
            f"no sample of the {self._name} data can be used",
            got=f"{self.left_out:,} left out",
            fix="make the data again; `qwen35 data images` names what is wrong",
        )


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
        train: a folder of `qwen35 data images`, of which the split ``train`` is read, or a
            metadataset (``.yaml``) of Energon's that blends several.
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
    from qwen35_mcore.mcore.energon import (
        WorkerConfig,
        get_savable_loader,
        get_train_dataset,
        get_val_dataset,
        reraise_exception,
    )

    from qwen35_mcore.data.images.chat import load_chat  # isort: skip  # both need the extra
    from qwen35_mcore.data.images.samples import Samples  # isort: skip

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    chat = load_chat(processor)
    if vision is not None:
        chat.check_tower(vision)
    workers = WorkerConfig(
        rank=dp_rank,
        world_size=dp_size,
        num_workers=num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,  # Energon's own prints it and leaves the sample out
    )

    def loader(path: Path, part: str, rows: int) -> ImageLoader:
        samples = Samples(
            chat,
            vision=vision,
            rope_index=rope_index,
            seq_length=seq_length,
            rows=rows,
            bad_samples=bad_samples,
        )
        common = {
            "worker_config": workers,
            "batch_size": rows,
            "packing_buffer_size": packing_buffer if packing else None,
            "task_encoder": samples,
        }
        if part == "train":
            dataset = get_train_dataset(
                path,
                shuffle_buffer_size=shuffle_buffer,
                max_samples_per_sequence=shuffle_buffer,
                **common,
            )
        else:
            dataset = get_val_dataset(path, **common)
        settings = {
            "data": _digest(path),
            "data-parallel rank": dp_rank,
            "data-parallel size": dp_size,
            "workers": num_workers,
            "micro-batch size": rows,
            "sequence length": seq_length,
            "packing": packing,
            "shuffle buffer": shuffle_buffer,
            "packing buffer": packing_buffer,
            "seed": seed,
        }
        made = get_savable_loader(dataset, watchdog_timeout_seconds=None)
        made.pin_memory = _has_accelerator()
        name = {"train": "training", "val": "validation"}[part]
        return ImageLoader(made, settings, name)

    ranks = dp_size * max(1, num_workers)
    train = check_folder(train, "train", ranks)
    train_loader = loader(train, "train", micro_batch_size)
    if valid is None and not _parts(train).get("val"):
        return train_loader, None
    valid = check_folder(train if valid is None else valid, "val", ranks)
    return train_loader, loader(valid, "val", valid_micro_batch_size or micro_batch_size)


def check_folder(path: Path | str, part: str, ranks: int) -> Path:
    """The path of a dataset that has samples of a split for all ranks and their workers.

    Raises:
        DataError: there is no such dataset, or not as many samples; its index is damaged, a shard
            is cut, or a blend has weights that are none.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".yaml":
        _check_blend(path)
        return path
    if not (path / ".nv-meta" / ".info.json").is_file():
        raise DataError(
            f"{path} is no dataset of conversations with images",
            got="no .nv-meta/.info.json" if path.is_dir() else "no folder",
            allowed="a folder that `qwen35 data images` wrote, or a .yaml of Megatron-Energon's",
            fix="make it with `qwen35 data images`",
        )
    samples = _samples(path, part)
    if samples < ranks:
        raise DataError(
            f"{path} has fewer samples of the split {part} than there are readers",
            got=f"{samples} samples, {ranks} data-parallel ranks x workers",
            allowed=f"at least {ranks}",
            fix="use fewer workers or ranks, or make the data with a larger share in --split",
        )
    return path


def _samples(path: Path, part: str) -> int:
    """Samples of a split of a folder. Raises DataError where its index or a shard is damaged."""
    try:
        counts = _read_yaml(path / ".nv-meta" / ".info.json")["shard_counts"]
        shards = _parts(path).get(part, ())
        for shard in shards:
            _check_whole(path / shard)
        return sum(counts[shard] for shard in shards)
    except (OSError, *_MALFORMED, yaml.YAMLError) as error:
        raise DataError(
            f"the folder {path} is damaged",
            got=" ".join(f"{type(error).__name__}: {error}".split()),
            fix="copy it again, or make it with `qwen35 data images ... --overwrite`",
        ) from error


def _check_whole(shard: Path) -> None:
    """Compare a shard with its index, which ends with the size. Raises ValueError, OSError."""
    offsets = Path(f"{shard}.idx").read_bytes()[-8:]
    size, expected = shard.stat().st_size, int.from_bytes(offsets, "little")
    if not size or size < expected:
        raise ValueError(f"{shard} has {size} of {expected} bytes")


def _check_blend(path: Path) -> None:
    """Check the weights of a metadataset, which Energon takes as they are.

    Raises:
        DataError: it cannot be read, or has a weight that is not a positive number.
    """
    try:
        weights = list(_weights(_read_yaml(path)))
    except OSError as error:
        raise DataError(f"{path} cannot be read", got=str(error)) from error
    except (ValueError, yaml.YAMLError):  # Energon, which reads it next, says what is wrong
        return
    for weight in weights:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight > 0):
            raise DataError(
                f"{path} has a weight that is not a positive number",
                got=repr(weight),
                allowed="finite numbers above 0",
                fix="correct the weight, or leave the dataset out",
            )


def _weights(value: Any) -> Iterator[Any]:
    """Every weight of a blend, at any depth."""
    if isinstance(value, dict):
        yield from (value[key] for key in value if key == "weight")
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _weights(each)


def _parts(path: Path) -> dict[str, list[str]]:
    """Shards of every split of a folder, or what a metadataset says of its splits."""
    if path.is_file():
        return dict(_read_yaml(path).get("splits", {}))
    import braceexpand

    parts = _read_yaml(path / ".nv-meta" / "split.yaml")["split_parts"]
    return {
        part: list(itertools.chain.from_iterable(map(braceexpand.braceexpand, patterns)))
        for part, patterns in parts.items()
    }


def _digest(path: Path) -> str:
    """Tells whether two runs read the same data, wherever they lie."""
    names = [".nv-meta/.info.json", ".nv-meta/split.yaml", ".nv-meta/index.uuid"]
    files = [path] if path.is_file() else [path / name for name in names]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_bytes())


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
