"""Fails when a megatron-core or torch attribute that CPU mode or mcore.imports needs is gone."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from qwen35_mcore.mcore.cpu_mode import (
    GPU_PACKAGES,
    MEGATRON_PATCHES,
    TORCH_PATCHES,
    TRAINING_PATCHES,
    Patch,
)
from tests.helpers.distributed import WorkerPool

ALL = [*TORCH_PATCHES, *MEGATRON_PATCHES, *TRAINING_PATCHES]
MENDED = [
    ("megatron.core.ssm.gated_delta_net.common", "HAVE_FLA"),
    ("megatron.core.ssm.gated_delta_net.common", "_build_head_perm_for_split_sections"),
    ("megatron.core.ssm.gated_delta_net.common", "_build_thd_cp_a2a_perm"),
    ("megatron.core.ssm.gated_delta_net.common", "tensor_a2a_cp2hp"),
    ("megatron.core.ssm.gated_delta_net.common", "get_parameter_local_cp"),
    ("megatron.core.datasets.utils", "compile_helpers"),
    ("megatron.core.datasets.helpers_cpp", "build_sample_idx_int32"),
    ("megatron.training.training", "num_floating_point_operations"),
    ("megatron.training.checkpointing", "maybe_msc"),
]


@pytest.mark.parametrize("patch", ALL, ids=lambda p: f"{p.owner}.{p.attribute}")
def test_patched_attribute_exists(patch: Patch, pool: WorkerPool) -> None:
    assert pool.run(attribute_exists, 1, owner=patch.owner, attribute=patch.attribute) == [True]


@pytest.mark.parametrize(("module", "attribute"), MENDED, ids=lambda x: x)
def test_mended_attribute_exists(module: str, attribute: str, pool: WorkerPool) -> None:
    assert pool.run(attribute_exists, 1, owner=module, attribute=attribute) == [True]


def test_the_canary_can_fail(pool: WorkerPool) -> None:
    assert pool.run(attribute_exists, 1, owner="torch.cuda", attribute="no_such_name") == [False]


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


def test_tested_versions() -> None:
    """CPU mode is pinned to the minor version whose internals it was written against."""
    assert version("megatron-core").startswith("0.19.")


def attribute_exists(owner: str, attribute: str) -> bool:
    module_name, _, class_name = owner.partition(":")
    module = importlib.import_module(module_name)
    return hasattr(getattr(module, class_name) if class_name else module, attribute)
