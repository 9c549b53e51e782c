"""Flags about checkpoints that would be dropped in silence: refused, with advice that passes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.checks.checkpoint_flags import check_checkpoint_flags


def arguments(**changes: Any) -> Namespace:
    values: dict[str, Any] = dict.fromkeys(
        (
            *("save_retain_interval", "non_persistent_save_interval", "non_persistent_ckpt_type"),
            *("ckpt_step", "override_ckpt_iteration"),
        )
    )
    values |= dict.fromkeys(
        (
            *("async_save", "use_persistent_ckpt_worker", "finetune", "bf16"),
            *("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"),
        ),
        False,
    )
    values |= {
        "save": "run",
        "load": "run",
        "save_interval": 10,
        "async_strategy": "nvrx",
        "optimizer": "adam",
        "use_distributed_optimizer": True,
    }
    return Namespace(**values | changes)


ASYNC = {"async_save": True, "async_strategy": "mcore"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        ASYNC | {"use_persistent_ckpt_worker": True},
        {"optimizer": "sgd", "use_distributed_optimizer": False},
        {"save_retain_interval": 100},
        {"ckpt_step": 5},
        {"override_ckpt_iteration": 2},
        {"use_checkpoint_opt_param_scheduler": True},
    ],
)
def test_what_passes(given: dict[str, Any]) -> None:
    check_checkpoint_flags(arguments(**given))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (ASYNC, "pass --use-persistent-ckpt-worker"),
        ({"optimizer": "sgd"}, "fix: drop --use-distributed-optimizer, or"),
        ({"optimizer": "sgd", "bf16": True}, "drop --use-distributed-optimizer and --bf16"),
        ({"save_interval": 0}, "got: --save-interval 0"),
        ({"save_retain_interval": -1}, "allowed: 1 or more"),
        ({"non_persistent_save_interval": 5}, "--save-retain-interval M"),
        ({"non_persistent_ckpt_type": "local"}, "got: --non-persistent-ckpt-type local"),
        ({"ckpt_step": 0}, "count from 1"),
        ({"ckpt_step": 5, "load": None}, "pass --load, or drop --ckpt-step"),
        ({"override_ckpt_iteration": 2, "load": None}, "pass --load"),
        ({"override_ckpt_iteration": 2, "finetune": True}, "drop one of them"),
        (
            {"use_checkpoint_opt_param_scheduler": True, "override_opt_param_scheduler": True},
            "drop one of them",
        ),
    ],
)
def test_what_is_refused(given: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_checkpoint_flags(arguments(**given))
    assert part in str(caught.value)


def test_a_worker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = {"async_save": True, "use_persistent_ckpt_worker": True}
    with pytest.raises(ConfigError, match="pass --async-strategy mcore"):
        check_checkpoint_flags(arguments(**given))
    check_checkpoint_flags(arguments(**given, async_strategy="mcore"))
