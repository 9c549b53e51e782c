"""Invertible re-arrangements between two groups of tensors, as lists of box copies.

A transform is nothing but the boxes that are copied, so its inverse is the same list read the other
way, a writer can take the boxes as its chunks, and "each element exactly once" is a property that a
test checks on the list itself. The two boxes of a copy hold the same elements in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

Shape = tuple[int, ...]
CHUNK_BYTES = 64 * 2**20
"""The largest piece handled at once: what a reader of the result must hold in memory, too."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor."""

    offsets: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of `tensor` that this box covers."""
        for axis, (start, length) in enumerate(zip(self.offsets, self.shape, strict=True)):
            tensor = tensor.narrow(axis, start, length)
        return tensor

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor whose content is made, or read, when it is asked for."""

    name: str
    dtype: torch.dtype
    shape: Shape
    pieces: Callable[[], Iterator[torch.Tensor]]
    """The content in order, in parts of bounded size; of any dtype: it is cast."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Copy:
    """One box of one Hugging Face tensor and the box of a Megatron tensor with the same content."""

    hf: int
    hf_box: Box
    mcore: int
    mcore_box: Box

    def inverse(self) -> Copy:
        """The same with the two sides exchanged."""
        return Copy(self.mcore, self.mcore_box, self.hf, self.hf_box)


Copies = Callable[[], Iterator[Copy]]
"""The boxes of a transform, made anew at each call: a model has a hundred thousand of them."""


def whole(shape: Shape) -> Copies:
    """One tensor, unchanged."""

    def copies() -> Iterator[Copy]:
        box = Box.whole(shape)
        yield Copy(0, box, 0, box)

    return copies


def cut(lengths: Sequence[int], tail: Shape, groups: int = 1) -> Copies:
    """HF ``[sum(lengths), *tail]`` to one Megatron tensor ``[length, *tail]`` per length.

    Args:
        groups: the HF rows are so many groups, each with its share of every length.
    """
    shares = [length // groups for length in lengths]

    def copies() -> Iterator[Copy]:
        for group in range(groups):
            first = group * sum(shares)
            for index, (start, share) in enumerate(_starts(shares)):
                hf, mcore = _rows(first + start, share, tail), _rows(group * share, share, tail)
                yield Copy(0, hf, index, mcore)

    return copies


def join(lengths: Sequence[int], tail: Shape) -> Copies:
    """HF tensors ``[length, *tail]`` to Megatron ``[sum(lengths), *tail]``."""

    def copies() -> Iterator[Copy]:
        for index, (start, length) in enumerate(_starts(lengths)):
            yield Copy(index, _rows(0, length, tail), 0, _rows(start, length, tail))

    return copies


def query_gate_key_value(groups: int, queries: int, head_dim: int, hidden: int) -> Copies:
    """HF q_proj, k_proj, v_proj to Megatron's linear_qkv.

    Args:
        groups: key/value heads.
        queries: query heads per key/value head.

    HF q_proj is ``[groups * queries * 2 * head_dim, hidden]``, per head the query and then the
    gate. Megatron's rows are, per group, all queries, all gates, the key, the value.
    """

    def copies() -> Iterator[Copy]:
        def head(hf: int, hf_head: int, mcore_head: int) -> Copy:
            return Copy(
                hf,
                _rows(hf_head * head_dim, head_dim, (hidden,)),
                0,
                _rows(mcore_head * head_dim, head_dim, (hidden,)),
            )

        for group in range(groups):
            first = group * (2 * queries + 2)
            for gate in (0, 1):
                for query in range(queries):
                    hf_head = 2 * (group * queries + query) + gate
                    yield head(0, hf_head, first + gate * queries + query)
            yield head(1, group, first + 2 * queries)
            yield head(2, group, first + 2 * queries + 1)

    return copies


def query_key_value(heads: int, head_dim: int, tail: Shape) -> Copies:
    """HF ``[3 * heads * head_dim, *tail]``, all queries, all keys, all values, to Megatron's rows,
    which are per head the query, the key, the value."""

    def copies() -> Iterator[Copy]:
        for part in range(3):
            for head in range(heads):
                hf_row, mcore_row = part * heads + head, head * 3 + part
                yield Copy(
                    0,
                    _rows(hf_row * head_dim, head_dim, tail),
                    0,
                    _rows(mcore_row * head_dim, head_dim, tail),
                )

    return copies


def packed_experts(experts: int, parts: int, rows: int, columns: int) -> Copies:
    """HF ``[experts, parts * rows, columns]``, the same in Megatron, one box per expert and part.

    The parts (gate and up) are separate boxes because Megatron loads them separately.
    """

    def copies() -> Iterator[Copy]:
        for expert in range(experts):
            for part in range(parts):
                box = Box((expert, part * rows, 0), (1, rows, columns))
                yield Copy(0, box, 0, box)

    return copies


def separate_experts(experts: int, parts: int, rows: int, columns: int) -> Copies:
    """HF tensors ``[rows, columns]`` (part by part, expert by expert) to the packed stack."""

    def copies() -> Iterator[Copy]:
        for expert in range(experts):
            for part in range(parts):
                yield Copy(
                    expert * parts + part,
                    Box((0, 0), (rows, columns)),
                    0,
                    Box((expert, part * rows, 0), (1, rows, columns)),
                )

    return copies


def gather(
    copies: Iterable[Copy], sources: Sequence[torch.Tensor], shapes: Sequence[Shape]
) -> list[torch.Tensor]:
    """Megatron's tensors from Hugging Face's; `shapes` are the results'."""
    dtype = common_dtype(tensor.dtype for tensor in sources)
    results = [torch.empty(shape, dtype=dtype, device=sources[0].device) for shape in shapes]
    for copy in copies:
        copy.mcore_box.of(results[copy.mcore]).copy_(
            copy.hf_box.of(sources[copy.hf]).reshape(copy.mcore_box.shape)
        )
    return results


def scatter(
    copies: Iterable[Copy], sources: Sequence[torch.Tensor], shapes: Sequence[Shape]
) -> list[torch.Tensor]:
    """Hugging Face's tensors from Megatron's; the inverse of `gather`."""
    return gather((copy.inverse() for copy in copies), sources, shapes)


def split_rows(box: Box, itemsize: int, limit: int = CHUNK_BYTES) -> Iterator[Box]:
    """The box in parts of at most `limit` bytes (one row at least), cut along its first long axis.

    Parts come in the order of their elements.
    """
    axis = _first_axis(box)
    if axis is None:
        yield box
        return
    row = box.size // box.shape[axis] * itemsize
    step = max(1, limit // max(1, row))
    for start in range(0, box.shape[axis], step):
        yield _cut_box(box, axis, start, min(step, box.shape[axis] - start))


def split_copy(copy: Copy, itemsize: int) -> Iterator[Copy]:
    """A copy in parts of bounded size."""
    axis = _first_axis(copy.hf_box)
    if axis is None or copy.hf_box.size * itemsize <= CHUNK_BYTES:
        yield copy
        return
    other = _first_axis(copy.mcore_box)
    assert other is not None
    for box in split_rows(copy.hf_box, itemsize):
        start = box.offsets[axis] - copy.hf_box.offsets[axis]
        part = _cut_box(copy.mcore_box, other, start, box.shape[axis])
        yield Copy(copy.hf, box, copy.mcore, part)


def _first_axis(box: Box) -> int | None:
    """The first axis along which the box has more than one element."""
    return next((axis for axis, length in enumerate(box.shape) if length > 1), None)


def _cut_box(box: Box, axis: int, start: int, length: int) -> Box:
    """`length` entries of the box along one axis, `start` counted from the box's own offset."""
    offsets, shape = list(box.offsets), list(box.shape)
    offsets[axis] += start
    shape[axis] = length
    return Box(tuple(offsets), tuple(shape))


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds values of all of them exactly."""
    first, *rest = dtypes
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat = _bits(tensor)
    return memoryview(flat.numpy()).cast("B") if flat.numel() else memoryview(b"")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype are equal as bytes: NaNs too, and zeros only of one sign."""
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _starts(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for length in lengths:
        yield start, length
        start += length


def _rows(start: int, length: int, tail: Shape) -> Box:
    return Box((start,) + (0,) * len(tail), (length, *tail))
