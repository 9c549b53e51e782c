"""Numbers that megatron divides by, counts with, or ignores without a message when they are 0."""

from __future__ import annotations

import math
from argparse import Namespace

from qwen35_mcore.errors import ConfigError

_ENDING = "_interval"
SEEDS = 2**32
"""numpy takes no larger ones."""
MOST_SAMPLES = 10**11
"""Far beyond any corpus; 16 bytes of memory each."""
_AT_LEAST = {
    **dict.fromkeys(("micro_batch_size", "global_batch_size", "seq_length", "train_samples"), 1),
    **dict.fromkeys(("eval_micro_batch_size", "eval_global_batch_size"), 1),
    **dict.fromkeys(("num_dataset_builder_threads", "exit_duration_in_mins"), 1),
    **dict.fromkeys(("eval_iters", "num_workers", "start_eval_at_iter"), 0),
    **dict.fromkeys(("mid_level_dataset_surplus", "lr_warmup_iters", "lr_warmup_samples"), 0),
    "recompute_num_layers": 1,
    "muon_num_ns_steps": 1,
    **dict.fromkeys(("seed", "vocab_size", "distributed_timeout_minutes"), 1),
    **dict.fromkeys(("manual_gc_interval", "inference_logging_step_interval"), 0),  # 0: never
}
_FINITE = (
    *("lr", "min_lr", "lr_warmup_init", "decoupled_lr", "decoupled_min_lr", "clip_grad"),
    "weight_decay",
    *("muon_extra_scale_factor", "mtp_loss_scaling_factor"),
    *("moe_aux_loss_coeff", "moe_z_loss_coeff", "embedding_init_method_std"),
)
_BELOW_ONE = (
    *("adam_beta1", "adam_beta2", "sgd_momentum", "muon_momentum", "lion_beta1", "lion_beta2"),
    "moe_input_jitter_eps",
)
_OFF = {
    "eval_interval": "pass --eval-iters 0 to turn evaluation off",
    "save_interval": "drop --save to save nothing",
    "tensorboard_log_interval": "drop --tensorboard-dir to write no TensorBoard log",
    "log_interval": "pass a large one to log rarely",
}


def check_numbers(args: Namespace) -> None:
    """Check steps between things, sizes, amounts and rates.

    Raises:
        ConfigError: with the first that is out of its range.
    """
    lowest = {name: 1 for name in vars(args) if name.endswith(_ENDING)} | _AT_LEAST
    lowest["train_iters"] = 0 if getattr(args, "skip_train", False) else 1
    for name, least in lowest.items():
        value = getattr(args, name, None)
        fraction = isinstance(value, float) and name.endswith(_ENDING)  # seconds
        if value is None or fraction or value >= least:
            continue
        flag = "--" + name.replace("_", "-")
        fix = _OFF.get(name)
        if name.endswith(_ENDING) and fix is None:
            fix = f"drop {flag} to leave out what it is for"
        raise ConfigError(
            f"{flag} is too small",
            got=f"{flag} {value}",
            allowed=f"at least {least}",
            fix=fix or f"pass {flag} {least} or more",
        )
    _check_samples(args)
    for name in (*_FINITE, *_BELOW_ONE):
        _check_range(args, name, math.inf if name in _FINITE else 1.0)
    _check_range(args, "adam_eps", math.inf, at_least=math.ulp(0.0))  # the divisor of no gradient
    if not (getattr(args, "moe_expert_capacity_factor", None) or 0) < 0:  # megatron's word for none
        _check_range(args, "moe_expert_capacity_factor", math.inf, at_least=math.ulp(0.0))
    _check_range(args, "seed", SEEDS)


def _check_samples(args: Namespace) -> None:
    """megatron lists every sample of a run before it begins."""
    steps, batch = getattr(args, "train_iters", None), getattr(args, "global_batch_size", None)
    samples = getattr(args, "train_samples", None) or (steps or 0) * (batch or 1)
    if samples > MOST_SAMPLES:
        raise ConfigError(
            "the run would read more samples than can be listed",
            got=f"{samples:,}, of --train-samples, or of --train-iters and --global-batch-size",
            allowed=f"up to {MOST_SAMPLES:,}",
            fix="shorten it; --exit-duration-in-mins ends a run by the clock",
        )


def _check_range(args: Namespace, name: str, below: float, at_least: float = 0.0) -> None:
    given = getattr(args, name, None)
    values = given if isinstance(given, list) else [given]
    if all(value is None or at_least <= value < below for value in values):
        return
    flag = "--" + name.replace("_", "-")
    raise ConfigError(
        f"{flag} is out of range",
        got=" ".join(map(str, [flag, *values])),
        allowed=("above 0, " if at_least else "at least 0, ")
        + ("finite" if below == math.inf else f"below {below:.0f}"),
        fix="correct it"
        + (", or pass --clip-grad 0 to turn clipping off" if "clip" in name else ""),
    )
