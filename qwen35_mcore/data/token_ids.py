"""Whether the ids in a ``PREFIX.bin`` are ids that a model has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from qwen35_mcore.data.index_file import IndexFile
from qwen35_mcore.errors import DataError

LOOKED_AT = 2**30
"""Bytes of datasets that are looked at before a run: about a second."""
_BLOCK = 2**24


def check_ids(index: IndexFile, *, vocab_size: int, budget: int = LOOKED_AT) -> None:
    """Look for ids outside ``0 .. vocab_size - 1``, in at most about ``budget`` bytes.

    A dataset within the budget is looked at whole. Of a larger one it is the beginning, the end
    and blocks of 16 MiB evenly between: whoever trains on it checks each batch as well.

    Raises:
        DataError: with the first such id that was met.
    """
    if not index.tokens:
        return
    largest = np.iinfo(index.dtype)
    if largest.min == 0 and largest.max < vocab_size:
        return
    tokens = np.memmap(f"{index.prefix}.bin", index.dtype, mode="r", shape=(index.tokens,))
    for begin, end in _blocks(index, budget):
        block = tokens[begin:end]
        if block.min() < 0 or block.max() >= vocab_size:
            at = begin + int(np.argmax((block < 0) | (block >= vocab_size)))
            raise _outside(index, at, int(tokens[at]), vocab_size)


def _blocks(index: IndexFile, budget: int) -> Iterator[tuple[int, int]]:
    length = _BLOCK // index.dtype.itemsize
    wanted = max(2, budget // _BLOCK)
    starts: Iterable[int] = range(0, index.tokens, length)
    if index.tokens > wanted * length:
        starts = np.linspace(0, index.tokens - length, wanted).astype(np.int64).tolist()
    return ((begin, min(begin + length, index.tokens)) for begin in starts)


def _outside(index: IndexFile, at: int, found: int, vocab_size: int) -> DataError:
    document = index.sequence_of(at)
    place = at - index.first_token(document)
    return DataError(
        f"{index.prefix}.bin holds ids that the model does not have",
        got=f"{found}, token {place} of document {document}, both from 0",
        allowed=f"0 to {vocab_size - 1}, the model's vocab_size less one",
        fix="tokenize with the model's own tokenizer, or choose a flavor with this vocabulary",
    )
