"""Run megatron-core and megatron.training on a machine without CUDA, over gloo.

megatron-core 0.19 asks CUDA for devices, streams, events and random states at some sixty places.
This module is the one answer to all of them: a table of replacements, each with the reason why it
is needed, applied only where no CUDA device exists. On a GPU machine `enable` refuses to run.

Only what asks for CUDA changes, so that other libraries may share the process. Tensors that are
asked for on a CUDA device are made by kernels under the dispatcher's CUDA key, which no other call
reaches. Of ``torch.cuda``, a function is replaced that raises without a device; one that has an
answer (``is_available``, ``device_count``, ``manual_seed``) keeps it, and the megatron module that
wants another gets a view of torch of its own.

Call :func:`enable` before megatron is imported (some modules read ``torch.cuda`` at import, and
compile their functions). What others in the process do notice: ``tensor.cuda()`` and their like
succeed, `GPU_PACKAGES` that are installed cannot be imported, and where megatron was imported
first, or :func:`enable_training` was called, ``torch.compile`` compiles nothing.

The canary test walks the tables of patches and fails as soon as one of the patched attributes
disappears.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch.jit import _builtins
from torch.utils._device import _device_constructors

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.fused_adam import FusedAdam

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
        made = self.make(getattr(target, self.attribute))
        if isinstance(made, FunctionType):  # pickle finds a function by its name
            made.__module__, _, class_name = self.owner.partition(":")
            made.__qualname__ = f"{class_name}.{self.attribute}" if class_name else self.attribute
        setattr(target, self.attribute, made)


class NullStream:
    """An instance of torch.cuda.Stream to whoever asks: operations on a CPU are synchronous."""

    __class__ = torch.cuda.Stream  # type: ignore[assignment]
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
        return type(other) is NullStream

    def __hash__(self) -> int:
        return 0


class NullEvent:
    """An instance of torch.cuda.Event to whoever asks."""

    __class__ = torch.cuda.Event  # type: ignore[assignment]

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


def _made_as(stand_in: type) -> Callable[[Any], Any]:
    """The ``__new__`` of a class that stays what it is, and whose instances are ``stand_in``'s."""
    return lambda original: lambda cls, *args, **kwargs: stand_in()


class _View:
    """A module with some attributes replaced, for one importer of it."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _torch_with_cuda(**replaced: Any) -> Callable[[Any], Any]:
    """A megatron module's own view of torch, with other functions in ``torch.cuda``."""
    return lambda original: _View(original, cuda=_View(original.cuda, **replaced))


def _made_from_data(original: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.tensor`` and ``as_tensor``: ask the driver for the number of a plain "cuda"."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory") and kwargs.get("device") in (None, "cpu", CPU):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    _builtins._register_builtin(factory, _builtins._find_builtin(original))
    return factory


def _tensor_to_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A CUDA device means the CPU, where every tensor is: without another dtype and ``copy=True``
    the tensor itself comes back, not the copy that a GPU would hold."""

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def with_cuda_type_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron sorts parameters by ``tensor.type()`` and knows only the ``torch.cuda.*`` names."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        torch_type = torch.Tensor.type

        def type_(self: torch.Tensor, *to: Any, **options: Any) -> Any:
            if to or options:
                return torch_type(self, *to, **options)
            return torch_type(self).replace("torch.", "torch.cuda.", 1)

        torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
        try:
            return original(*args, **kwargs)
        finally:
            torch.Tensor.type = torch_type  # type: ignore[method-assign]

    return call


def _self(original: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


def _seed(seed: int) -> Any:
    return torch.default_generator.manual_seed(int(seed))


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


_HOPPER = SimpleNamespace(name="cpu", major=9, minor=0, total_memory=0, multi_processor_count=1)
_CAPABILITY_REASON = "argument checks; the local backend runs what they allow on Hopper"

TORCH_PATCHES: tuple[Patch, ...] = (
    Patch("torch.cuda", "_lazy_init", _value(None), "every CUDA tensor begins with it"),
    Patch("torch.cuda", "current_device", _value(CPU), "used as device= at about sixty sites"),
    Patch("torch.cuda", "set_device", _value(None), "initialize, async checkpoint worker"),
    Patch("torch.cuda", "synchronize", _value(None), "timers, schedules, checkpointing"),
    Patch("torch.cuda:Stream", "__new__", _made_as(NullStream), "DDP, dispatcher, p2p streams"),
    Patch("torch.cuda:Event", "__new__", _made_as(NullEvent), "DDP, dispatcher"),
    Patch("torch.cuda", "current_stream", _value(NullStream()), "stream ordering"),
    Patch("torch.cuda", "default_stream", _value(NullStream()), "stream ordering"),
    Patch("torch.cuda", "stream", _value(contextlib.nullcontext()), "with torch.cuda.stream(...)"),
    Patch("torch.cuda", "is_current_stream_capturing", _value(False), "RNG tracker, DDP"),
    Patch("torch.cuda", "get_rng_state", _get_rng_state, "RNG tracker, checkpoints"),
    Patch("torch.cuda", "set_rng_state", _set_rng_state, "RNG tracker, checkpoints"),
    Patch("torch.cuda.random", "get_rng_state", _get_rng_state, "activation recompute"),
    Patch("torch.cuda.random", "set_rng_state", _set_rng_state, "activation recompute"),
    Patch("torch.cuda.nvtx", "range_push", _value(None), "profiling ranges"),
    Patch("torch.cuda.nvtx", "range_pop", _value(None), "profiling ranges"),
    Patch("torch.cuda", "get_device_capability", _value((9, 0)), _CAPABILITY_REASON),
    Patch("torch.cuda", "get_device_properties", _value(_HOPPER), _CAPABILITY_REASON),
    Patch("torch:Tensor", "cuda", _self, "tensors of the data loader and schedules"),
    Patch("torch:Tensor", "pin_memory", _self, "optimizer offload, checkpoint staging"),
    Patch("torch:Tensor", "record_stream", _value(None), "dispatcher"),
    Patch("torch:Tensor", "to", _tensor_to_on_cpu, 'literal "cuda" devices'),
    Patch("torch.nn:Module", "cuda", _self, "get_model moves every chunk"),
    Patch("torch", "tensor", _made_from_data, 'literal "cuda" devices'),
    Patch("torch", "as_tensor", _made_from_data, 'literal "cuda" devices'),
)

_OPTIMIZER_REASON = "torch AdamW's per-tensor step breaks distributed-optimizer checkpoints"

_TYPE_REASON = "sorts parameters by names that begin with torch.cuda"

MEGATRON_PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.tensor_parallel.random",
        "torch",
        _torch_with_cuda(manual_seed=_seed),
        "seeds the model-parallel random states",
    ),
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
    Patch(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
        "__init__",
        with_cuda_type_names,
        _TYPE_REASON,
    ),
    Patch(
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params",
        "__init__",
        with_cuda_type_names,
        _TYPE_REASON,
    ),
    Patch(
        "megatron.core.optimizer.optimizer",
        "clip_grad_by_total_norm_fp32",
        with_cuda_type_names,
        _TYPE_REASON,
    ),
)

TRAINING_PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.training.initialize",
        "torch",
        _torch_with_cuda(device_count=lambda: 1),
        "0 would skip model-parallel set-up and seeds",
    ),
    Patch(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "torch",
        _torch_with_cuda(device_count=lambda: 1),
        "the process that saves beside the training divides by it, and a run waits for it for ever",
    ),
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
_kept: list[torch.library.Library] = []


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
    # Filled by its first caller, with torch's functions as they are then: what a device context,
    # torch.device("meta") for one, applies to.
    _device_constructors()
    if "torch" not in _applied:
        _make_cuda_tensors_on_cpu()
    _apply_once("torch", TORCH_PATCHES)
    _block_gpu_packages()
    with _nothing_compiled():
        _apply_once("megatron", MEGATRON_PATCHES)
    # It warns when the CPU generator moves inside a CUDA random context; here the two are one.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def enable_training() -> None:
    """:func:`enable`, and what ``megatron.training.pretrain`` needs on top.

    The process is a training run's own: nothing is compiled in it or in what it starts.
    """
    enable()
    _disable_compiler()
    _apply_once("training", TRAINING_PATCHES)


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
