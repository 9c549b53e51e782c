"""What two checkpoints differ in beside their tensors: config fields, an MTP layer, names."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from checkpoint_tools.hf_io import HFCheckpoint, is_hf_folder
from checkpoint_tools.mcore_io import MegatronCheckpoint
from checkpoint_tools.tensor_names import MTP_PREFIX
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError

_NOT_COMPUTED_WITH = {
    "carried", "carried_outer", "initializer_range", "attention_dropout", "router_aux_loss_coef",
    "max_position_embeddings", "mtp_num_hidden_layers", "model_type",
}  # fmt: skip


def compare_models(
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
        for field in fields(Qwen35Config):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if field.name not in _NOT_COMPUTED_WITH and x != y:
                differences.append(f"{field.name}: {_shown(x)} / {_shown(y)}")
    has_mtp = [any(name.startswith(MTP_PREFIX) for name in given) for _, _, given in sides]
    for (side, path, _), config, there in zip(sides, configs, has_mtp, strict=True):
        if is_hf_folder(path):
            notes += [f"{side}: {note}" for note in HFCheckpoint(path).notes]
        if config is not None and config.mtp_num_hidden_layers and not there:
            notes.append(f"{side}: the config has an MTP layer that is not there")
    if has_mtp[0] != has_mtp[1]:
        notes.append(f"{'B' if has_mtp[0] else 'A'} has no MTP layer")
    return differences, notes


def _config(path: Path) -> Qwen35Config | None:
    """The config of a folder or checkpoint; None where it has none that can be read."""
    try:
        if is_hf_folder(path):
            return Qwen35Config.from_hf(path)
        recorded = MegatronCheckpoint(path).argument("qwen35_hf_config")
        return Qwen35Config.from_hf(json.loads(recorded)) if recorded else None
    except (ConfigError, ValueError):
        return None


def _shown(value: object) -> str:
    return json.dumps(value, default=str)
