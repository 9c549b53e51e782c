"""A global batch, and each context-parallel rank's part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.utils import flatten_batch_for_packed_sequences

from qwen35_mcore.training.packed_documents import batch_on_this_cp_rank


@dataclass
class Batch:
    """One global batch: tokens ``[b, s + 1]`` int64, the mask of the positions that count, and the
    lengths of the documents in each row, where rows are packed."""

    tokens: torch.Tensor
    loss_mask: torch.Tensor | None = None
    documents: list[list[int]] | None = None

    def to(self, device: Any) -> Batch:
        mask = None if self.loss_mask is None else self.loss_mask.to(device)
        return Batch(self.tokens.to(device), mask, self.documents)

    def sample_on_this_rank(self, first: int, count: int) -> dict[str, Any]:
        """This context-parallel rank's part of a sample."""
        return on_this_rank(self.sample(first, count))

    def images(self, first: int, count: int) -> dict[str, Any]:
        """What the model takes beside the rows; none in a batch of text."""
        return {}

    def sample(self, first: int, count: int) -> dict[str, Any]:
        """Rows as megatron's GPTDataset gives them."""
        tokens = self.tokens[first : first + count]
        length = tokens.shape[1] - 1
        positions = torch.arange(length, device=tokens.device)
        mask = self.loss_mask
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(count, length, device=tokens.device)
            if mask is None
            else mask[first : first + count].float(),
            "position_ids": positions.expand(count, -1).contiguous(),
        } | self._boundaries(first, count, length)

    def _boundaries(self, first: int, count: int, length: int) -> dict[str, Any]:
        if self.documents is None:
            return {"cu_seqlens": None}
        bounds = torch.full((count, length + 1), length, dtype=torch.int32)
        for row, lengths in enumerate(self.documents[first : first + count]):
            assert sum(lengths) == length
            bounds[row, : len(lengths) + 1] = torch.tensor([0, *lengths]).cumsum(0)
        longest = bounds.diff().max(dim=1).values
        device = self.tokens.device
        return {"cu_seqlens": bounds.to(device), "max_seqlen": longest.to(device)}


def on_this_rank(sample: dict[str, Any]) -> dict[str, Any]:
    return batch_on_this_cp_rank(
        flatten_batch_for_packed_sequences(sample),
        ps.get_context_parallel_group(),
        ps.get_tensor_model_parallel_world_size(),
    )
