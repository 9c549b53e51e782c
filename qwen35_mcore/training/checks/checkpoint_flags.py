"""Checkpoint flags that megatron would ignore without a message, or fail on after hours."""

from __future__ import annotations

from argparse import Namespace

from qwen35_mcore.errors import ConfigError


def check_checkpoint_flags(args: Namespace) -> None:
    """Refuse flags about saving and starting that cannot do what they ask for.

    Raises:
        ConfigError: with the first of them.
    """
    _check_intervals(args)
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
    for name in ("save_interval", "save_retain_interval"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(
                f"{_name(name)} counts steps",
                got=f"{_name(name)} {value}",
                allowed="1 or more",
                fix="drop the flag, and --save where nothing is to be saved",
            )


def _check_start(args: Namespace) -> None:
    for name in ("ckpt_step", "override_ckpt_iteration"):
        value = getattr(args, name)
        if value is None:
            continue
        if value < 1:
            raise ConfigError(
                f"{_name(name)} must be an iteration, and iterations count from 1",
                got=f"{_name(name)} {value}",
                fix="drop the flag; to begin at iteration 0 with a checkpoint's weights pass "
                "--finetune",
            )
        if not args.load:
            raise ConfigError(
                f"{_name(name)} needs --load, whose checkpoints it selects from",
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
