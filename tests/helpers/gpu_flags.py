"""Flags of a run on a GPU, parsed where there is none."""

from __future__ import annotations

import functools
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.mcore import nccl_ep
from qwen35_mcore.training.arguments import read_flags


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)


@functools.cache
def parsed() -> Namespace:
    return parsed_anew()


def parsed_anew(*words: str) -> Namespace:
    """A bf16 run on a GPU of these words."""
    needed = ["--bf16", "--moe-token-dispatcher-type", "alltoall"]
    return read_flags([*needed, *words], get_flavor("tiny-moe"), on_cpu=False)


def run(**more: Any) -> Namespace:
    """A bf16 run on a GPU with graphs left to the package, as it is parsed."""
    args = parsed()
    assert more.keys() <= vars(args).keys() | {"rank"}
    return Namespace(**(vars(args) | {"rank": 0} | more))


@pytest.fixture(scope="module")
def megatron_of_a_gpu() -> Iterator[None]:
    """megatron's checks of a run on eight GPUs with everything installed."""
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.moe import moe_utils
    from megatron.training import arguments

    place = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}
    place |= {"NVTE_CPU_OFFLOAD_V1": "1"}
    fused = ("permute", "permute_with_probs", "unpermute", "sort_chunks_by_index")
    hopper = Namespace(major=9, minor=0)
    patches = [mock.patch.dict(os.environ, place)]
    for module in (arguments, transformer_config):
        patches.append(mock.patch.object(module, "is_te_min_version", return_value=True))
    for name in (*fused, "sort_chunks_by_index_with_probs"):
        patches.append(mock.patch.object(moe_utils, f"fused_{name}"))
    patches += [
        mock.patch.object(nccl_ep, "unavailable", return_value=None),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=hopper),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
