"""Flags about checkpoints that would be dropped in silence: refused, with advice that passes."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.errors import CheckpointError, ConfigError
from qwen35_mcore.mcore.checkpoint_files import TRACKER, tracked_folder
from qwen35_mcore.training.checks.checkpoint import Start, check_start
from qwen35_mcore.training.checks.checkpoint_flags import check_checkpoint_flags
from qwen35_mcore.training.checks.resume import check_resume


def arguments(**changes: Any) -> Namespace:
    values: dict[str, Any] = dict.fromkeys(
        (*("save_retain_interval", "ckpt_step", "override_ckpt_iteration"),)
    )
    values |= dict.fromkeys(
        (
            *("finetune", "bf16"),
            *("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"),
        ),
        False,
    )
    values |= {
        "save": "run",
        "load": "run",
        "save_interval": 10,
        "optimizer": "adam",
        "use_distributed_optimizer": True,
    }
    return Namespace(**values | changes)


@pytest.mark.parametrize(
    "given",
    [
        {},
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
        ({"optimizer": "sgd"}, "fix: drop --use-distributed-optimizer, or"),
        ({"optimizer": "sgd", "bf16": True}, "drop --use-distributed-optimizer and --bf16"),
        ({"save_interval": 0}, "got: --save-interval 0"),
        ({"save_retain_interval": -1}, "allowed: 1 or more"),
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


@pytest.mark.parametrize("finetune", [False, True])
def test_pretrained_weights_beside_a_run_that_goes_on(
    tmp_path: Path, finetune: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not read, which is said; to begin again at their expense is refused."""
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    args = arguments(load=str(tmp_path), pretrained_checkpoint="P", finetune=finetune, rank=0)
    with pytest.raises(CheckpointError) as caught:
        check_start(args, get_flavor("tiny-moe"))
    if finetune:
        assert "drop --finetune to go on from iter_0000004" in str(caught.value)
    else:
        assert "goes on from iter_0000004; --pretrained-checkpoint P" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"9" * 5000, b"\xff\xfe", b"-2", b"2.0", b"", "folder", "link"]
)
def test_a_tracker_that_names_no_iteration(tmp_path: Path, content: bytes | str) -> None:
    tracker = tmp_path / TRACKER
    if content == "folder":
        tracker.mkdir()
    elif content == "link":
        tracker.symlink_to(TRACKER)
    else:
        assert isinstance(content, bytes)
        tracker.write_bytes(content)
    assert tracked_folder(tmp_path) is None


@pytest.mark.parametrize("text", ["2\r\n", "  2 \n\n", "0000002"])
def test_white_space_in_a_tracker(tmp_path: Path, text: str) -> None:
    (tmp_path / TRACKER).write_bytes(text.encode())
    assert tracked_folder(tmp_path) == tmp_path / "iter_0000002"


def test_other_positions_than_the_checkpoints_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = get_flavor("tiny-moe")
    other = replace(config, rope_parameters=replace(config.rope_parameters, rope_theta=5e5))
    saved = {"args": Namespace(qwen35_hf_config=json.dumps(config.to_hf()))}
    start = Start(Path("release"), saved, iteration=0, loads_optimizer=False)
    for model in (config, other):
        given = {"qwen35_hf_config": json.dumps(model.to_hf()), "rank": 0}
        check_resume(arguments(**given), start)
    assert capsys.readouterr().out.count("> rope_parameters: ") == 1
