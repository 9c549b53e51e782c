"""Hugging Face folder to Megatron checkpoint, streamed."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.accounting import Account, account
from checkpoint_tools.extra_state import extra_state_keys
from checkpoint_tools.hf_io import HFCheckpoint
from checkpoint_tools.hf_write import Output, index_content, plan_shards, write_shard
from checkpoint_tools.manifest import Work, refuse_overlap, write_file
from checkpoint_tools.mcore_keys import COMMON_STATE
from checkpoint_tools.mcore_write import (
    RELEASE,
    Item,
    MetadataBuilder,
    Target,
    plan_parts,
    write_objects,
    write_tensors,
)
from checkpoint_tools.names import Layout, Row
from checkpoint_tools.origin import (
    CARRIED_FOLDER,
    FILES_FOLDER,
    ORIGIN_FILE,
    origin_content,
    origin_name,
    other_files,
)
from checkpoint_tools.progress import Progress
from checkpoint_tools.storage import split_copy
from checkpoint_tools.transforms import Box, common_dtype
from checkpoint_tools.workers import import_meanwhile, run_parallel
from qwen35_mcore.config.model_config import Qwen35Config

PART_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both directions share."""

    workers: int = 4
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    dry_run: bool = False
    quiet: bool = False


@dataclass(kw_only=True)
class Report:
    """What a conversion did, or would do."""

    source: str
    target: str
    tensors: int
    bytes: int
    carried: int
    files: list[str]
    notes: list[str] = field(default_factory=list)
    origin: str | None = None


def import_checkpoint(
    source: Path,
    target: Path,
    options: Options,
    *,
    layout: Layout = "qwen35",
    carry: Sequence[str] = (),
    no_mtp: bool = False,
) -> Report:
    """Convert a Hugging Face folder to ``TARGET/release`` (and what it carries through).

    Killed at any moment and run again it goes on where it was; the target appears at the end.

    Raises:
        CheckpointError, ConfigError: the input is unusable; nothing is written then.
    """
    refuse_overlap(source, target)
    plan = account(source, layout=layout, carry=carry, no_mtp=no_mtp)
    files, left_out = other_files(plan.hf)
    content = origin_content(plan.origin)
    name = origin_name(content, plan.hf, files)
    items = [item for row in plan.table for item in _row_items(plan.hf, row)]
    report = Report(
        source=str(source),
        target=str(target),
        tensors=len({item.target.key for item in items}),
        bytes=sum(item.nbytes for item in items),
        carried=len(plan.carried),
        files=sorted(files),
        notes=[*plan.notes, *(f"left out, other weights: {file}" for file in left_out)],
        origin=name,
    )
    if options.dry_run:
        return report
    job = {
        "command": "import",
        "layout": layout,
        "carry": list(carry),
        "no_mtp": no_mtp,
        "max_shard_bytes": options.max_shard_bytes,
        "input": fingerprint([plan.hf.folder / file for file in plan.hf.files]),
        "files": fingerprint(list(files.values())),
    }
    work = Work(target, job, overwrite=options.overwrite)
    if work.finished_before():
        return report
    with work, Progress(report.bytes, "import", quiet=options.quiet) as progress:
        import_meanwhile("torch.distributed.checkpoint.filesystem")
        _store_origin(work, plan, files, name, options)
        write_file(work.tree / name / ORIGIN_FILE, content)
        builder = _write_parts(work, items, options, progress.advance)
        common = _common_state(plan.config, name, layout)
        keys = extra_state_keys(plan.config, mtp=plan.naming.mtp, layout=layout)
        _write_objects(work, builder, common, keys)
        builder.write(work.tree)
        work.publish()
    return report


def _row_items(hf: HFCheckpoint, row: Row) -> Iterator[Item]:
    dtypes = [hf.dtype(spec.name) for spec in row.hf]
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
    tensor = hf.read(name, box).to(dtype)
    return tensor - 1 if zero_centred else tensor


def _write_parts(
    work: Work, items: list[Item], options: Options, advance: Callable[[int], None]
) -> MetadataBuilder:
    part_bytes = min(PART_BYTES, options.max_shard_bytes)
    parts = list(plan_parts(items, part_bytes))

    def write(number: int) -> list[list[int]]:
        before = work.finished(f"{RELEASE}/{_file(number)}")
        places: list[list[int]] = work.part(
            f"{RELEASE}/{_file(number)}",
            lambda stream: write_tensors(stream, parts[number], advance),
        )
        if before:
            advance(sum(item.nbytes for item in parts[number]))
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


def _common_state(config: Qwen35Config, origin: str, layout: Layout) -> dict[str, Any]:
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
        qwen35_origin=origin,
        qwen35_layout=layout,
    )
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _store_origin(
    work: Work, plan: Account, files: dict[str, Path], name: str, options: Options
) -> None:
    for relative, path in files.items():
        work.part(f"{name}/{FILES_FOLDER}/{relative}", partial(copy_file, path))
    hf = plan.hf
    outputs = [
        Output(tensor, hf.dtype(tensor), hf.shape(tensor), partial(hf.pieces, tensor))
        for tensor in plan.carried
    ]
    if outputs:
        shards = plan_shards(outputs, options.max_shard_bytes, "model")
        for file, shard in shards.items():
            work.part(f"{name}/{CARRIED_FOLDER}/{file}", partial(write_shard, outputs=shard))
        if len(shards) > 1:
            index = work.tree / name / CARRIED_FOLDER / "model.safetensors.index.json"
            write_file(index, index_content(shards))


def copy_file(path: Path, stream: Any) -> None:
    """Copy a file into a stream."""
    with open(path, "rb") as file:
        shutil.copyfileobj(file, stream, 2**22)


def fingerprint(paths: list[Path]) -> list[list[Any]]:
    """Name, size and time of each file: unfinished work goes on only with the same input."""
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)]
