"""Run megatron-core and megatron.training on a machine without CUDA, over gloo.

megatron-core 0.19 asks CUDA for devices, streams, events and random states at some sixty places.
This module is the one answer to all of them: a table of replacements, each with the reason why it
is needed, applied only where no CUDA device exists. On a GPU machine `enable` refuses to run.

Call :func:`enable` before megatron is imported (some modules read ``torch.cuda`` at import). The
canary test walks :data:`TORCH_PATCHES` and :data:`MEGATRON_PATCHES` and fails as soon as one of the
patched attributes disappears.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.optim import FusedAdam

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """One replaced attribute: ``owner`` is a module, or ``module:Class`` for a class attribute."""

    owner: str
    attribute: str
    make: Callable[[Any], Any]  # original -> replacement
    reason: str

    def target(self) -> Any:
        """The object that carries the attribute; raises ImportError or AttributeError if gone."""
        module_name, _, class_name = self.owner.partition(":")
        module = importlib.import_module(module_name)
        return getattr(module, class_name) if class_name else module

    def apply(self) -> None:
        target = self.target()
        setattr(target, self.attribute, self.make(getattr(target, self.attribute)))


class NullStream:
    """Stands in for torch.cuda.Stream: operations on a CPU are synchronous."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else NullEvent()

    def query(self) -> bool:
        return True

    def __enter__(self) -> NullStream:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NullStream)

    def __hash__(self) -> int:
        return 0


class NullEvent:
    """Stands in for torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any, **kwargs: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _value(result: Any) -> Callable[[Any], Any]:
    """Replace a function by one that ignores its arguments and returns ``result``."""
    return lambda original: lambda *args, **kwargs: result


def _replace(new: Any) -> Callable[[Any], Any]:
    return lambda original: new


def _factory_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory that takes ``device="cuda"`` and ``pin_memory=True`` for the CPU's own."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _tensor_to_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron sorts parameters by ``tensor.type()`` and knows only the ``torch.cuda.*`` names."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_


def _self(original: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


def _seed(original: Any) -> Callable[[int], Any]:
    # torch.manual_seed would call torch.cuda.manual_seed_all again, so seed the generator itself
    return lambda seed: torch.default_generator.manual_seed(int(seed))


def _get_rng_state(original: Any) -> Callable[..., torch.Tensor]:
    return lambda device="cuda": torch.get_rng_state()


def _set_rng_state(original: Any) -> Callable[..., None]:
    return lambda state, *args, **kwargs: torch.set_rng_state(state)


def _split_sizes_on_cpu(original: Any) -> Callable[..., Any]:
    """The tensor is on the CPU already; what callers rely on is the conversion to numpy."""

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.detach().numpy()
        return tensor

    return maybe_move_tensor_to_cpu


_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn"),
    *("randint", "eye", "linspace", "empty_like", "zeros_like", "ones_like", "full_like"),
    *("rand_like", "randn_like", "empty_strided"),
)

_HOPPER = SimpleNamespace(name="cpu", major=9, minor=0, total_memory=0, multi_processor_count=1)
_CAPABILITY_REASON = "argument checks; the local backend runs what they allow on Hopper"

TORCH_PATCHES: tuple[Patch, ...] = (
    Patch("torch.cuda", "current_device", _value(CPU), "used as device= at about sixty sites"),
    Patch("torch.cuda", "device_count", _value(1), "0 would skip model-parallel set-up and seeds"),
    Patch("torch.cuda", "set_device", _value(None), "initialize, async checkpoint worker"),
    Patch("torch.cuda", "synchronize", _value(None), "timers, schedules, checkpointing"),
    Patch("torch.cuda", "empty_cache", _value(None), "training loop"),
    Patch("torch.cuda", "Stream", _replace(NullStream), "DDP, dispatcher, p2p side streams"),
    Patch("torch.cuda", "Event", _replace(NullEvent), "DDP, dispatcher"),
    Patch("torch.cuda", "current_stream", _value(NullStream()), "stream ordering"),
    Patch("torch.cuda", "default_stream", _value(NullStream()), "stream ordering"),
    Patch("torch.cuda", "stream", _value(contextlib.nullcontext()), "with torch.cuda.stream(...)"),
    Patch("torch.cuda", "is_current_stream_capturing", _value(False), "RNG tracker, DDP"),
    Patch("torch.cuda", "manual_seed", _seed, "model-parallel RNG"),
    Patch("torch.cuda", "manual_seed_all", _value(None), "called by torch.manual_seed"),
    Patch("torch.cuda", "get_rng_state", _get_rng_state, "RNG tracker"),
    Patch("torch.cuda", "set_rng_state", _set_rng_state, "RNG tracker"),
    Patch("torch.cuda.random", "get_rng_state", _get_rng_state, "activation recompute"),
    Patch("torch.cuda.random", "set_rng_state", _set_rng_state, "activation recompute"),
    Patch("torch.cuda.nvtx", "range_push", _value(None), "profiling ranges"),
    Patch("torch.cuda.nvtx", "range_pop", _value(None), "profiling ranges"),
    Patch("torch.cuda", "max_memory_allocated", _value(0), "memory report"),
    Patch("torch.cuda", "max_memory_reserved", _value(0), "memory report"),
    Patch("torch.cuda", "memory_allocated", _value(0), "memory report"),
    Patch("torch.cuda", "memory_reserved", _value(0), "memory report"),
    Patch("torch.cuda", "memory_stats", _value({}), "memory report"),
    Patch("torch.cuda", "get_device_capability", _value((9, 0)), _CAPABILITY_REASON),
    Patch("torch.cuda", "get_device_properties", _value(_HOPPER), _CAPABILITY_REASON),
    Patch("torch:Tensor", "cuda", _self, "tensors of the data loader and schedules"),
    Patch("torch:Tensor", "pin_memory", _self, "optimizer offload, checkpoint staging"),
    Patch("torch:Tensor", "record_stream", _value(None), "dispatcher"),
    Patch("torch:Tensor", "to", _tensor_to_on_cpu, 'literal "cuda" devices'),
    Patch("torch:Tensor", "type", _cuda_type_name, "optimizer sorts by torch.cuda type names"),
    Patch("torch.nn:Module", "cuda", _self, "get_model moves every chunk"),
    # A TorchFunctionMode is not enough: it is inactive in backward, where recompute runs.
    *(Patch("torch", n, _factory_on_cpu, 'literal "cuda" devices') for n in _FACTORIES),
)

_OPTIMIZER_REASON = "torch AdamW's per-tensor step breaks distributed-optimizer checkpoints"

MEGATRON_PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_rng_state,
        "reaches for torch.cuda.default_generators",
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _split_sizes_on_cpu,
        "returns CPU tensors untouched, but all_to_all wants split sizes as numbers",
    ),
    Patch("megatron.core.optimizer", "Adam", _replace(FusedAdam), _OPTIMIZER_REASON),
    Patch("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", _replace(False), _OPTIMIZER_REASON),
    Patch(
        "megatron.core.optimizer.distrib_optimizer",
        "HAVE_APEX_OR_TE",
        _replace(True),
        _OPTIMIZER_REASON,
    ),
)

TRAINING_PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.training.training",
        "initialize_megatron",
        lambda original: functools.partial(original, allow_no_cuda=True),
        "asserts that CUDA exists",
    ),
    Patch(
        "megatron.training.training",
        "set_jit_fusion_options",
        _value(None),
        "warms up fused CUDA kernels",
    ),
)

GPU_PACKAGES = ("fla", "transformer_engine", "transformer_engine_torch", "apex", "amp_C")
"""Kernels that megatron and transformers call as soon as they can be imported, for which a GPU
machine whose devices are hidden is enough: the router's matrix product, the norm of the gradients.
"""

_applied: set[str] = set()


def is_needed() -> bool:
    """Whether this machine has no CUDA device, so that CPU mode is the way to run megatron."""
    return not torch.cuda.is_available()


def _apply_once(name: str, patches: tuple[Patch, ...]) -> None:
    if name in _applied:
        return
    for patch in patches:
        patch.apply()
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
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # jit_fuser is torch.compile
    torch._dynamo.config.disable = True
    for package in GPU_PACKAGES:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    _apply_once("torch", TORCH_PATCHES)
    _apply_once("megatron", MEGATRON_PATCHES)
    # It warns when the CPU generator moves inside a CUDA random context; here the two are one.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def enable_training() -> None:
    """:func:`enable`, and what ``megatron.training.pretrain`` needs on top."""
    enable()
    _apply_once("training", TRAINING_PATCHES)
