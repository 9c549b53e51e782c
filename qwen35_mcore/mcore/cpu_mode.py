"""Run megatron-core and megatron.training on a machine without CUDA, over gloo.

megatron-core 0.19 asks CUDA for devices, streams, events and random states at some sixty places.
This module answers all of them, by the tables of `cpu_replacements`, and only where no CUDA device
exists: on a GPU machine `enable` refuses to run.

Only what asks for CUDA changes, so that other libraries may share the process. Tensors that are
asked for on a CUDA device are made by kernels under the dispatcher's CUDA key, which no other call
reaches. A function of ``torch.cuda`` that raises without a device is replaced. One that has an
answer (``is_available``, ``device_count``, ``manual_seed``) keeps it; the megatron module that
needs another answer gets a view of torch of its own.

Call :func:`enable` before megatron is imported: some of its modules read ``torch.cuda`` at import,
and compile their functions. What others in the process do notice: ``tensor.cuda()`` and the like
succeed; `GPU_PACKAGES` that are installed cannot be imported; and ``torch.compile`` compiles
nothing where megatron was imported first, or :func:`enable_training` was called.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore import cpu_replacements
from qwen35_mcore.mcore.cpu_stand_ins import CPU
from qwen35_mcore.mcore.replacement import Replacement

GPU_PACKAGES = ("fla", "transformer_engine", "transformer_engine_torch", "apex", "amp_C")
"""Kernels that megatron and transformers call as soon as they can be imported, for which a GPU
machine whose devices are hidden is enough: the router's matrix product, the norm of the gradients.
"""

_applied: set[str] = set()
_kept: list[torch.library.Library] = []


def is_needed() -> bool:
    """Whether this machine has no CUDA device, so that CPU mode is the way to run megatron."""
    return not torch.cuda.is_available()


def _apply_once(name: str, table: tuple[Replacement, ...]) -> None:
    if name in _applied:
        return
    for replacement in table:
        replacement.apply()
    _applied.add(name)


def enable() -> None:
    """Switch this process to CPU mode; does nothing when called again.

    Raises:
        ConfigError: when a CUDA device exists; CPU mode never loads there.
    """
    if "torch" not in _applied and torch.cuda.is_available():
        raise ConfigError(
            "CPU mode was asked for on a machine with a CUDA device",
            got=torch.cuda.get_device_name(0),
            allowed="machines where torch.cuda.is_available() is False",
            fix="run without CPU mode, or hide the GPUs with CUDA_VISIBLE_DEVICES=",
        )
    # Filled by its first caller, with torch's functions as they are then: what a device context,
    # torch.device("meta") for one, applies to.
    _device_constructors()
    if "torch" not in _applied:
        _make_cuda_tensors_on_cpu()
    _apply_once("torch", cpu_replacements.TORCH)
    _block_gpu_packages()
    with _nothing_compiled():
        _apply_once("megatron", cpu_replacements.MEGATRON)
    # It warns when the CPU generator moves inside a CUDA random context; here the two are one.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def enable_training() -> None:
    """:func:`enable`, and what ``megatron.training.pretrain`` needs on top.

    The process is a training run's own: nothing is compiled in it or in what it starts.
    """
    enable()
    _disable_compiler()
    _apply_once("training", cpu_replacements.TRAINING)


def _make_cuda_tensors_on_cpu() -> None:
    """Factories with a CUDA device give CPU tensors; all of them allocate by these two."""

    def empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
              pin_memory: Any = None, memory_format: Any = None) -> torch.Tensor:  # fmt: skip
        return torch.ops.aten.empty.memory_format(
            size, dtype=dtype, layout=layout, device=CPU, memory_format=memory_format
        )

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None,
                      device: Any = None, pin_memory: Any = None) -> torch.Tensor:  # fmt: skip
        return torch.ops.aten.empty_strided.default(
            size, stride, dtype=dtype, layout=layout, device=CPU
        )

    with warnings.catch_warnings():  # that kernels for a device that is not there are overridden
        warnings.simplefilter("ignore", UserWarning)
        library = torch.library.Library("aten", "IMPL", "CUDA")
        library.impl("empty.memory_format", empty)
        library.impl("empty_strided", empty_strided)
    _kept.append(library)  # its end would take the kernels away


def _block_gpu_packages() -> None:
    for package in GPU_PACKAGES:
        if package not in sys.modules and importlib.util.find_spec(package) is not None:
            sys.modules[package] = None  # type: ignore[assignment]


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Megatron's functions stay as they are written while its modules are imported, and later."""
    if "megatron.core" in sys.modules:
        if "megatron" not in _applied:
            _disable_compiler()  # they are compiled already
        yield
        return
    compile_ = torch.compile
    torch.compile = _leave_as_written  # type: ignore[assignment]
    try:
        from megatron.core import jit
        from megatron.core.transformer.moe import router  # noqa: F401 (compiles by itself)

        jit.disable_jit_fuser()
        yield
    finally:
        torch.compile = compile_


def _leave_as_written(function: Any = None, **options: Any) -> Any:
    return _leave_as_written if function is None else function


def _disable_compiler() -> None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch._dynamo.config.disable = True
