"""What stands in for CUDA's streams, tensors and random states on a machine without it.

Functions of this module take what they replace and return what takes its place.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.jit import _builtins

CPU = torch.device("cpu")


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


def value(result: Any) -> Callable[[Any], Any]:
    """Replace a function by one that ignores its arguments and returns ``result``."""
    return lambda original: lambda *args, **kwargs: result


def replaced_by(new: Any) -> Callable[[Any], Any]:
    return lambda original: new


def made_as(stand_in: type) -> Callable[[Any], Any]:
    """The ``__new__`` of a class that stays what it is, and whose instances are ``stand_in``'s."""
    return lambda original: lambda cls, *args, **kwargs: stand_in()


class _View:
    """A module with some attributes replaced, for one importer of it."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def torch_with_cuda(**replaced: Any) -> Callable[[Any], Any]:
    """A megatron module's own view of torch, with other functions in ``torch.cuda``."""
    return lambda original: _View(original, cuda=_View(original.cuda, **replaced))


def torch_with_cuda_devices_on_cpu(original: Any) -> Any:
    """A megatron module's own view of torch, where a CUDA device by any name is the CPU."""

    def device(*args: Any, **kwargs: Any) -> torch.device:
        is_cuda = bool(args) and isinstance(args[0], str) and args[0].startswith("cuda")
        return CPU if is_cuda else torch.device(*args, **kwargs)

    return _View(original, device=device)


def torch_that_gathers_at_once(original: Any) -> Any:
    """A megatron module's own view of torch, where a gather into a tensor never goes on beside the
    computation."""

    def all_gather_into_tensor(*args: Any, async_op: bool = False, **kwargs: Any) -> NullEvent:
        torch.distributed.all_gather_into_tensor(*args, **kwargs)
        return NullEvent()

    gathering = _View(original.distributed, all_gather_into_tensor=all_gather_into_tensor)
    return _View(original, distributed=gathering)


def one_by_one(original: Any) -> Callable[..., Any]:
    """torch's ``_coalescing_manager``, which puts no collectives together."""
    return lambda *args, **kwargs: contextlib.nullcontext(NullEvent())


class MeshOnCPU:
    """A DeviceMesh of process groups for CUDA devices is one for the CPU."""

    @staticmethod
    def from_group(groups: Any, device_type: str, **kwargs: Any) -> torch.distributed.DeviceMesh:
        return torch.distributed.DeviceMesh.from_group(groups, "cpu", **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def made_from_data(original: Callable[..., Any]) -> Callable[..., Any]:
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


def tensor_to_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
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


def gathering_unequal_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    """All-gather along the first dimension, of parts that differ from rank to rank, as an exchange:
    gloo gathers equal parts only."""

    def gather(input_: Any, group: Any, output_split_sizes: Any = None, *rest: Any) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, *rest)
        ranks, length = group.size(), len(input_)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        sent = torch.cat([input_] * ranks)
        torch.distributed.all_to_all_single(
            output, sent, output_split_sizes, [length] * ranks, group=group
        )
        return output

    return gather


def reducing_unequal_parts(original: Callable[..., Any]) -> Callable[..., Any]:
    """The reverse of `gathering_unequal_parts`: every rank's part, summed in the order of ranks."""

    def reduce_scatter(input_: Any, group: Any, input_split_sizes: Any = None, *rest: Any) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, *rest)
        ranks, length = group.size(), input_split_sizes[group.rank()]
        parts = input_.new_empty(ranks * length, *input_.shape[1:])
        torch.distributed.all_to_all_single(
            parts, input_.contiguous(), [length] * ranks, input_split_sizes, group=group
        )
        return parts.unflatten(0, (ranks, length)).sum(dim=0)

    return reduce_scatter


def norm_in_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    """The norm of lists of gradients, as the kernels for GPUs compute it."""

    def l2_norm(chunk: int, flag: Any, lists: list[list[torch.Tensor]], *more: Any) -> Any:
        return original(chunk, flag, [[grad.float() for grad in one] for one in lists], *more)

    return l2_norm


def with_module(name: str, **contents: Any) -> Callable[[Any], Any]:
    """Let a function import a module, with its packages, that stands for one of a GPU machine."""
    packages = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = {
                package: sys.modules[package] for package in packages if package in sys.modules
            }
            sys.modules.update({package: types.ModuleType(package) for package in packages})
            sys.modules[name].__dict__.update(contents)
            try:
                return original(*args, **kwargs)
            finally:
                for package in packages:
                    del sys.modules[package]
                sys.modules.update(before)

        return call

    return replace


def returning_self(original: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


def seed(seed: int) -> Any:
    return torch.default_generator.manual_seed(int(seed))


def get_rng_state(original: Any) -> Callable[..., torch.Tensor]:
    return lambda device="cuda": torch.get_rng_state()


def set_rng_state(original: Any) -> Callable[..., None]:
    return lambda state, *args, **kwargs: torch.set_rng_state(state)


def split_sizes_on_cpu(original: Any) -> Callable[..., Any]:
    """The tensor is on the CPU already; what callers rely on is the conversion to numpy."""

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.detach().numpy()
        return tensor

    return maybe_move_tensor_to_cpu
