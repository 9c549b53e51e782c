"""Compare two checkpoints tensor by tensor, bit for bit, whatever their formats."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.export import plan_export
from checkpoint_tools.files.progress import Progress
from checkpoint_tools.files.workers import run_parallel
from checkpoint_tools.hf.read import HFCheckpoint, is_hf_folder
from checkpoint_tools.hf.tensor_names import describe, with_prefix_of
from checkpoint_tools.mcore.exported import model_keys, recorded_config
from checkpoint_tools.mcore.read import MegatronCheckpoint
from checkpoint_tools.table.names import MTP_PREFIX, Naming
from checkpoint_tools.table.transforms import LazyTensor, common_dtype, same_bits
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig, tower_differences
from qwen35_mcore.errors import CheckpointError, ConfigError

_NOT_COMPUTED_WITH = {
    "carried", "carried_outer", "initializer_range", "attention_dropout", "router_aux_loss_coef",
    "max_position_embeddings", "mtp_num_hidden_layers", "model_type",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What differs between the two versions of one tensor."""

    name: str
    what: str
    """shape, dtype or values."""
    first: str
    second: str
    elements: int = 0
    """How many elements differ."""
    largest: float = 0.0
    """The largest absolute difference of two elements."""


@dataclass(kw_only=True)
class Comparison:
    """The result of a verification."""

    tensors: int
    bytes: int
    differences: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """In the first, not in the second."""
    extra: list[str] = field(default_factory=list)
    """In the second, not in the first."""
    config: list[str] = field(default_factory=list)
    """Fields of the two models' configs that change what the model computes, and differ."""
    notes: list[str] = field(default_factory=list)
    """What was taken in another way than it lies there, and what a difference comes from."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.differences or self.missing or self.extra or self.config)

    def as_json(self) -> dict[str, Any]:
        """Plain values, `equal` included."""
        return {"equal": self.equal, **asdict(self)}


def compare(
    first: Path,
    second: Path,
    *,
    reference: Path | None = None,
    weights_only: bool = False,
    workers: int = 2,
    quiet: bool = False,
) -> Comparison:
    """Compare all tensors: names, shapes, dtypes, bits; and the configs, where both have one.

    A Megatron checkpoint is compared as the Hugging Face tensors that it exports to, with what it
    carries; two Megatron checkpoints are compared by their own keys, optimizer state included
    unless ``weights_only``.

    Raises:
        CheckpointError: one of the two is no usable checkpoint.
    """
    a = _side(first, second, reference, weights_only)
    b = _side(second, first, reference, weights_only)
    moved = with_prefix_of(b, a)
    b = {moved.get(name, name): output for name, output in b.items()}
    common = [name for name in a if name in b]
    result = Comparison(
        tensors=len(common),
        bytes=sum(a[name].nbytes for name in common),
        missing=sorted(a.keys() - b.keys()),
        extra=sorted(b.keys() - a.keys()),
    )
    result.config, result.notes = _compare_models(first, second, a, b)
    result.notes += [f"B: {note}" for note in describe(moved)]
    with Progress(result.bytes, "verify", quiet=quiet) as progress:

        def check(name: str) -> list[Difference]:
            found = list(_differences(a[name], b[name]))
            progress.advance(a[name].nbytes)
            return found

        for found in run_parallel(check, common, workers):
            result.differences += found
    return result


def _side(
    path: Path, other: Path, reference: Path | None, weights_only: bool
) -> dict[str, LazyTensor]:
    if is_hf_folder(path):
        hf = HFCheckpoint(path)
        tensors = hf.lazy(hf.tensors)
    elif is_hf_folder(other):
        tensors = _exported(path, other, reference)
    else:
        tensors = _by_key(path, weights_only)
    return {tensor.name: tensor for tensor in tensors}


def _exported(path: Path, hf_folder: Path, reference: Path | None) -> list[LazyTensor]:
    hf = HFCheckpoint(hf_folder)
    checkpoint = MegatronCheckpoint(path)
    if reference is None and not checkpoint.argument("qwen35_hf_config"):
        reference = hf_folder
    naming = Naming.detect(Qwen35Config.from_hf(hf_folder), hf.tensors)
    return plan_export(path, reference=reference, naming=naming).tensors()


def _by_key(path: Path, weights_only: bool) -> list[LazyTensor]:
    checkpoint = MegatronCheckpoint(path)
    keys = model_keys(checkpoint) if weights_only else checkpoint.tensors
    return [checkpoint.lazy(key) for key in keys]


def _differences(a: LazyTensor, b: LazyTensor) -> Iterator[Difference]:
    if a.shape != b.shape:
        yield Difference(
            name=a.name, what="shape", first=str(list(a.shape)), second=str(list(b.shape))
        )
        return
    if a.dtype != b.dtype:
        yield Difference(name=a.name, what="dtype", first=_short(a.dtype), second=_short(b.dtype))
    elements, largest = _count_differences(a, b)
    if elements:
        yield Difference(
            name=a.name,
            what="values",
            first=_short(a.dtype),
            second=_short(b.dtype),
            elements=elements,
            largest=largest,
        )


def _count_differences(a: LazyTensor, b: LazyTensor) -> tuple[int, float]:
    dtype = common_dtype([a.dtype, b.dtype])
    elements, largest, seen = 0, 0.0, 0
    for x, y in _aligned(a.pieces(), b.pieces()):
        seen += x.numel()
        # bytes, not numbers: equal NaNs are equal and zeros of two signs are not
        x, y = x.to(dtype).contiguous(), y.to(dtype).contiguous()
        if same_bits(x, y):
            continue
        wrong = (x.view(torch.uint8) != y.view(torch.uint8)).view(-1, dtype.itemsize).any(1)
        elements += int(wrong.sum())
        largest = max(largest, float((x.double() - y.double()).abs().max()))
    if seen * a.dtype.itemsize != a.nbytes:
        raise CheckpointError(f"{a.name} could not be read to its end", got=f"{seen} elements")
    return elements, largest


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _aligned(
    first: Iterator[torch.Tensor], second: Iterator[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two sequences of pieces of equal total size, cut at the same places and flattened."""
    a = b = torch.empty(0)
    while True:
        if not a.numel():
            a = next(first, torch.empty(0)).reshape(-1)
        if not b.numel():
            b = next(second, torch.empty(0)).reshape(-1)
        count = min(a.numel(), b.numel())
        if not count:
            return
        yield a[:count], b[:count]
        a, b = a[count:], b[count:]


def _compare_models(
    first: Path, second: Path, names: Collection[str], other_names: Collection[str]
) -> tuple[list[str], list[str]]:
    """Config fields that differ (``rope_theta: 1 / 2``), and notes.

    The MTP layer counts as what is there: a config that promises one that the folder lacks is said,
    and is no difference of the models.
    """
    differences: list[str] = []
    notes: list[str] = []
    sides = [("A", first, names), ("B", second, other_names)]
    configs = [_config(path) for _, path, _ in sides]
    if configs[0] is not None and configs[1] is not None:
        a, b = (config.to_text_only() for config in configs if config is not None)
        for one in fields(Qwen35Config):
            x, y = getattr(a, one.name), getattr(b, one.name)
            if one.name not in _NOT_COMPUTED_WITH and x != y:
                differences.append(f"{one.name}: {_shown(x)} / {_shown(y)}")
        differences += _towers(*(config for config in configs if config is not None))
    has_mtp = [any(name.startswith(MTP_PREFIX) for name in given) for _, _, given in sides]
    for (side, path, _), config, there in zip(sides, configs, has_mtp, strict=True):
        if is_hf_folder(path):
            notes += [f"{side}: {note}" for note in HFCheckpoint(path).notes]
        if config is not None and config.mtp_num_hidden_layers and not there:
            notes.append(f"{side}: the config has an MTP layer that is not there")
    if has_mtp[0] != has_mtp[1]:
        notes.append(f"{'B' if has_mtp[0] else 'A'} has no MTP layer")
    return differences, notes


def _towers(a: Qwen35Config, b: Qwen35Config) -> Iterator[str]:
    """Keys of two vision-language configs around the text model that change what is computed. A
    text model has none of them, and its missing tensors say so."""
    if not (a.is_vision_language and b.is_vision_language):
        return
    try:
        x, y = VisionConfig.of(a), VisionConfig.of(b)
    except ConfigError:  # carried, and nothing that this package computes with
        first, second = (config.carried_outer.get("vision_config") for config in (a, b))
        if first != second:
            yield f"vision_config: {_shown(first)} / {_shown(second)}"
        return
    for name in tower_differences(x, y):
        yield f"vision {name}: {_shown(getattr(x, name))} / {_shown(getattr(y, name))}"


def _config(path: Path) -> Qwen35Config | None:
    """The config of a folder or checkpoint; None where it has none that can be read."""
    try:
        if is_hf_folder(path):
            return Qwen35Config.from_hf(path)
        return recorded_config(MegatronCheckpoint(path))
    except ConfigError:
        return None


def _shown(value: object) -> str:
    return json.dumps(value, default=str)
