"""What tests on one GPU have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Process groups of this process alone, unless a test before it has left some."""
    from tests.bench.common import start

    was_running = torch.distributed.is_initialized()
    start()
    yield
    if not was_running:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference by the norm of ``b``, in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())
