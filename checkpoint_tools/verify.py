"""Compare two checkpoints tensor by tensor, bit for bit, whatever their formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.export import plan_export
from checkpoint_tools.hf_io import HFCheckpoint, is_hf_folder
from checkpoint_tools.hf_write import Output
from checkpoint_tools.mcore_io import MegatronCheckpoint
from checkpoint_tools.model_difference import compare_models
from checkpoint_tools.names import Naming
from checkpoint_tools.progress import Progress
from checkpoint_tools.storage import split_rows
from checkpoint_tools.tensor_names import describe, with_prefix_of
from checkpoint_tools.transforms import Box, common_dtype
from checkpoint_tools.views import aligned, model_keys
from checkpoint_tools.workers import run_parallel
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import CheckpointError


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
    a, b = _sides(first, second, reference, weights_only)
    moved = with_prefix_of(b, a)
    b = {moved.get(name, name): output for name, output in b.items()}
    common = [name for name in a if name in b]
    result = Comparison(
        tensors=len(common),
        bytes=sum(a[name].nbytes for name in common),
        missing=sorted(a.keys() - b.keys()),
        extra=sorted(b.keys() - a.keys()),
    )
    result.config, result.notes = compare_models(first, second, a, b)
    result.notes += [f"B: {note}" for note in describe(moved)]
    with Progress(result.bytes, "verify", quiet=quiet) as progress:

        def check(name: str) -> list[Difference]:
            found = list(_differences(a[name], b[name]))
            progress.advance(a[name].nbytes)
            return found

        for found in run_parallel(check, common, workers):
            result.differences += found
    return result


def _sides(
    first: Path, second: Path, reference: Path | None, weights_only: bool
) -> tuple[dict[str, Output], dict[str, Output]]:
    if not is_hf_folder(first) and not is_hf_folder(second):
        return _by_key(first, weights_only), _by_key(second, weights_only)
    sides = []
    for path, other in ((first, second), (second, first)):
        if is_hf_folder(path):
            sides.append(_by_name(HFCheckpoint(path)))
        else:
            sides.append(_exported(path, other, reference))
    return sides[0], sides[1]


def _by_name(hf: HFCheckpoint) -> dict[str, Output]:
    return {
        name: Output(name, hf.dtype(name), hf.shape(name), partial(hf.pieces, name))
        for name in hf.names()
    }


def _exported(path: Path, hf_folder: Path, reference: Path | None) -> dict[str, Output]:
    hf = HFCheckpoint(hf_folder)
    checkpoint = MegatronCheckpoint(path)
    if reference is None and not checkpoint.argument("qwen35_hf_config"):
        reference = hf_folder
    naming = Naming.detect(Qwen35Config.from_hf(hf_folder), hf.tensors)
    plan = plan_export(path, reference=reference, naming=naming)
    return {output.name: output for output in plan.outputs()}


def _by_key(path: Path, weights_only: bool) -> dict[str, Output]:
    checkpoint = MegatronCheckpoint(path)
    keys = set(model_keys(checkpoint) if weights_only else checkpoint.tensors)

    def pieces(key: str) -> Iterator[torch.Tensor]:
        tensor = checkpoint.tensors[key]
        whole = Box((0,) * len(tensor.shape), tensor.shape)
        for box in split_rows(whole, tensor.dtype.itemsize):
            yield checkpoint.read(key, box)

    return {
        key: Output(key, tensor.dtype, tensor.shape, partial(pieces, key))
        for key, tensor in checkpoint.tensors.items()
        if key in keys
    }


def _differences(a: Output, b: Output) -> Iterator[Difference]:
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


def _count_differences(a: Output, b: Output) -> tuple[int, float]:
    dtype = common_dtype([a.dtype, b.dtype])
    elements, largest, seen = 0, 0.0, 0
    for x, y in aligned(a.pieces(), b.pieces()):
        seen += x.numel()
        # bytes, not numbers: equal NaNs are equal and zeros of two signs are not
        x, y = x.to(dtype).contiguous(), y.to(dtype).contiguous()
        if torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            continue
        wrong = (x.view(torch.uint8) != y.view(torch.uint8)).view(-1, dtype.itemsize).any(1)
        elements += int(wrong.sum())
        largest = max(largest, float((x.double() - y.double()).abs().max()))
    if seen * a.dtype.itemsize != a.nbytes:
        raise CheckpointError(f"{a.name} could not be read to its end", got=f"{seen} elements")
    return elements, largest


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
