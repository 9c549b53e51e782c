"""Whether the schedule of learning rate and weight decay goes on as the checkpoint's would have.

Two schedules are compared by their values from here to the end of the run: differences before that
are allowed.
"""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from qwen35_mcore.errors import CheckpointError, ConfigError
from qwen35_mcore.mcore.imports import OptimizerParamScheduler
from qwen35_mcore.mcore.megatron_errors import failed_assertion
from qwen35_mcore.training.checks.checkpoint import Start

FLAGS = {
    "init_lr": "--lr-warmup-init",
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "length of the warmup",
    "lr_decay_steps": "length of the decay",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay",
}
"""Where the values come from that megatron's scheduler asserts on."""

POINTS = 200
"""Steps at which two schedules are compared, beside those where one of them bends."""


def check_schedule(args: Namespace, start: Start) -> None:
    """Refuse another schedule than the checkpoint's, unless a flag says which of them counts.

    With ``--use-checkpoint-opt-param-scheduler`` the rates that the optimizer's parameter groups
    hold become the checkpoint's here, before the optimizer is built from them.

    Raises:
        CheckpointError: the schedules differ between here and the end of the run.
    """
    if not start.loads_optimizer:
        return
    saved = start.common["opt_param_scheduler"]
    if args.use_checkpoint_opt_param_scheduler:
        _take_over(args, start.saved, saved)
        return
    if not args.override_opt_param_scheduler:
        _compare(args, start, saved)
    args.override_opt_param_scheduler = True


def schedule_of_flags(args: Namespace) -> OptimizerParamScheduler:
    """The schedule of a run's validated flags, which megatron builds after the model.

    Raises:
        ConfigError: rates, weight decays or lengths that make no schedule.
    """
    planned = _planned(args)
    try:
        return _scheduler(planned, args)
    except AssertionError as error:
        condition = failed_assertion(error)
        for name, flag in FLAGS.items():
            condition = condition.replace(f"self.{name}", flag)
        given = {flag: {"init_lr": args.lr_warmup_init, **planned}[n] for n, flag in FLAGS.items()}
        raise ConfigError(
            "the flags give no schedule of learning rate and weight decay",
            got=", ".join(f"{flag} {value}" for flag, value in given.items() if flag in condition),
            allowed=condition,
            fix="correct them; lengths of the schedule are in samples here",
        ) from error


def _take_over(args: Namespace, saved: Any, schedule: dict[str, Any]) -> None:
    args.lr, args.min_lr = schedule["max_lr"], schedule["min_lr"]
    for name in ("lr_warmup_init", "lr_decay_style", "lr_wsd_decay_style"):
        setattr(args, name, getattr(saved, name))
    if args.lr_decay_style == "WSD":
        for name in ("lr_wsd_decay_iters", "lr_wsd_decay_samples"):
            setattr(args, name, getattr(saved, name))


def _compare(args: Namespace, start: Start, saved: dict[str, Any]) -> None:
    batch, here = args.global_batch_size, saved["num_steps"]
    end = args.train_samples or here + (args.train_iters - start.iteration) * batch
    if end <= here:
        return
    ours = schedule_of_flags(args)
    theirs = _scheduler(saved | _wsd(start.saved), start.saved)
    stride = max(batch, (end - here) // POINTS // batch * batch)
    points = {*range(here, end + 1, stride), here, here + batch, end}
    points |= {bend for bend in (*_bends(ours), *_bends(theirs)) if here <= bend <= end}
    if all(_at(ours, point) == _at(theirs, point) for point in points):
        return
    # a step takes the rate that the one before it set
    rates, theirs_rates = (_rates(scheduler, here, end - batch) for scheduler in (ours, theirs))
    raise CheckpointError(
        "the schedule of learning rate and weight decay differs from the checkpoint's",
        got=_differences(_planned(args), saved | _wsd(start.saved)),
        fix=f"pass --override-opt-param-scheduler to go on with the flags' schedule ({rates}), or "
        f"--use-checkpoint-opt-param-scheduler to go on with the checkpoint's ({theirs_rates})",
    )


def _planned(args: Namespace) -> dict[str, Any]:
    """The schedule of the flags, counted in samples, as megatron's training derives it."""
    unit, per = ("samples", 1) if args.train_samples else ("iters", args.global_batch_size)
    total = getattr(args, f"train_{unit}") * per
    decay = getattr(args, f"lr_decay_{unit}")
    decay = total if decay is None else decay * per
    fraction = args.lr_warmup_fraction
    warmup = getattr(args, f"lr_warmup_{unit}") * per if fraction is None else fraction * decay
    return {
        "max_lr": float(args.lr),
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_steps": total,
        "wd_incr_style": args.weight_decay_incr_style,
    } | _wsd(args)


def _wsd(args: Any) -> dict[str, Any]:
    """The last decay of a warmup-stable-decay schedule, which no checkpoint's schedule holds."""
    if args.lr_decay_style != "WSD":
        return {"wsd_decay_steps": None, "lr_wsd_decay_style": None}
    unit, per = ("samples", 1) if args.train_samples else ("iters", args.global_batch_size)
    steps = getattr(args, f"lr_wsd_decay_{unit}")
    return {
        "wsd_decay_steps": None if steps is None else steps * per,
        "lr_wsd_decay_style": args.lr_wsd_decay_style,
    }


def _scheduler(schedule: dict[str, Any], args: Any) -> OptimizerParamScheduler:
    values = {name: value for name, value in schedule.items() if name != "num_steps"}
    no_optimizer: Any = SimpleNamespace(param_groups=[])
    return OptimizerParamScheduler(no_optimizer, init_lr=args.lr_warmup_init, **values)


def _bends(scheduler: OptimizerParamScheduler) -> list[int]:
    ends = [scheduler.lr_warmup_steps, scheduler.lr_decay_steps, scheduler.wd_incr_steps]
    ends.append(scheduler.lr_decay_steps - (scheduler.wsd_decay_steps or 0))
    return [bend for end in ends for bend in (int(end), int(end) + 1)]


def _at(scheduler: OptimizerParamScheduler, step: int) -> tuple[float, float]:
    scheduler.num_steps = step
    return scheduler.get_lr({}), scheduler.get_wd()


def _rates(scheduler: OptimizerParamScheduler, *steps: int) -> str:
    first, last = (f"{_at(scheduler, step)[0]:.4g}" for step in steps)
    return f"learning rate {first} at the next step, {last} at the last"


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    names = [name for name in ours if ours[name] != theirs[name]]
    return ", ".join(f"{name} {ours[name]} (the checkpoint's: {theirs[name]})" for name in names)
