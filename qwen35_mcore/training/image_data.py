"""Loaders of conversations, as megatron's training loop takes them."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from itertools import tee
from typing import Any

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.data.images.loader import Batch, ImageLoader, image_datasets
from qwen35_mcore.errors import DataError
from qwen35_mcore.mcore.imports import get_args, mpu
from qwen35_mcore.mcore.patches.loader_position import read_position, save_position
from qwen35_mcore.model.vision.rope import rope_index

Iterators = tuple[Iterator[Batch] | None, Iterator[Batch] | None, None]
_of_chunks: list[Iterators] = []
_loaders: list[ImageLoader] = []


def conversations(vp_stage: int | None = None) -> Iterators:
    """Microbatches of ``--image-data``: of training and of validation data, and no test data.

    Every rank whose tensor-parallel rank is 0 reads the data of its data-parallel rank: pipeline
    stages and context-parallel ranks read the same in the same order. A run that resumes goes on
    with the next sample, unless `checks.resume` says that it cannot.

    Args:
        vp_stage: of the model chunk that they are for, under virtual pipeline parallelism, from 0
            on. The chunks of a rank share its loaders.

    Raises:
        ConfigError, DataError: see `image_datasets` and `ImageLoader.restore_state`; or the run
            evaluates and has no validation data.
    """
    args = get_args()
    if not vp_stage:
        loaders = _loaders_of_this_rank(args)
        chunks = args.virtual_pipeline_model_parallel_size or 1
        train, valid = ([None] * chunks if x is None else tee(x, chunks) for x in loaders)
        _of_chunks[:] = [(*pair, None) for pair in zip(train, valid, strict=True)]
    return _of_chunks[vp_stage or 0]


def close_loaders() -> None:
    """End the workers of this rank's loaders."""
    while _loaders:
        _loaders.pop().close()


def _loaders_of_this_rank(args: Namespace) -> tuple[ImageLoader | None, ImageLoader | None]:
    position = read_position(args.qwen35_position) if args.qwen35_position else {}
    if mpu.get_tensor_model_parallel_rank():
        return None, None
    seed = position.get("seed", args.seed + args.iteration)
    train, valid = _image_datasets(args, seed)
    _loaders[:] = [loader for loader in (train, valid) if loader is not None]
    if valid is None and args.eval_iters:  # a metadataset's parts are not looked at before
        raise DataError(
            "the run evaluates and its data have no part for validation",
            got=f"--image-data {args.image_data} --eval-iters {args.eval_iters}",
            fix="pass --image-valid-data FOLDER or --eval-iters 0",
        )
    _restore(train, valid, position)
    save_position(
        lambda: {
            "seed": seed,
            "train": train.save_state(),
            "valid": None if valid is None else valid.save_state(),
        }
    )
    return train, valid


def _restore(train: ImageLoader, valid: ImageLoader | None, position: dict[str, Any]) -> None:
    """Go on where the checkpoint's loaders were. Other validation data begin anew."""
    if position.get("train") is not None:
        try:
            train.restore_state(position["train"])
        except DataError as error:
            raise DataError(
                error.what,
                got=error.got,
                allowed=error.allowed,
                fix="put the data back that the checkpoint was trained on, or pass another --seed: "
                "the data then begin anew",
            ) from error
    if valid is not None and position.get("valid") is not None:
        try:
            valid.restore_state(position["valid"])
        except DataError as error:
            if mpu.get_data_parallel_rank() == 0 and mpu.get_pipeline_model_parallel_rank() == 0:
                print(
                    f"> validation begins anew: {error.got} (the checkpoint's: {error.allowed})",
                    flush=True,
                )


def _image_datasets(args: Namespace, seed: int) -> tuple[ImageLoader, ImageLoader | None]:
    vision: dict[str, Any] = {"vision": None, "rope_index": None}
    if args.qwen35_vision:
        model_config = Qwen35Config.from_hf(json.loads(args.qwen35_hf_config))
        vision = {"vision": VisionConfig.of(model_config), "rope_index": rope_index}
    return image_datasets(
        train=args.image_data,
        valid=args.image_valid_data,
        processor=args.tokenizer_model,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        valid_micro_batch_size=args.eval_micro_batch_size,
        packing=args.pack_samples,
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        num_workers=args.num_workers,
        seed=seed,
        bad_samples=args.bad_samples,
        **vision,
    )
