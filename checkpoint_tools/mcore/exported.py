"""The Hugging Face tensors that a Megatron checkpoint exports to.

Export writes them and verify compares them, so what is verified is what is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Literal

import torch

from checkpoint_tools.mcore.read import MegatronCheckpoint
from checkpoint_tools.table.names import MTP_PREFIX, Format, Naming, rows
from checkpoint_tools.table.row import Row, TensorSpec
from checkpoint_tools.table.transforms import Copy, LazyTensor, common_dtype, split_rows
from checkpoint_tools.table.vision import MCORE_VISION_PREFIX
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import CheckpointError, ConfigError

DtypeChoice = Literal["original", "checkpoint", "float32"]
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_MAIN_PARAMETERS = (
    "optimizer.state.param.",
    "optimizer.state.fp32_param.",
    "optimizer.state.master_param.",
)
_NOT_MODEL = ("optimizer.", "chained_", "optimizer_state", "rng_state", "rerun_state")


class ExportedTensors:
    """The Hugging Face tensors of a Megatron checkpoint, made as they are read.

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
        self._checkpoint, self._dtypes, self._choice = checkpoint, dtypes, choice
        self.table = rows(config, naming, stored_format(checkpoint), vision=has_vision(checkpoint))
        _check(checkpoint, self.table, without_mtp=not naming.mtp)
        self._copies = lru_cache(maxsize=8)(_grouped)

    def lazy(self) -> list[LazyTensor]:
        """All of them, in the order in which the model computes."""
        return [
            LazyTensor(spec.name, dtype, spec.shape, partial(self._pieces, row, index, dtype))
            for row in self.table
            for index, spec in enumerate(row.hf)
            for dtype in [self._dtype(row, index)]
        ]

    def _dtype(self, row: Row, index: int) -> torch.dtype:
        """The dtype that a tensor is given on the Hugging Face side."""
        if self._choice == "float32":
            return torch.float32
        name = row.hf[index].name
        if self._choice == "original" and name in self._dtypes:
            return self._dtypes[name]
        if row.float32:
            return torch.float32
        keys = {row.mcore[copy.mcore].name for copy in self._copies(row)[index]}
        return common_dtype(self._checkpoint.tensors[key].dtype for key in sorted(keys))

    def _pieces(self, row: Row, index: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for copy in self._copies(row)[index]:
            key = self._source(row.mcore[copy.mcore], dtype)
            stored = self._checkpoint.tensors[key].dtype
            for box in split_rows(copy.mcore_box, max(stored.itemsize, dtype.itemsize)):
                piece = self._checkpoint.read(key, box)
                if row.zero_centred:
                    piece = piece.double() + 1
                yield piece.to(dtype)

    def _source(self, spec: TensorSpec, wanted: torch.dtype) -> str:
        """The key to read: the optimizer's main parameter where it is more precise."""
        stored = self._checkpoint.tensors[spec.name].dtype
        if stored.itemsize >= wanted.itemsize:
            return spec.name
        return main_parameter(self._checkpoint, spec.name) or spec.name


def recorded_config(checkpoint: MegatronCheckpoint) -> Qwen35Config | None:
    """The config of the model that was trained, None where the run recorded none.

    Raises:
        ConfigError: it is malformed.
    """
    recorded = checkpoint.argument("qwen35_hf_config")
    if not recorded:
        return None
    try:
        return Qwen35Config.from_hf(dict(json.loads(recorded)))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            "the checkpoint's own config is malformed", got=f"{checkpoint.folder}: {error}"
        ) from error


def stored_format(checkpoint: MegatronCheckpoint) -> Format:
    """Whose GatedDeltaNet wrote the checkpoint."""
    native = any(key.endswith(".self_attention.out_norm.weight") for key in checkpoint.tensors)
    return "mcore" if native else "qwen35"


def has_mtp(checkpoint: MegatronCheckpoint) -> bool:
    """Whether the checkpoint holds a multi-token-prediction layer."""
    return any(key.startswith(MTP_PREFIX) for key in checkpoint.tensors)


def has_vision(checkpoint: MegatronCheckpoint) -> bool:
    """Whether the checkpoint holds a vision tower: its run trained the tower."""
    return any(key.startswith(MCORE_VISION_PREFIX) for key in checkpoint.tensors)


def main_parameter(checkpoint: MegatronCheckpoint, key: str) -> str | None:
    """The key of a tensor's float32 copy in the optimizer state."""
    for prefix in _MAIN_PARAMETERS:
        if prefix + key in checkpoint.tensors:
            return prefix + key
    return None


def model_keys(checkpoint: MegatronCheckpoint) -> list[str]:
    """The keys of the model's own tensors."""
    return [key for key in checkpoint.tensors if not key.startswith(_NOT_MODEL)]


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
            fix="Hugging Face's model has no place for them",
        )
    for key, shape in expected.items():
        stored = checkpoint.tensors[key].shape
        # megatron pads the vocabulary to a multiple of its own; the padding is never exported
        padded = key in _VOCABULARY and stored[0] > shape[0] and stored[1:] == shape[1:]
        if stored != shape and not padded:
            raise CheckpointError(
                f"{key} has another shape than the config says", got=str(stored), allowed=str(shape)
            )
