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

from checkpoint_tools.accounting import account
from checkpoint_tools.convert import Options, Report, copy_file, fingerprint
from checkpoint_tools.hf_folder import INDEX_NAME
from checkpoint_tools.hf_io import HFCheckpoint
from checkpoint_tools.hf_write import Output, index_content, plan_shards, write_shard
from checkpoint_tools.manifest import Work, refuse_overlap, write_file
from checkpoint_tools.mcore_io import MegatronCheckpoint
from checkpoint_tools.names import Naming
from checkpoint_tools.origin import Origin, read_origin
from checkpoint_tools.progress import Progress
from checkpoint_tools.tensor_names import HEAD, MTP_PREFIX
from checkpoint_tools.tokenizer import OtherFiles, other_files_of, set_special_ids
from checkpoint_tools.views import DtypeChoice, ModelView, has_mtp, main_parameter, model_keys
from checkpoint_tools.workers import run_parallel
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import CheckpointError, ConfigError

_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """A Megatron checkpoint and everything that its Hugging Face folder will hold."""

    checkpoint: MegatronCheckpoint
    view: ModelView
    config: Qwen35Config
    origin: Origin | None
    other: OtherFiles
    choice: DtypeChoice

    def outputs(self) -> list[Output]:
        """Every tensor of the result."""
        view = self.view
        outputs = [
            Output(name, view.dtype(name), view.shape(name), partial(view.pieces, name))
            for name in view.names()
        ]
        if self._has_copied_head():
            embedding = outputs[0]
            outputs.append(replace(embedding, name=HEAD))
        if self.origin and self.origin.carried:
            carried = self.origin.carried
            outputs += [
                Output(
                    name, carried.dtype(name), carried.shape(name), partial(carried.pieces, name)
                )
                for name in self.origin.carried_names
            ]
        return outputs

    def _has_copied_head(self) -> bool:
        """Whether the tied original had its embedding twice: transformers reads both."""
        origin = self.origin
        if origin is None or not self.config.tie_word_embeddings:
            return False
        return HEAD in origin.dtypes and HEAD not in origin.carried_names

    def config_bytes(self) -> bytes:
        """The config.json: the original where it says the truth, else with what differs."""
        content, original = self._config_content()
        set_special_ids(content, self.other.special_ids)
        if original and self.choice == "original":
            assert self.origin is not None
            if content == json.loads(self.origin.config.read_text()):
                return self.origin.config.read_bytes()
        else:
            _set_dtype(content, self._main_dtype())
        return json.dumps(content, indent=2).encode() + b"\n"

    def _config_content(self) -> tuple[dict[str, Any], bool]:
        """The config's keys, and whether they are the original's, MTP layers apart."""
        if self.origin is None:
            return self.config.to_hf(), False
        original = Qwen35Config.from_hf(self.origin.config)
        mtp = self._mtp_layers(original)
        trained = replace(_into_wrapper(self.config, original), mtp_num_hidden_layers=mtp)
        if trained != replace(original, mtp_num_hidden_layers=mtp):
            return trained.to_hf(), False
        content: dict[str, Any] = json.loads(self.origin.config.read_text())
        if trained != original:
            content.get("text_config", content)["mtp_num_hidden_layers"] = mtp
        return content, True

    def _mtp_layers(self, original: Qwen35Config) -> int:
        """What config.json has to say: what is there, as a layer or carried through."""
        carried = self.origin.carried_names if self.origin else ()
        if any(name.startswith(MTP_PREFIX) for name in carried):
            return original.mtp_num_hidden_layers
        return self.config.mtp_num_hidden_layers

    def _main_dtype(self) -> torch.dtype:
        """The dtype of most bytes: transformers loads everything in the dtype of the config."""
        sizes: dict[torch.dtype, int] = {}
        for output in self.outputs():
            sizes[output.dtype] = sizes.get(output.dtype, 0) + output.nbytes
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
    origin = _origin(checkpoint, reference)
    config = _config(checkpoint, origin)
    if origin is not None:
        _need_mtp(origin.naming, checkpoint, no_mtp)
        naming = origin.naming
    naming = naming or Naming.default(config)
    naming = replace(naming, mtp=has_mtp(checkpoint) and not no_mtp)
    config = replace(config, mtp_num_hidden_layers=int(naming.mtp))
    if origin is None and config.is_vision_language:
        raise CheckpointError(
            "the run's config is vision-language and the checkpoint has no vision tower",
            fix="give --reference HF_DIR to take it from there",
        )
    if choice == "float32":
        _need_main_parameters(checkpoint)
    dtypes = origin.dtypes if origin is not None else {}
    view = ModelView(checkpoint, config, naming, dtypes, choice)
    other = other_files_of(checkpoint, origin, by_reference=reference is not None)
    return ExportPlan(
        checkpoint=checkpoint, view=view, config=config, origin=origin, other=other, choice=choice
    )


def export_checkpoint(target: Path, plan: ExportPlan, options: Options) -> Report:
    """Write the Hugging Face folder of a plan.

    Killed at any moment and run again it goes on where it was; the target appears at the end.
    """
    refuse_overlap(plan.checkpoint.folder, target)
    outputs = plan.outputs()
    shards = plan_shards(outputs, options.max_shard_bytes, "model")
    files = plan.other.paths
    report = Report(
        source=str(plan.checkpoint.folder),
        target=str(target),
        tensors=len(outputs),
        bytes=sum(output.nbytes for output in outputs),
        carried=len(plan.origin.carried_names) if plan.origin else 0,
        files=sorted([*shards, *files, _CONFIG]),
        notes=[plan.other.note] if plan.other.note else [],
    )
    if options.dry_run:
        return report
    work = Work(target, _job(plan, files, options), overwrite=options.overwrite)
    if work.finished_before():
        return report
    with work, Progress(report.bytes, "export", quiet=options.quiet) as progress:

        def write(file: str) -> None:
            if work.finished(file):
                progress.advance(sum(output.nbytes for output in shards[file]))
            work.part(file, lambda stream: write_shard(stream, shards[file], progress.advance))

        run_parallel(write, shards, options.workers)
        for name, path in files.items():
            work.part(name, partial(copy_file, path))
        if len(shards) > 1:
            write_file(work.tree / INDEX_NAME, index_content(shards))
        write_file(work.tree / _CONFIG, plan.config_bytes())
        work.publish()
    return report


def _job(plan: ExportPlan, files: dict[str, Path], options: Options) -> dict[str, Any]:
    folder = plan.checkpoint.folder
    inputs = [folder / ".metadata", *(folder / file for file in plan.checkpoint.files)]
    if plan.origin is not None and plan.origin.carried is not None:
        carried = plan.origin.carried
        inputs += [carried.folder / file for file in carried.files]
    return {
        "command": "export",
        "dtype": plan.choice,
        "mtp": plan.config.mtp_num_hidden_layers,
        "outputs": _digest(plan),
        "max_shard_bytes": options.max_shard_bytes,
        "input": fingerprint(inputs),
        "files": fingerprint(list(files.values())),
    }


def _digest(plan: ExportPlan) -> str:
    """A digest of names, dtypes, shapes and config: a reference can change them."""
    digest = hashlib.sha256(plan.config_bytes())
    for output in plan.outputs():
        digest.update(f"{output.name} {output.dtype} {output.shape}\n".encode())
    return digest.hexdigest()


def _origin(checkpoint: MegatronCheckpoint, reference: Path | None) -> Origin | None:
    if reference is not None:
        names = HFCheckpoint(reference).tensors
        without_mtp = not any(name.startswith(MTP_PREFIX) for name in names)
        return account(reference, no_mtp=without_mtp).origin
    recorded = checkpoint.argument("qwen35_origin")
    return read_origin(checkpoint.root / recorded) if recorded else None


def _config(checkpoint: MegatronCheckpoint, origin: Origin | None) -> Qwen35Config:
    recorded = checkpoint.argument("qwen35_hf_config")
    if not recorded and origin is None:
        raise CheckpointError(
            "the checkpoint does not say which model it is",
            got=str(checkpoint.folder),
            fix="it was not written by this package: give --reference HF_DIR",
        )
    original = Qwen35Config.from_hf(origin.config) if origin is not None else None
    if not recorded:
        assert original is not None
        return original
    try:
        config = Qwen35Config.from_hf(json.loads(recorded))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            "the checkpoint's own config is malformed", got=f"{checkpoint.folder}: {error}"
        ) from error
    return config if original is None else _into_wrapper(config, original)


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
