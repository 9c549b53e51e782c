"""Whether the checkpoint that a run wants to start from is there, whole, and of this model."""

from __future__ import annotations

import json
import os
import warnings
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import CheckpointError, ConfigError
from qwen35_mcore.mcore import imports
from qwen35_mcore.mcore.checkpoint_files import (
    TRACKER,
    complete_checkpoints,
    damage,
    iteration_folder,
    recover,
    tracked_folder,
)

MAY_DIFFER = (
    *("model_type", "carried", "carried_outer"),  # how the model is packaged
    *("max_position_embeddings", "rope_parameters"),  # changed on purpose for longer contexts
    *("router_aux_loss_coef", "attention_dropout", "initializer_range"),  # of training only
)
"""Fields of the config in which a run may differ from the checkpoint it continues."""


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from."""

    folder: Path
    common: dict[str, Any]
    """What it holds beside tensors: ``args``, ``iteration``, ``opt_param_scheduler``, ..."""
    iteration: int
    """Where the run goes on; 0 where it takes the weights alone."""
    loads_optimizer: bool

    @property
    def saved(self) -> Any:
        """The arguments of the run that saved it."""
        return self.common["args"]

    @property
    def resumes(self) -> bool:
        """Whether the run goes on at the checkpoint's iteration."""
        return self.iteration > 0

    @property
    def carried(self) -> str:
        """Name of the folder beside it with what its import kept unconverted; often empty."""
        return str(getattr(self.saved, "qwen35_origin", ""))

    @property
    def tokenizer(self) -> str:
        """Name of the folder beside it that holds the tokenizer of its data; often empty."""
        return str(getattr(self.saved, "qwen35_tokenizer", ""))


def check_start(args: Namespace, model_config: Qwen35Config) -> Start | None:
    """Check ``--load``, ``--pretrained-checkpoint`` and ``--ckpt-step``; None to start from random.

    ``--load`` may name an empty folder only where ``--save`` names the same one: that is how a job
    that is queued again and again starts for the first time.

    Raises:
        CheckpointError: nothing to load where something must be, a damaged checkpoint, or one of
            another architecture; or it holds a vision tower and the run trains none, or the other
            way round.
    """
    folder, resumes = _starting_point(args)
    if folder is None:
        return None
    problem = damage(folder)
    if problem is not None:
        raise CheckpointError(
            "the checkpoint to start from is not complete",
            got=problem,
            allowed=_others(folder),
            fix="choose another one with --ckpt-step N"
            if complete_checkpoints(folder.parent)
            else "name another folder, or, to start from random weights, an empty one",
        )
    common = _common_state(folder)
    model = Qwen35Config.from_hf(json.loads(common["args"].qwen35_hf_config))
    check_same_model(model, folder, model_config)
    _check_tower(args, folder, bool(getattr(common["args"], "qwen35_vision", False)))
    if args.qwen35_vision:
        check_same_tower(model, folder, model_config)
    if not resumes or folder.name == "release" or args.finetune:
        return Start(folder, common, 0, loads_optimizer=False)
    iteration = args.override_ckpt_iteration
    return Start(
        folder,
        common,
        common["iteration"] if iteration is None else iteration,
        loads_optimizer=not (args.no_load_optim or args.skip_train),
    )


def _starting_point(args: Namespace) -> tuple[Path | None, bool]:
    """The folder to start from, and whether the run would go on at its iteration."""
    load = Path(args.load) if args.load else None
    if load is not None:
        recover(load)
    if load is not None and args.ckpt_step:
        _refuse_two_starts(args, load)
        return iteration_folder(load, args.ckpt_step), True
    folder = tracked_folder(load) if load is not None else None
    if folder is not None:
        _say_what_is_not_read(args, folder)
        return folder, True
    if load is not None:
        _refuse_untracked(load)
    if args.pretrained_checkpoint:
        return _pretrained(Path(args.pretrained_checkpoint)), False
    if load is not None and not _same_folder(args.load, args.save):
        raise CheckpointError(
            "--load names a folder without a checkpoint",
            got=f"{load} ({'no tracker file ' + TRACKER if load.is_dir() else 'does not exist'})",
            allowed="a run's checkpoint folder, or the folder that --save names",
            fix="correct the path, or drop --load to start from random weights",
        )
    return None, False


def _refuse_two_starts(args: Namespace, load: Path) -> None:
    """Without a tracker in --load, megatron takes the other one."""
    if args.pretrained_checkpoint and not (load / TRACKER).exists():
        raise CheckpointError(
            "--ckpt-step is about --load, which has no tracker file yet, so the run would start "
            "from --pretrained-checkpoint",
            got=f"--ckpt-step {args.ckpt_step} --load {load}",
            fix="drop --ckpt-step to start from the pretrained weights, or drop "
            "--pretrained-checkpoint to go on from that iteration",
        )


def _say_what_is_not_read(args: Namespace, folder: Path) -> None:
    """A job that is queued again names both and goes on from its own checkpoints."""
    if not args.pretrained_checkpoint:
        return
    if args.finetune:
        raise CheckpointError(
            "--load has checkpoints, so --finetune would begin again with their weights and "
            "--pretrained-checkpoint would not be read",
            got=f"--finetune --load {args.load} --pretrained-checkpoint "
            f"{args.pretrained_checkpoint}",
            fix=f"drop --finetune to go on from {folder.name}, or name another folder with --load "
            "and --save to begin with the pretrained weights",
        )
    if args.rank == 0:
        print(
            f"> --load {args.load} goes on from {folder.name}; --pretrained-checkpoint "
            f"{args.pretrained_checkpoint} is not read",
            flush=True,
        )


def _refuse_untracked(load: Path) -> None:
    """Checkpoints without a usable tracker: starting from scratch beside them is never meant."""
    there = complete_checkpoints(load)
    if there or (load / TRACKER).exists():
        raise CheckpointError(
            "the folder of --load does not say which checkpoint to start from",
            got=f"{load / TRACKER}: {'unreadable' if (load / TRACKER).exists() else 'missing'}",
            allowed=_others(load / "none"),
            fix="choose one with --ckpt-step N, or name an empty folder to start from scratch",
        )


def _pretrained(path: Path) -> Path:
    folder = tracked_folder(path)
    if folder is None:
        raise CheckpointError(
            "--pretrained-checkpoint names a folder without a checkpoint",
            got=f"{path} ({'no tracker file ' + TRACKER if path.is_dir() else 'does not exist'})",
            allowed=f"a folder with {TRACKER}, as `qwen35-ckpt import` writes it, or one of "
            "Hugging Face's with config.json and safetensors",
            fix="correct the path",
        )
    return folder


def check_same_model(saved: Qwen35Config, folder: Path, model_config: Qwen35Config) -> None:
    """Check that a checkpoint's model is the run's.

    Raises:
        CheckpointError: they differ in the architecture.
    """
    names = [f.name for f in fields(Qwen35Config) if f.name not in MAY_DIFFER]
    different = [name for name in names if getattr(saved, name) != getattr(model_config, name)]
    if different:
        raise CheckpointError(
            f"the checkpoint in {folder} is of a different model",
            got=_values(saved, different),
            allowed=_values(model_config, different),
            fix="choose the --flavor, --hf-config and --override it was trained with, or another "
            "checkpoint",
        )


def check_same_tower(saved: Qwen35Config, folder: Path, model_config: Qwen35Config) -> None:
    """Check that a checkpoint's vision tower is the run's.

    Raises:
        CheckpointError: they differ, or the checkpoint's model has none.
    """
    try:
        there, here = VisionConfig.of(saved), VisionConfig.of(model_config)
    except ConfigError as error:
        raise CheckpointError(
            f"the model in {folder} has no vision tower to train",
            got=error.what,
            fix="drop --vision, or name a vision-language checkpoint",
        ) from error
    names = [f.name for f in fields(VisionConfig) if f.name != "initializer_range"]
    different = [name for name in names if getattr(there, name) != getattr(here, name)]
    if different:
        raise CheckpointError(
            f"the checkpoint in {folder} is of a different vision tower",
            got=_values(there, different),
            allowed=_values(here, different),
            fix="choose the --hf-config that it was trained with, or another checkpoint",
        )


def _check_tower(args: Namespace, folder: Path, there: bool) -> None:
    """A checkpoint has the tower among its tensors where a run with --vision saved it."""
    if there == args.qwen35_vision:
        return
    imported = folder.name == "release"
    if there:
        raise CheckpointError(
            "the checkpoint holds a vision tower, and this run trains the text model alone: what "
            "it saved would be without",
            got=str(folder),
            fix="pass --vision; or "
            + (
                "import the model without --vision, which carries the tower along"
                if imported
                else "export it with `qwen35-ckpt export` and start from that folder, with "
                "--pretrained-checkpoint: its tower is carried along"
            ),
        )
    raise CheckpointError(
        "the checkpoint holds no vision tower: it is of the text model alone",
        got=str(folder),
        fix="drop --vision; or "
        + (
            "import the model with `qwen35-ckpt import --vision`"
            if imported
            else "export it with `qwen35-ckpt export`, which puts the carried tower in its place, "
            "and start from that folder, with --pretrained-checkpoint"
        ),
    )


def _common_state(folder: Path) -> dict[str, Any]:
    load_common_state_dict = imports.load_common_state_dict
    try:
        with warnings.catch_warnings():  # torch doubts that one process is meant
            warnings.simplefilter("ignore")
            common: dict[str, Any] = load_common_state_dict(str(folder))
    except Exception as error:
        raise CheckpointError(
            f"the common state of {folder} cannot be read",
            got=f"{type(error).__name__}: {error}",
            fix="choose another checkpoint with --ckpt-step N",
        ) from error
    if not hasattr(common.get("args"), "qwen35_hf_config"):
        raise CheckpointError(
            "the checkpoint was not written by this package",
            got=str(folder),
            allowed="a checkpoint of qwen35_mcore.training or of `qwen35-ckpt import`",
            fix="export it to a Hugging Face folder and import that",
        )
    return common


def _values(model_config: Qwen35Config | VisionConfig, names: list[str]) -> str:
    return ", ".join(f"{name} {_plain(getattr(model_config, name))}" for name in names)


def _plain(value: Any) -> str:
    return " ".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def _others(folder: Path) -> str:
    names = [other.name for other in complete_checkpoints(folder.parent) if other != folder]
    return f"complete in {folder.parent}: {', '.join(names) or 'none'}"


def _same_folder(a: str | None, b: str | None) -> bool:
    return bool(a and b) and os.path.realpath(str(a)) == os.path.realpath(str(b))
