"""Hugging Face folder to Megatron checkpoint, streamed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.files.job import Options, Report
from checkpoint_tools.files.manifest import Work
from checkpoint_tools.files.paths import fingerprint, refuse_overlap
from checkpoint_tools.files.workers import import_meanwhile, run_parallel
from checkpoint_tools.hf.carried import CARRIED_PREFIX, carried_folder, store_carried
from checkpoint_tools.hf.import_plan import plan_import
from checkpoint_tools.hf.read import HFCheckpoint
from checkpoint_tools.mcore.extra_state import extra_state_keys, vision_extra_state_keys
from checkpoint_tools.mcore.keys import COMMON_STATE, RELEASE, TRACKER
from checkpoint_tools.mcore.write import (
    Item,
    MetadataBuilder,
    Target,
    plan_parts,
    write_objects,
    write_tensors,
)
from checkpoint_tools.table.names import Format
from checkpoint_tools.table.row import Row
from checkpoint_tools.table.transforms import Box, common_dtype, split_copy
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig

PART_BYTES = 2**29


def import_checkpoint(
    source: Path,
    target: Path,
    options: Options,
    *,
    checkpoint_format: Format = "qwen35",
    carry: Sequence[str] = (),
    no_mtp: bool = False,
    vision: bool = False,
) -> Report:
    """Convert a Hugging Face folder to ``TARGET/release`` (and what it carries through).

    Killed at any moment and run again it goes on where it was; the target appears at the end.

    Raises:
        CheckpointError, ConfigError: the input is unusable; nothing is written then.
    """
    refuse_overlap(source, target)
    plan = plan_import(
        source, checkpoint_format=checkpoint_format, carry=carry, no_mtp=no_mtp, vision=vision
    )
    folder = carried_folder(plan.carried, plan.hf)
    items = [item for row in plan.table for item in _row_items(plan.hf, row)]
    report = Report(
        source=str(source),
        target=str(target),
        tensors=len({item.target.key for item in items}),
        bytes=sum(item.nbytes for item in items),
        carried=len(plan.carried.tensors),
        files=sorted(plan.carried.files),
        notes=plan.notes,
        origin=folder,
    )
    if options.dry_run:
        return report
    job = {
        "command": "import",
        "layout": checkpoint_format,
        "carry": list(carry),
        "no_mtp": no_mtp,
        **({"vision": True} if vision else {}),  # text imports that older releases began go on
        "max_shard_bytes": options.max_shard_bytes,
        "input": fingerprint(plan.hf.paths),
        "files": fingerprint(plan.carried.files.values()),
    }
    work = Work(target, job, options, size=report.bytes, foreign=_not_of_an_import)
    if work.finished_before():
        return report
    with work:
        import_meanwhile("torch.distributed.checkpoint.filesystem")
        store_carried(work, plan.carried, folder, options.max_shard_bytes)
        builder = _write_parts(work, items, options)
        common = _common_state(plan.config, folder, checkpoint_format)
        extra_keys = extra_state_keys(plan.config, checkpoint_format)
        if vision:
            common["args"].qwen35_vision = True
            extra_keys += vision_extra_state_keys(VisionConfig.of(plan.config))
        _write_objects(work, builder, common, extra_keys)
        builder.write(work.tree)
        work.publish()
    return report


def _not_of_an_import(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith((RELEASE, TRACKER, CARRIED_PREFIX))]


def _row_items(hf: HFCheckpoint, row: Row) -> Iterator[Item]:
    dtypes = [hf.tensors[spec.name].dtype for spec in row.hf]
    if row.float32:
        dtypes.append(torch.float32)
    # a float32 weight minus one needs more digits than float32 has to be given back exactly
    dtype = torch.float64 if row.zero_centred else common_dtype(dtypes)
    targets = [Target(spec.name, dtype, spec.shape) for spec in row.mcore]
    for whole in row.copies():
        for copy in split_copy(whole, dtype.itemsize):
            content = partial(
                _content, hf, row.hf[copy.hf].name, copy.hf_box, dtype, row.zero_centred
            )
            yield Item(targets[copy.mcore], copy.mcore_box, content)


def _content(
    hf: HFCheckpoint, name: str, box: Box, dtype: torch.dtype, zero_centred: bool
) -> torch.Tensor:
    tensor = box.of(hf.tensors[name].read()).to(dtype)
    return tensor - 1 if zero_centred else tensor


def _write_parts(work: Work, items: list[Item], options: Options) -> MetadataBuilder:
    parts = list(plan_parts(items, min(PART_BYTES, options.max_shard_bytes)))

    def write(number: int) -> list[list[int]]:
        places: list[list[int]] = work.part(
            f"{RELEASE}/{_file(number)}", lambda stream: write_tensors(stream, parts[number])
        )
        return places

    builder = MetadataBuilder()
    places = run_parallel(write, range(len(parts)), options.workers)
    for number, part in enumerate(parts):
        builder.add_tensors(_file(number), part, places[number])
    return builder


def _write_objects(
    work: Work, builder: MetadataBuilder, common: dict[str, Any], extra_keys: list[str]
) -> None:
    # the extra states are all the same empty tensor, so one copy in the file serves all their keys
    objects = {COMMON_STATE: common, "extra": torch.empty(0, dtype=torch.uint8)}
    file = "objects.distcp"
    places = work.part(f"{RELEASE}/{file}", lambda stream: write_objects(stream, objects))
    builder.add_objects(file, [COMMON_STATE], places[:1])
    builder.add_objects(file, extra_keys, places[1:] * len(extra_keys))


def _file(number: int) -> str:
    return f"__{number}_0.distcp"


def _common_state(config: Qwen35Config, carried: str, checkpoint_format: Format) -> dict[str, Any]:
    """What Megatron's loader looks at, plain types only: it unpickles nothing else."""
    args = argparse.Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        padded_vocab_size=config.vocab_size,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
        ckpt_format="torch_dist",
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        qwen35_hf_config=json.dumps(config.to_hf(), sort_keys=True),
        qwen35_origin=carried,
        qwen35_layout=checkpoint_format,
    )
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
