"""Keep the restored random state of a resumed run while its data loaders start."""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _keeping_random_state(original: Any) -> Any:
    def build_train_valid_test_data_iterators(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        try:
            return original(*args, **kwargs)
        finally:
            torch.set_rng_state(state)

    return build_train_valid_test_data_iterators


def _probe() -> Verdict:
    """Does a loader draw from the state when it starts?"""
    before = torch.get_rng_state()
    iter(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1))))
    return shows(not torch.equal(before, torch.get_rng_state()))


PATCH = Patch(
    name="seed of data loaders",
    target="megatron.training.training:build_train_valid_test_data_iterators",
    why="loaders draw a seed when they start, also after a resume has restored the random state",
    replace=_keeping_random_state,
    probe=_probe,
)
