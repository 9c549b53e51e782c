"""Megatron checkpoint to Hugging Face folder, streamed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.files.job import Options, Report
from checkpoint_tools.files.manifest import Work
from checkpoint_tools.files.paths import copy_file, fingerprint, refuse_overlap, write_file
from checkpoint_tools.files.workers import run_parallel
from checkpoint_tools.hf.carried import CARRIED_PREFIX, Carried, read_carried
from checkpoint_tools.hf.folder import INDEX_NAME
from checkpoint_tools.hf.import_plan import plan_import
from checkpoint_tools.hf.read import HFCheckpoint
from checkpoint_tools.hf.tokenizer import OtherFiles, other_files_of, set_special_ids
from checkpoint_tools.hf.write import index_content, plan_shards, write_shard
from checkpoint_tools.mcore.exported import (
    DtypeChoice,
    ExportedTensors,
    has_mtp,
    has_vision,
    main_parameter,
    model_keys,
    recorded_config,
)
from checkpoint_tools.mcore.keys import RELEASE, TRACKER
from checkpoint_tools.mcore.read import MegatronCheckpoint
from checkpoint_tools.table.names import HEAD, MTP_PREFIX, Naming
from checkpoint_tools.table.transforms import LazyTensor
from checkpoint_tools.table.vision import VISION_PREFIX
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig, tower_differences
from qwen35_mcore.errors import CheckpointError, ConfigError

_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """A Megatron checkpoint and everything that its Hugging Face folder will hold."""

    checkpoint: MegatronCheckpoint
    exported: ExportedTensors
    config: Qwen35Config
    carried: Carried | None
    other: OtherFiles
    choice: DtypeChoice

    def tensors(self) -> list[LazyTensor]:
        """Every tensor of the result."""
        tensors = self.exported.lazy()
        if self._has_copied_head():
            tensors.append(replace(tensors[0], name=HEAD))
        return tensors + (self.carried.tensors if self.carried else [])

    def _has_copied_head(self) -> bool:
        """Whether the tied original had its embedding twice: transformers reads both."""
        carried = self.carried
        if carried is None or not self.config.tie_word_embeddings:
            return False
        return HEAD in carried.dtypes and all(one.name != HEAD for one in carried.tensors)

    def config_bytes(self) -> bytes:
        """The config.json: the original where it says the truth, else with what differs."""
        content, original = self._config_content()
        set_special_ids(content, self.other.special_ids)
        if original and self.choice == "original":
            assert self.carried is not None
            if content == json.loads(self.carried.config.read_text()):
                return self.carried.config.read_bytes()
        else:
            _set_dtype(content, self._main_dtype())
        return json.dumps(content, indent=2).encode() + b"\n"

    def _config_content(self) -> tuple[dict[str, Any], bool]:
        """The config's keys, and whether they are the original's, MTP layers apart."""
        if self.carried is None:
            return self.config.to_hf(), False
        original = Qwen35Config.from_hf(self.carried.config)
        mtp = self._mtp_layers(original)
        trained = replace(_into_wrapper(self.config, original), mtp_num_hidden_layers=mtp)
        if trained != replace(original, mtp_num_hidden_layers=mtp):
            return trained.to_hf(), False
        content: dict[str, Any] = json.loads(self.carried.config.read_text())
        if trained != original:
            content.get("text_config", content)[original.family.mtp_key] = mtp
        return content, True

    def _mtp_layers(self, original: Qwen35Config) -> int:
        """What config.json has to say: what is there, as a layer or carried through."""
        carried = self.carried.tensors if self.carried else []
        if any(tensor.name.startswith(MTP_PREFIX) for tensor in carried):
            return original.mtp_num_hidden_layers
        return self.config.mtp_num_hidden_layers

    def _main_dtype(self) -> torch.dtype:
        """The dtype of most bytes: transformers loads everything in the dtype of the config."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])


def plan_export(
    source: Path,
    *,
    reference: Path | None = None,
    naming: Naming | None = None,
    choice: DtypeChoice = "original",
    no_mtp: bool = False,
) -> ExportPlan:
    """Read a Megatron checkpoint and find what belongs to it.

    Args:
        source: ``iter_NNNNNNN``, ``release``, or the folder above with its tracker file.
        reference: the Hugging Face folder to take config, carried tensors, files, dtypes and
            names from, for a run that never saw an import.
        naming: names of the Hugging Face side where neither import nor reference says them.
        no_mtp: export without the MTP layer although the original has one.

    Raises:
        CheckpointError: the checkpoint is incomplete or of another model, or what it carried is
            not to be found.
    """
    checkpoint = MegatronCheckpoint(source)
    carried = _carried(checkpoint, reference)
    config = _config(checkpoint, carried)
    if carried is not None:
        _need_mtp(carried.naming, checkpoint, no_mtp)
        naming = carried.naming
    naming = naming or Naming.default(config)
    naming = replace(naming, mtp=has_mtp(checkpoint) and not no_mtp)
    config = replace(config, mtp_num_hidden_layers=int(naming.mtp))
    if has_vision(checkpoint):
        _check_same_tower(recorded_config(checkpoint), config)
        carried = _without_vision(carried)
    elif config.is_vision_language and not _carries_vision(carried):
        raise CheckpointError(
            "the run's config is vision-language and the checkpoint has no vision tower",
            fix="give --reference HF_DIR to take it from there",
        )
    if choice == "float32":
        _need_main_parameters(checkpoint)
    dtypes = carried.dtypes if carried is not None else {}
    tokenizer = checkpoint.argument("qwen35_tokenizer")
    return ExportPlan(
        checkpoint=checkpoint,
        exported=ExportedTensors(checkpoint, config, naming, dtypes, choice),
        config=config,
        carried=carried,
        other=other_files_of(
            carried,
            checkpoint.root / tokenizer if tokenizer else None,
            checkpoint.argument("tokenizer_type"),
            by_reference=reference is not None,
        ),
        choice=choice,
    )


def export_checkpoint(target: Path, plan: ExportPlan, options: Options) -> Report:
    """Write the Hugging Face folder of a plan.

    Killed at any moment and run again it goes on where it was; the target appears at the end.
    """
    refuse_overlap(plan.checkpoint.folder, target)
    tensors = plan.tensors()
    shards = plan_shards(tensors, options.max_shard_bytes)
    files = plan.other.paths
    report = Report(
        source=str(plan.checkpoint.folder),
        target=str(target),
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        carried=len(plan.carried.tensors) if plan.carried else 0,
        files=sorted([*shards, *files, _CONFIG]),
        notes=[plan.other.note] if plan.other.note else [],
    )
    if options.dry_run:
        return report
    job = _job(plan, files, options)
    work = Work(target, job, options, size=report.bytes, foreign=_not_of_an_export)
    if work.finished_before():
        return report
    with work:

        def write(file: str) -> None:
            work.part(file, partial(write_shard, tensors=shards[file]))

        run_parallel(write, shards, options.workers)
        for name, path in files.items():
            work.part(name, partial(copy_file, path))
        if len(shards) > 1:
            write_file(work.tree / INDEX_NAME, index_content(shards))
        write_file(work.tree / _CONFIG, plan.config_bytes())
        work.publish()
    return report


def _not_of_an_export(names: list[str]) -> list[str]:
    if _CONFIG not in names:
        return names
    others = ("iter_", RELEASE, TRACKER, CARRIED_PREFIX)
    return [name for name in names if name.startswith(others)]


def _job(plan: ExportPlan, files: dict[str, Path], options: Options) -> dict[str, Any]:
    folder = plan.checkpoint.folder
    inputs = [folder / ".metadata", *(folder / file for file in plan.checkpoint.files)]
    inputs += plan.carried.weights if plan.carried is not None else []
    return {
        "command": "export",
        "dtype": plan.choice,
        "mtp": plan.config.mtp_num_hidden_layers,
        "outputs": _digest(plan),
        "max_shard_bytes": options.max_shard_bytes,
        "input": fingerprint(inputs),
        "files": fingerprint(files.values()),
    }


def _digest(plan: ExportPlan) -> str:
    """A digest of names, dtypes, shapes and config: a reference can change them."""
    digest = hashlib.sha256(plan.config_bytes())
    for tensor in plan.tensors():
        digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
    return digest.hexdigest()


def _carried(checkpoint: MegatronCheckpoint, reference: Path | None) -> Carried | None:
    if reference is not None:
        names = HFCheckpoint(reference).tensors
        without_mtp = not any(name.startswith(MTP_PREFIX) for name in names)
        return plan_import(reference, no_mtp=without_mtp).carried
    folder = checkpoint.argument("qwen35_origin")
    return read_carried(checkpoint.root / folder) if folder else None


def _config(checkpoint: MegatronCheckpoint, carried: Carried | None) -> Qwen35Config:
    try:
        config = recorded_config(checkpoint)
    except ConfigError as error:
        raise CheckpointError(
            "the checkpoint's own config is malformed", got=f"{checkpoint.folder}: {error}"
        ) from error
    original = Qwen35Config.from_hf(carried.config) if carried is not None else None
    if config is not None and original is not None:
        return _into_wrapper(config, original)
    known = config or original
    if known is None:
        raise CheckpointError(
            "the checkpoint does not say which model it is",
            got=str(checkpoint.folder),
            fix="it was not written by this package: give --reference HF_DIR",
        )
    return known


def _check_same_tower(trained: Qwen35Config | None, config: Qwen35Config) -> None:
    """A tower that was trained is exported under the description that it was trained with: no
    shape says how many heads it has, or which tokens stand for images."""
    if not config.is_vision_language:
        raise CheckpointError(
            "the checkpoint holds a vision tower, and the original is a text model",
            got=f"model_type {config.model_type}",
            fix="name the vision-language folder with --reference; transformers' text class "
            "(AutoModelForCausalLM) loads what is exported, too",
        )
    if trained is None or not trained.is_vision_language:
        return
    ours, theirs = VisionConfig.of(trained), VisionConfig.of(config)
    if differ := tower_differences(ours, theirs):
        raise CheckpointError(
            "the original has another vision tower than what was trained",
            got=", ".join(f"{name} {getattr(theirs, name)}" for name in differ),
            allowed=", ".join(f"{name} {getattr(ours, name)}" for name in differ),
            fix="name the folder that the run began with: --reference HF_DIR",
        )


def _carries_vision(carried: Carried | None) -> bool:
    names = [tensor.name for tensor in carried.tensors] if carried is not None else []
    return any(name.startswith(VISION_PREFIX) for name in names)


def _without_vision(carried: Carried | None) -> Carried | None:
    """What is carried beside a tower that was trained."""
    if carried is None:
        return None
    kept = [one for one in carried.tensors if not one.name.startswith(VISION_PREFIX)]
    return replace(carried, tensors=kept)


def _into_wrapper(config: Qwen35Config, original: Qwen35Config) -> Qwen35Config:
    """A trained text model with the Hugging Face keys that the original carried around it."""
    if config.text_model_type != original.text_model_type:
        raise CheckpointError(
            "the original is of another kind than what was trained",
            got=f"{config.model_type}, original {original.model_type}",
        )
    return replace(
        config,
        model_type=original.model_type,
        carried=original.carried,
        carried_outer=original.carried_outer,
    )


def _need_mtp(naming: Naming, checkpoint: MegatronCheckpoint, no_mtp: bool) -> None:
    if naming.mtp and not has_mtp(checkpoint) and not no_mtp:
        raise CheckpointError(
            "the original has an MTP layer and the checkpoint does not",
            fix="it was trained without; --no-mtp exports it so",
        )


def _need_main_parameters(checkpoint: MegatronCheckpoint) -> None:
    narrow = [key for key in model_keys(checkpoint) if checkpoint.tensors[key].dtype.itemsize < 4]
    without = [key for key in narrow if main_parameter(checkpoint, key) is None]
    # an import has no optimizer: there the tensors themselves are all there is
    if without and checkpoint.common.get("iteration"):
        raise CheckpointError(
            f"{len(without)} tensors have no float32 main parameter in the checkpoint",
            got=without[0],
            fix="save with the optimizer state and --dist-ckpt-optim-fully-reshardable, "
            "or export with --dtype checkpoint",
        )


def _set_dtype(content: dict[str, Any], dtype: torch.dtype) -> None:
    for level in _levels(content):
        for key in ("dtype", "torch_dtype"):
            if key in level:
                level[key] = str(dtype).removeprefix("torch.")
    if "dtype" not in content and "torch_dtype" not in content:
        content["dtype"] = str(dtype).removeprefix("torch.")


def _levels(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield content
    if isinstance(content.get("text_config"), dict):
        yield content["text_config"]
