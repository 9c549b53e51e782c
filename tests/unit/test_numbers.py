"""Numbers out of their range are refused by the flag that gave them."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

import pytest

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.arguments import choose_model
from qwen35_mcore.training.checks.numbers import check_numbers


def test_numbers_that_are_too_small() -> None:
    intervals = ("log_interval", "eval_interval", "save_interval", "exit_interval")
    for name in (*intervals, "train_iters", "recompute_num_layers"):
        for value in (0, -1):
            with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is too small"):
                check_numbers(Namespace(**{name: value}))
    for name in ("eval_iters", "lr_warmup_iters"):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} -1"):
            check_numbers(Namespace(**{name: -1}))
    check_numbers(Namespace(eval_iters=0, manual_gc_interval=0, log_interval=1, save_interval=None))


def test_more_samples_than_can_be_listed() -> None:
    for given in ({"train_iters": 10**9, "global_batch_size": 101}, {"train_samples": 10**12}):
        with pytest.raises(ConfigError, match="allowed: up to 100,000,000,000"):
            check_numbers(Namespace(**given))
    check_numbers(Namespace(train_iters=10**9, global_batch_size=100))


@pytest.mark.parametrize("text", ["num_experts=" + "9" * 5000, "layer_types=" + "[" * 5000])
def test_overrides_that_json_cannot_hold(text: str) -> None:
    with pytest.raises(ConfigError, match=f"{text.partition('=')[0]} must be"):
        choose_model("tiny-moe", None, [text])


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("lr", [0.0, 1.0], [-1.0, math.inf, math.nan]),
        ("weight_decay", [0.0, 0.1], [-1.0, math.inf, math.nan]),
        ("clip_grad", [0.0, 5.0], [-1.0, math.nan]),
        ("adam_beta1", [0.0, 0.9], [-0.1, 1.0, 2.0, math.nan]),
        ("sgd_momentum", [0.0, 0.9], [1.0]),
        ("seed", [1, 2**32 - 1], [-1, 0, 2**32]),
        ("vocab_size", [1, None], [0]),
        ("adam_eps", [1e-15], [0.0, -1e-8, math.nan]),
        ("moe_aux_loss_coeff", [0.0, 0.1], [-1.0, math.nan]),
        ("moe_z_loss_coeff", [None, 1e-3], [-1.0, math.inf]),
        ("mtp_loss_scaling_factor", [0.0, 0.3], [-1.0, math.nan]),
        ("moe_input_jitter_eps", [None, 0.01], [-0.1, 5.0, math.nan]),
        ("moe_expert_capacity_factor", [None, -1.0, 0.5], [0.0, math.nan]),
    ],
)
def test_numbers_out_of_their_range(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_numbers(Namespace(**{name: value}))
    for value in bad:
        with pytest.raises(ConfigError, match=f"got: --{name.replace('_', '-')} {value}"):
            check_numbers(Namespace(**{name: value}))


def test_one_of_several_coefficients_out_of_its_range() -> None:
    check_numbers(Namespace(moe_aux_loss_coeff=[0.01, 0.02]))
    with pytest.raises(ConfigError, match=r"got: --moe-aux-loss-coeff 0\.01 -1\.0\n"):
        check_numbers(Namespace(moe_aux_loss_coeff=[0.01, -1.0]))
