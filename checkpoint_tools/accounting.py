"""Every tensor of a Hugging Face checkpoint is converted, carried or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from checkpoint_tools.hf_io import HFCheckpoint, HFTensor
from checkpoint_tools.names import (
    MTP_PREFIX,
    NESTED_PREFIX,
    VISION_PREFIX,
    Layout,
    Naming,
    Row,
    rows,
)
from checkpoint_tools.origin import Origin, other_files
from qwen35_mcore.config import Qwen35Config
from qwen35_mcore.errors import CheckpointError

_CONVERTIBLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Account:
    """A Hugging Face checkpoint with each tensor's fate decided."""

    hf: HFCheckpoint
    config: Qwen35Config
    """Of the model that is trained: without MTP when that was asked for."""
    naming: Naming
    table: list[Row]
    carried: list[str]

    @property
    def origin(self) -> Origin:
        """What export needs, read from the Hugging Face folder itself."""
        files, _ = other_files(self.hf.folder)
        return Origin(
            naming=self.naming,
            dtypes={name: entry.dtype for name, entry in self.hf.tensors.items()},
            carried=self.hf if self.carried else None,
            carried_names=tuple(self.carried),
            files=files,
        )


def account(
    folder: Path, *, layout: Layout = "qwen35", carry: Sequence[str] = (), no_mtp: bool = False
) -> Account:
    """Read a Hugging Face folder and decide what happens to each tensor.

    Args:
        carry: name patterns (``*`` and ``?``) of tensors to carry through untouched.
        no_mtp: convert without MTP although the config says there is one.

    Raises:
        CheckpointError: a tensor is missing, unknown, misshapen, quantised or not the config's.
        ConfigError: config.json is missing or is not of this family.
    """
    hf = HFCheckpoint(folder)
    config = Qwen35Config.from_hf(folder)
    carried = {name for name in hf.tensors if any(fnmatchcase(name, p) for p in carry)}
    if config.is_vision_language:
        carried |= {name for name in hf.tensors if name.startswith(VISION_PREFIX)}
    given = {name: entry for name, entry in hf.tensors.items() if name not in carried}
    naming = Naming.detect(config, given)
    if no_mtp:
        naming = replace(naming, mtp=False)
        config = replace(config, mtp_num_hidden_layers=0)
    _check_config(config, naming, given.keys())
    table = rows(config, naming, layout)
    _check_tensors(given, table)
    return Account(hf=hf, config=config, naming=naming, table=table, carried=sorted(carried))


def _check_config(config: Qwen35Config, naming: Naming, names: Collection[str]) -> None:
    if (naming.prefix == NESTED_PREFIX) != config.is_vision_language:
        raise CheckpointError(
            "config.json contradicts the tensor names",
            got=f"model_type {config.model_type} with tensors named {naming.prefix}*",
            fix="take config.json and weights from the same checkpoint",
        )
    if naming.mtp and not config.mtp_num_hidden_layers:
        raise CheckpointError(
            f"there are tensors named {MTP_PREFIX}* and config.json has no MTP layer",
            fix="set mtp_num_hidden_layers to 1 in config.json, or carry them: --carry 'mtp.*'",
        )
    if config.mtp_num_hidden_layers and not naming.mtp:
        raise CheckpointError(
            f"config.json has an MTP layer and there are no tensors named {MTP_PREFIX}*",
            fix="transformers drops them when it saves: --no-mtp converts without",
        )
    if config.tie_word_embeddings and "lm_head.weight" in names:
        raise CheckpointError(
            "config.json ties the output layer to the embedding and there is an lm_head.weight",
            fix="set tie_word_embeddings to false (at the top level of config.json)",
        )
    if not config.tie_word_embeddings and "lm_head.weight" not in names:
        raise CheckpointError(
            "there is no lm_head.weight and config.json does not tie it to the embedding",
            fix="set tie_word_embeddings to true (at the top level), or fetch the missing shard",
        )


def _check_tensors(given: Mapping[str, HFTensor], table: list[Row]) -> None:
    expected = {spec.name: spec.shape for row in table for spec in row.hf}
    missing = sorted(expected.keys() - given.keys())
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing",
            got=", ".join(missing[:5]),
            fix="fetch the checkpoint again, or correct config.json if it is of another model",
        )
    unknown = sorted(given.keys() - expected.keys())
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} unknown tensors",
            got=", ".join(unknown[:5]),
            fix=f"to carry them through unchanged: --carry '{unknown[0]}' (patterns work)",
        )
    for name, shape in expected.items():
        entry = given[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{name} has another shape than config.json says",
                got=str(entry.shape),
                allowed=str(shape),
            )
        if entry.dtype not in _CONVERTIBLE:
            raise CheckpointError(
                f"{name} is quantised",
                got=str(entry.dtype),
                allowed=", ".join(str(dtype) for dtype in _CONVERTIBLE),
                fix="start from the bfloat16 release",
            )
