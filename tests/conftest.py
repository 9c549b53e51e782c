"""Shared fixtures, the rule for tests that need a GPU, and the order of files."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

from tests.helpers.kinds import PROFILES

if TYPE_CHECKING:  # the process that only hands out the tests needs no torch
    from tests.helpers.distributed import WorkerPool

for name, max_examples in PROFILES.items():
    settings.register_profile(
        name,
        deadline=None,  # no test depends on how fast a machine is
        max_examples=max_examples,
        derandomize="CI" in os.environ,  # a change fails by itself there, not by a new example
    )
settings.load_profile("quick")

READ_BY_COMMANDS = (
    *("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "COLUMNS", "TERMINAL_WIDTH"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PRESET", "DATA", "SAVE", "LOAD", "PRETRAINED", "TENSORBOARD", "SCRIPT", "NPROC", "LOGS"),
    *("SAVE_INTERVAL", "PREFLIGHT", "MAX_FAILURES", "CONTAINER", "SRUN_FLAGS"),
    *("QWEN35_RUN_DIR", "QWEN35_TRACEBACK"),
)
"""Variables that a shell, a CI or a job sets for itself, and that would change what tests see."""
for name in list(os.environ):
    if name in READ_BY_COMMANDS or name.startswith(("SLURM_", "PET_")):
        del os.environ[name]

FIRST = ("distributed", "conversion", "cli", "parity", "unit")
"""Folders by how long their longest file takes, so that no worker is left alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which files are handed out."""
    here = Path(__file__).parent
    items.sort(key=lambda item: FIRST.index(item.path.relative_to(here).parts[0]))
    if any(item.get_closest_marker("gpu") for item in items):
        _skip_what_needs_a_gpu(items)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported is not looked through again while tests run


def _skip_what_needs_a_gpu(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def pool() -> WorkerPool:
    """Up to four ranks over gloo, kept for the whole run."""
    from tests.helpers.distributed import worker_pool

    return worker_pool()
