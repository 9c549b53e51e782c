"""Where tokens lie when runs of them are padded to whole chunks, for the chunked delta rule.

Shape suffixes: b batch, s tokens, m chunks, h key heads, r value heads per key head, i token of a
chunk, d features.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def consecutive_ranges(lengths: list[int]) -> list[range]:
    """[2, 0, 3] to [range(0, 2), range(2, 2), range(2, 5)]."""
    ends = list(itertools.accumulate(lengths))
    return [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@dataclass(frozen=True)
class Chunks:
    """The slot of every token once each run of tokens is padded to whole chunks.

    Padding is zero, and a token with k = 0, beta = 0 and g = 0 leaves the state as it is.
    """

    chunk_size: int
    chunk_counts: list[int]
    """Chunks of each run; 0 for an empty one."""
    tokens: int
    slot_s: Tensor | None
    """[s] slot of each token; None for a single run, whose padding is all at the end."""

    @classmethod
    def of(
        cls, run_lengths: list[int], chunk_size: int, packed: bool, device: torch.device
    ) -> Chunks:
        """The chunks of runs that follow one another without gaps.

        Raises:
            ValueError: a chunk size below 1.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, got {chunk_size}")
        counts = [-(-length // chunk_size) for length in run_lengths]
        slot_s = None
        if packed:
            starts = [chunks.start * chunk_size for chunks in consecutive_ranges(counts)]
            runs = zip(starts, run_lengths, strict=True)
            slot_s = torch.cat([torch.arange(a, a + n, device=device) for a, n in runs])
        return cls(chunk_size, counts, sum(run_lengths), slot_s)

    def chunk_ranges(self) -> list[range]:
        """The chunks of each run."""
        return consecutive_ranges(self.chunk_counts)

    def split(self, x_bshd: Tensor, key_heads: int) -> Tensor:
        """[b, s, heads, d] to [b, m, key_heads, heads / key_heads, chunk_size, d]."""
        slots = sum(self.chunk_counts) * self.chunk_size
        if self.slot_s is None:
            x = F.pad(x_bshd, (0, 0, 0, 0, 0, slots - self.tokens))
        else:
            zeros = x_bshd.new_zeros(x_bshd.shape[0], slots, *x_bshd.shape[2:])
            x = zeros.index_copy(1, self.slot_s, x_bshd)
        x_bmihrd = x.unflatten(2, (key_heads, -1)).unflatten(1, (-1, self.chunk_size))
        return x_bmihrd.permute(0, 1, 3, 4, 2, 5)

    def join(self, x_bmhrid: Tensor) -> Tensor:
        """The inverse of `split`: [b, s, heads, d], the padding dropped."""
        x = x_bmhrid.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
        if self.slot_s is None:
            return x[:, : self.tokens]
        return x.index_select(1, self.slot_s)
