"""A Megatron checkpoint seen as the Hugging Face tensors it would export to.

Export writes this view and verify compares it, so what is verified is what is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Literal

import torch

from checkpoint_tools.mcore_io import MegatronCheckpoint
from checkpoint_tools.names import Layout, Naming, Row, TensorSpec, rows
from checkpoint_tools.storage import split_rows
from checkpoint_tools.tensor_names import MTP_PREFIX
from checkpoint_tools.transforms import Copy, Shape, common_dtype
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import CheckpointError

DtypeChoice = Literal["original", "checkpoint", "float32"]
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_MAIN_PARAMETERS = (
    "optimizer.state.param.",
    "optimizer.state.fp32_param.",
    "optimizer.state.master_param.",
)
_NOT_MODEL = ("optimizer.", "chained_", "optimizer_state", "rng_state", "rerun_state")


class ModelView:
    """The Hugging Face tensors of a Megatron checkpoint.

    Args:
        naming: how the Hugging Face side is named and grouped.
        dtypes: original dtypes by Hugging Face name; a name that is absent keeps its stored dtype.
        choice: original; checkpoint (as stored); float32 (the optimizer's main parameters).

    Raises:
        CheckpointError: tensors are missing, unknown or of other shapes than the config says.
    """

    def __init__(
        self,
        checkpoint: MegatronCheckpoint,
        config: Qwen35Config,
        naming: Naming,
        dtypes: Mapping[str, torch.dtype],
        choice: DtypeChoice = "original",
    ) -> None:
        self.checkpoint = checkpoint
        self.choice, self._dtypes = choice, dtypes
        self.layout = stored_layout(checkpoint)
        self.table = rows(config, naming, self.layout)
        _check(checkpoint, self.table, without_mtp=not naming.mtp)
        self._where = {
            spec.name: (row, index) for row in self.table for index, spec in enumerate(row.hf)
        }
        self._copies = lru_cache(maxsize=8)(_grouped)

    def names(self) -> list[str]:
        """Hugging Face names, in the order in which the model computes."""
        return list(self._where)

    def shape(self, name: str) -> Shape:
        """Global shape of a tensor."""
        row, index = self._where[name]
        return row.hf[index].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that the tensor is given on the Hugging Face side."""
        if self.choice == "float32":
            return torch.float32
        if self.choice == "original" and name in self._dtypes:
            return self._dtypes[name]
        row, index = self._where[name]
        if row.float32:
            return torch.float32
        keys = {row.mcore[copy.mcore].name for copy in self._copies(row)[index]}
        return common_dtype(self.checkpoint.tensors[key].dtype for key in sorted(keys))

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in order, in parts of bounded size, in the dtype of the view."""
        row, index = self._where[name]
        dtype = self.dtype(name)
        for copy in self._copies(row)[index]:
            key = self._source(row.mcore[copy.mcore], dtype)
            stored = self.checkpoint.tensors[key].dtype
            for box in split_rows(copy.mcore_box, max(stored.itemsize, dtype.itemsize)):
                piece = self.checkpoint.read(key, box)
                if row.zero_centred:
                    piece = piece.double() + 1
                yield piece.to(dtype)

    def _source(self, spec: TensorSpec, wanted: torch.dtype) -> str:
        """The key to read: the optimizer's main parameter where it is more precise."""
        stored = self.checkpoint.tensors[spec.name].dtype
        if stored.itemsize >= wanted.itemsize:
            return spec.name
        return main_parameter(self.checkpoint, spec.name) or spec.name


def stored_layout(checkpoint: MegatronCheckpoint) -> Layout:
    """Whose GatedDeltaNet wrote the checkpoint."""
    native = any(key.endswith(".self_attention.out_norm.weight") for key in checkpoint.tensors)
    return "mcore" if native else "qwen35"


def has_mtp(checkpoint: MegatronCheckpoint) -> bool:
    """Whether the checkpoint holds a multi-token-prediction layer."""
    return any(key.startswith(MTP_PREFIX) for key in checkpoint.tensors)


def main_parameter(checkpoint: MegatronCheckpoint, key: str) -> str | None:
    """The key of a tensor's float32 copy in the optimizer state."""
    for prefix in _MAIN_PARAMETERS:
        if prefix + key in checkpoint.tensors:
            return prefix + key
    return None


def model_keys(checkpoint: MegatronCheckpoint) -> list[str]:
    """The keys of the model's own tensors."""
    return [key for key in checkpoint.tensors if not key.startswith(_NOT_MODEL)]


def aligned(
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


def _grouped(row: Row) -> list[list[Copy]]:
    """The copies of each Hugging Face tensor of a row, in the order of its elements."""
    groups: list[list[Copy]] = [[] for _ in row.hf]
    for copy in row.copies():
        groups[copy.hf].append(copy)
    return [sorted(group, key=lambda copy: copy.hf_box.offsets) for group in groups]


def _check(checkpoint: MegatronCheckpoint, table: list[Row], *, without_mtp: bool) -> None:
    expected = {spec.name: spec.shape for row in table for spec in row.mcore}
    unknown = sorted(set(model_keys(checkpoint)) - expected.keys())
    if without_mtp:
        unknown = [key for key in unknown if not key.startswith(MTP_PREFIX)]
    missing = sorted(expected.keys() - checkpoint.tensors.keys())
    error = partial(CheckpointError, got=", ".join((missing or unknown)[:5]))
    if missing:
        raise error(
            f"the Megatron checkpoint lacks {len(missing)} tensors of this model",
            fix="is it of another config?",
        )
    if unknown:
        raise error(
            f"the Megatron checkpoint has {len(unknown)} tensors that this model does not have",
            fix="Hugging Face's Qwen3.5 has no place for them",
        )
    for key, shape in expected.items():
        stored = checkpoint.tensors[key].shape
        # megatron pads the vocabulary to a multiple of its own; the padding is never exported
        padded = key in _VOCABULARY and stored[0] > shape[0] and stored[1:] == shape[1:]
        if stored != shape and not padded:
            raise CheckpointError(
                f"{key} has another shape than the config says", got=str(stored), allowed=str(shape)
            )
