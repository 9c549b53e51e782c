"""CPU mode finds what it replaces on the installed release, and keeps kernels for GPUs out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35_mcore.mcore.cpu_mode import GPU_PACKAGES
from qwen35_mcore.mcore.cpu_replacements import MEGATRON, TORCH, TRAINING
from qwen35_mcore.mcore.replacement import Replacement
from tests.helpers.distributed import WorkerPool

TARGETS = [replacement.target for replacement in (*TORCH, *MEGATRON, *TRAINING)]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_replaced_exists(target: str, pool: WorkerPool) -> None:
    assert pool.run(exists, 1, target=target) == [True]


def test_that_test_can_fail(pool: WorkerPool) -> None:
    assert pool.run(exists, 1, target="torch.cuda:no_such_name") == [False]


def exists(target: str) -> bool:
    owner, attribute = Replacement(target=target, why="", replace=id).owner_and_attribute()
    return hasattr(owner, attribute)


def test_packages_for_gpus_stay_out(tmp_path: Path) -> None:
    """Where GPUs are hidden they can be imported, and megatron would call them with CPU tensors."""
    for package in GPU_PACKAGES:
        (tmp_path / f"{package}.py").write_text("raise RuntimeError('imported in CPU mode')")
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(tmp_path), str(root)])
    done = subprocess.run(
        [sys.executable, "-m", "qwen35_mcore.training.pretrain", "--help"],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning of an import stands before the help
    assert "--flavor" in done.stdout
