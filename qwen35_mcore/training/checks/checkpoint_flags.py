"""Flags about checkpoints that megatron would drop in silence, or trip over after hours."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

from qwen35_mcore.errors import ConfigError


def check_checkpoint_flags(args: Namespace) -> None:
    """Refuse flags about saving and starting that cannot do what they ask for.

    Raises:
        ConfigError: with the first of them.
    """
    _check_intervals(args)
    _check_async(args)
    _check_non_persistent(args)
    _check_start(args)
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise ConfigError(
            "--override-opt-param-scheduler takes the schedule of the flags, and "
            "--use-checkpoint-opt-param-scheduler the checkpoint's",
            fix="drop one of them",
        )
    if args.optimizer == "sgd" and args.use_distributed_optimizer:
        raise ConfigError(
            "megatron's distributed optimizer cannot save or load the state of SGD",
            got="--optimizer sgd --use-distributed-optimizer",
            fix="drop --use-distributed-optimizer"
            + (" and --bf16" if args.bf16 else "")
            + ", or pass --optimizer adam",
        )


def _check_intervals(args: Namespace) -> None:
    for name in ("save_interval", "save_retain_interval", "non_persistent_save_interval"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(
                f"{_name(name)} counts steps",
                got=f"{_name(name)} {value}",
                allowed="1 or more",
                fix="drop the flag, and --save where nothing is to be saved",
            )


def _check_async(args: Namespace) -> None:
    if not args.async_save:
        return
    if not args.use_persistent_ckpt_worker:
        raise ConfigError(
            "without its worker, megatron saves in step and drops --async-save",
            fix="pass --use-persistent-ckpt-worker, or drop --async-save",
        )
    if args.async_strategy == "nvrx" and not importlib.util.find_spec("nvidia_resiliency_ext"):
        raise ConfigError(
            "--async-save takes NVIDIA's resiliency extension, which is not installed",
            got=f"--async-strategy {args.async_strategy}",
            allowed="nvrx with the package nvidia-resiliency-ext, or mcore",
            fix="pass --async-strategy mcore",
        )


def _check_non_persistent(args: Namespace) -> None:
    """Megatron keeps the one of the highest iteration, not the last one written: after a run has
    gone back to an earlier iteration it removes the one that its tracker names."""
    for name in ("non_persistent_save_interval", "non_persistent_ckpt_type"):
        value = getattr(args, name)
        if value is not None:
            raise ConfigError(
                "checkpoints beside those of --save are not supported: megatron may remove the "
                "last one before the next is complete, and takes one past --ckpt-step",
                got=f"{_name(name)} {value}",
                fix="drop the flag; to save often and keep few, pass --save-interval N and "
                "--save-retain-interval M: of the older ones, multiples of M stay",
            )


def _check_start(args: Namespace) -> None:
    for name in ("ckpt_step", "override_ckpt_iteration"):
        value = getattr(args, name)
        if value is None:
            continue
        if value < 1:
            raise ConfigError(
                f"{_name(name)} names an iteration, and they count from 1",
                got=f"{_name(name)} {value}",
                fix="drop the flag; to begin at iteration 0 with a checkpoint's weights pass "
                "--finetune",
            )
        if not args.load:
            raise ConfigError(
                f"{_name(name)} is about the checkpoints of --load",
                got="no --load",
                fix=f"pass --load, or drop {_name(name)}",
            )
    if args.override_ckpt_iteration is not None and args.finetune:
        raise ConfigError(
            "--finetune begins at iteration 0, so there is none to override",
            got=f"--finetune --override-ckpt-iteration {args.override_ckpt_iteration}",
            fix="drop one of them",
        )


def _name(flag: str) -> str:
    return "--" + flag.replace("_", "-")
