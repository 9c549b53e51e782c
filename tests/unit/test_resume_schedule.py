"""When two schedules count as one: they give the same rates from here to the end of the run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore.errors import CheckpointError, ConfigError
from qwen35_mcore.training.checks.checkpoint import Start
from qwen35_mcore.training.checks.resume_schedule import check_schedule, schedule_of_flags

BATCH = 4


def arguments(**changes: Any) -> Namespace:
    """100 steps of 4 samples with a warm-up of 10, as megatron's validation leaves them."""
    values: dict[str, Any] = {
        "lr": 1e-3,
        "min_lr": 0.0,
        "lr_decay_style": "linear",
        "lr_decay_iters": None,
        "lr_decay_samples": None,
        "lr_warmup_iters": 10,
        "lr_warmup_samples": 0,
        "lr_warmup_fraction": None,
        "lr_warmup_init": 0.0,
        "lr_wsd_decay_style": "exponential",
        "lr_wsd_decay_iters": 20,
        "lr_wsd_decay_samples": None,
        "start_weight_decay": 0.1,
        "end_weight_decay": 0.1,
        "weight_decay_incr_style": "constant",
        "train_iters": 100,
        "train_samples": None,
        "global_batch_size": BATCH,
        "override_opt_param_scheduler": False,
        "use_checkpoint_opt_param_scheduler": False,
    }
    return Namespace(**values | changes)


def start(saved: Namespace, iteration: int) -> Start:
    """A checkpoint of that iteration; its schedule as megatron's scheduler would write it."""
    schedule = {
        "max_lr": saved.lr,
        "min_lr": saved.min_lr,
        "lr_warmup_steps": saved.lr_warmup_iters * BATCH,
        "lr_decay_steps": (saved.lr_decay_iters or saved.train_iters) * BATCH,
        "lr_decay_style": saved.lr_decay_style,
        "start_wd": saved.start_weight_decay,
        "end_wd": saved.end_weight_decay,
        "wd_incr_steps": saved.train_iters * BATCH,
        "wd_incr_style": saved.weight_decay_incr_style,
        "num_steps": iteration * BATCH,
    }
    common = {"args": saved, "iteration": iteration, "opt_param_scheduler": schedule}
    return Start(Path("run/iter"), common, iteration, loads_optimizer=True)


CONSTANT = {"lr_decay_style": "constant"}
RISING = {"start_weight_decay": 0.0, "weight_decay_incr_style": "linear"}


@pytest.mark.parametrize(
    ("saved", "iteration", "now"),
    [
        ({}, 50, {}),
        (CONSTANT, 50, {"train_iters": 200}),
        (CONSTANT, 50, {"train_iters": 60}),
        (CONSTANT, 50, {"lr_warmup_iters": 20, "min_lr": 1e-5}),
        ({"lr_decay_iters": 40, "min_lr": 1e-4}, 50, {"train_iters": 200}),
        ({"lr_decay_iters": 80}, 50, {"train_iters": 200}),
        ({}, 50, {"lr_warmup_init": 1e-5}),
        ({}, 50, {"train_iters": None, "train_samples": 400, "lr_warmup_samples": 40}),
        (CONSTANT, 100, {"lr": 5e-4}),  # nothing left to train
        ({"lr_decay_style": "WSD"}, 50, {}),
    ],
)
def test_schedules_that_are_one(saved: dict[str, Any], iteration: int, now: dict[str, Any]) -> None:
    """Megatron's own comparison, field by field, must not stop the run either."""
    args = arguments(**saved | now)
    check_schedule(args, start(arguments(**saved), iteration))
    assert args.override_opt_param_scheduler


@pytest.mark.parametrize(
    ("saved", "iteration", "now", "part"),
    [
        ({}, 50, {"train_iters": 200}, "lr_decay_steps 800 (the checkpoint's: 400)"),
        ({}, 50, {"lr": 5e-4}, "max_lr 0.0005 (the checkpoint's: 0.001)"),
        (CONSTANT, 5, {"lr_warmup_iters": 20}, "lr_warmup_steps 80"),
        ({}, 50, {"min_lr": 1e-4}, "min_lr 0.0001"),
        ({}, 50, {"lr_decay_style": "cosine"}, "lr_decay_style cosine"),
        ({"lr_decay_style": "WSD"}, 50, {"lr_wsd_decay_iters": 30}, "wsd_decay_steps 120"),
        (CONSTANT, 50, {"start_weight_decay": 0.0, "end_weight_decay": 0.0}, "end_wd 0.0"),
        (CONSTANT | RISING, 50, {"train_iters": 200}, "wd_incr_steps 800"),
        ({}, 50, {"global_batch_size": 8}, "lr_decay_steps 800"),
    ],
)
def test_schedules_that_are_two(
    saved: dict[str, Any], iteration: int, now: dict[str, Any], part: str
) -> None:
    """The error says what differs; each of the flags that it offers ends it."""
    checkpoint = start(arguments(**saved), iteration)
    with pytest.raises(CheckpointError, match="differs from the checkpoint's") as caught:
        check_schedule(arguments(**saved | now), checkpoint)
    assert part in str(caught.value)
    check_schedule(arguments(**saved | now, override_opt_param_scheduler=True), checkpoint)
    args = arguments(**saved | now, use_checkpoint_opt_param_scheduler=True)
    check_schedule(args, checkpoint)
    for name in ("lr", "min_lr", "lr_decay_style"):
        assert getattr(args, name) == getattr(checkpoint.saved, name)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            {"start_weight_decay": 1.0},
            ["--start-weight-decay 1.0, --end-weight-decay 0.1", "--end-weight-decay >= --start-"],
        ),
        ({"lr_warmup_init": 1.0}, ["--lr-warmup-init 1.0", "--lr-warmup-init <= --lr"]),
        ({"min_lr": -1.0}, ["--min-lr -1.0", "--min-lr >= 0.0"]),
        ({"lr_decay_iters": 0}, ["length of the decay 0", "length of the decay > 0"]),
        ({"lr_decay_iters": 10}, ["length of the warmup 40, length of the decay 40"]),
    ],
)
def test_flags_that_make_no_schedule(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        schedule_of_flags(arguments(**given))
    for part in parts:
        assert part in str(refused.value)


def test_the_rates_that_the_error_names_are_those_of_steps() -> None:
    """Step 51 of 100 takes what step 50 set; the last one takes what step 99 set."""
    checkpoint = start(arguments(lr_warmup_iters=0), 50)
    with pytest.raises(CheckpointError) as caught:
        check_schedule(arguments(lr_warmup_iters=0, lr=2e-3), checkpoint)
    assert "the flags' schedule (learning rate 0.001 at the next step, 2e-05 at the last)" in str(
        caught.value
    )
    assert "the checkpoint's (learning rate 0.0005 at the next step, 1e-05 at the last)" in str(
        caught.value
    )
