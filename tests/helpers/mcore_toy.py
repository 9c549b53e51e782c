"""Megatron checkpoints in shapes that training writes, without training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.files.checksums import ChecksumWriter
from checkpoint_tools.files.paths import write_file
from checkpoint_tools.mcore.keys import COMMON_STATE
from checkpoint_tools.mcore.write import (
    Item,
    MetadataBuilder,
    Target,
    write_objects,
    write_tensors,
)
from checkpoint_tools.table.transforms import Box
from qwen35_mcore.config.model_config import Qwen35Config

ITERATION = 7


def write_training_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Qwen35Config | None,
    *,
    axis: int = -1,
    legacy: bool = False,
    **arguments: Any,
) -> Path:
    """Write ``iter_0000007`` with each tensor cut in two along an axis, as two ranks would.

    Args:
        legacy: common state in a common.pt.
        arguments: further entries of the checkpoint's args.
    """
    items = [item for key, tensor in tensors.items() for item in _halves(key, tensor, axis)]
    args = argparse.Namespace(num_layers=config.num_hidden_layers if config else 4, **arguments)
    if config is not None:
        args.qwen35_hf_config = json.dumps(config.to_hf())
    common = {"args": args, "iteration": ITERATION, "checkpoint_version": 3.0}
    release = folder / "release"
    release.mkdir(parents=True)
    builder = MetadataBuilder()
    with open(release / "__0_0.distcp", "wb") as file:
        builder.add_tensors("__0_0.distcp", items, write_tensors(ChecksumWriter(file), items))
    if legacy:
        torch.save(common, release / "common.pt")
    with open(release / "__1_0.distcp", "wb") as file:
        builder.add_objects(
            "__1_0.distcp",
            ["rng_state/shard_0_1" if legacy else COMMON_STATE],
            write_objects(file, {"": common}),
        )
    builder.write(folder)
    release.rename(folder / f"iter_{ITERATION:07}")
    write_file(folder / "latest_checkpointed_iteration.txt", str(ITERATION).encode())
    return folder


def _halves(key: str, tensor: torch.Tensor, axis: int) -> list[Item]:
    target = Target(key, tensor.dtype, tuple(tensor.shape))
    length = tensor.shape[axis]
    items = []
    for start, stop in ((0, length // 2), (length // 2, length)):
        if start < stop:
            offsets = [0] * tensor.dim()
            offsets[axis] = start
            part = tensor.narrow(axis, start, stop - start)
            box = Box(tuple(offsets), tuple(part.shape))
            items.append(Item(target, box, lambda part=part: part))  # type: ignore[misc]
    return items
