"""Shared fixtures, the rule for tests that need a GPU, and who runs beside whom."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from tests.helpers.distributed import WorkerPool, worker_pool

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

RANKS = Path(__file__).parent / "distributed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n`: everything in tests/distributed first, on one worker; beside it file by file, and
    what needs a GPU on one worker, too."""
    items.sort(key=lambda item: not item.path.is_relative_to(RANKS))
    for item in items:
        group = "ranks" if item.path.is_relative_to(RANKS) else str(item.path)
        gpu = item.get_closest_marker("gpu")
        item.add_marker(pytest.mark.xdist_group("gpu" if gpu else group))
    if not torch.cuda.is_available():
        _skip_what_needs_a_gpu(items)


def _skip_what_needs_a_gpu(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def pool() -> WorkerPool:
    """Up to four ranks over gloo, kept for the whole run."""
    return worker_pool()
