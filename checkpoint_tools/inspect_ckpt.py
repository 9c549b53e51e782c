"""Say what a folder is: kind, model, tensors, dtypes, iteration, format, completeness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from checkpoint_tools.files.manifest import PARTIAL
from checkpoint_tools.files.paths import no_folder
from checkpoint_tools.hf.import_plan import plan_import
from checkpoint_tools.hf.read import HFCheckpoint, HFTensor, is_hf_folder
from checkpoint_tools.mcore.exported import has_mtp, model_keys, recorded_config, stored_format
from checkpoint_tools.mcore.keys import TRACKER
from checkpoint_tools.mcore.read import MegatronCheckpoint, MegatronTensor
from checkpoint_tools.table.names import MTP_PREFIX
from checkpoint_tools.table.vision import MCORE_VISION_PREFIX, VISION_PREFIX
from qwen35_mcore.config.flavors import FLAVORS
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import CheckpointError, ConfigError

_ANY_CHECKPOINT = (
    "a folder with config.json and safetensors files, an iter_NNNNNNN or release folder, or the "
    f"run folder above it with its {TRACKER}"
)
_PARALLEL = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "cp": "context_parallel_size",
    "dp": "data_parallel_size",
}


def inspect_folder(path: Path) -> dict[str, Any]:
    """Plain values describing a folder; `complete` is false, with `problem`, when it is damaged.

    Raises:
        CheckpointError: the folder is no checkpoint of any kind.
    """
    if not path.is_dir():
        raise no_folder(path, f"give {_ANY_CHECKPOINT}")
    if path.name.endswith(PARTIAL) or (path / "manifest.jsonl").is_file():
        return {
            "kind": "unfinished conversion",
            "path": str(path),
            "complete": False,
            "problem": "it was interrupted: run the same command again",
        }
    describe, kind = _describe_megatron, "Megatron torch_dist checkpoint"
    if is_hf_folder(path):
        describe, kind = _describe_hf, "Hugging Face folder"
    elif not _looks_like_megatron(path):
        raise CheckpointError(
            "neither a Hugging Face folder nor a Megatron checkpoint",
            got=str(path),
            allowed=_ANY_CHECKPOINT,
            fix="name the folder that holds these files; it may be one above or below",
        )
    base: dict[str, Any] = {"kind": kind, "path": str(path)}
    try:
        return {**base, "complete": True, **describe(path)}
    except (CheckpointError, ConfigError) as error:
        return {**base, "complete": False, "problem": str(error).replace("\n ", ";")}


def _looks_like_megatron(path: Path) -> bool:
    names = (TRACKER, ".metadata", "metadata.json")
    return any((path / name).is_file() for name in names) or any(path.glob("*.distcp"))


def _describe_hf(path: Path) -> dict[str, Any]:
    hf = HFCheckpoint(path)
    config = Qwen35Config.from_hf(path)
    mtp = any(name.startswith(MTP_PREFIX) for name in hf.tensors)
    plan_import(path, no_mtp=not mtp)
    notes = list(hf.notes)
    if config.is_vision_language:
        notes += _cannot_train_tower(path, no_mtp=not mtp)
    if config.mtp_num_hidden_layers and not mtp:
        notes.append("config.json has an MTP layer that is not there: import with --no-mtp")
    return {
        **_describe_config(config),
        "tensors": len(hf.tensors),
        "bytes": sum(entry.nbytes for entry in hf.tensors.values()),
        "dtypes": _dtypes(hf.tensors.values()),
        "shards": len(hf.files),
        **_tower(hf.tensors, VISION_PREFIX),
        "mtp": mtp,
        **({"notes": notes} if notes else {}),
    }


def _describe_megatron(path: Path) -> dict[str, Any]:
    checkpoint = MegatronCheckpoint(path)
    keys = model_keys(checkpoint)
    tensors = [checkpoint.tensors[key] for key in keys]
    config = recorded_config(checkpoint)
    carried = checkpoint.argument("qwen35_origin")
    return {
        **(_describe_config(config) if config else {}),
        "folder": str(checkpoint.folder),
        "iteration": checkpoint.common.get("iteration"),
        "checkpoint_version": checkpoint.common.get("checkpoint_version"),
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": _dtypes(tensors),
        **_tower({key: checkpoint.tensors[key] for key in keys}, MCORE_VISION_PREFIX),
        "mtp": has_mtp(checkpoint),
        "gdn_layout": stored_format(checkpoint),
        "optimizer_tensors": len(checkpoint.tensors) - len(tensors),
        "saved_with": {
            short: value
            for short, name in _PARALLEL.items()
            if (value := checkpoint.argument(name)) is not None
        },
        "origin": carried,
        "origin_present": (checkpoint.root / carried).is_dir() if carried else None,
    }


def _cannot_train_tower(path: Path, *, no_mtp: bool) -> list[str]:
    """Why `import --vision` would refuse a folder that can be imported without."""
    try:
        plan_import(path, no_mtp=no_mtp, vision=True)
    except (CheckpointError, ConfigError) as error:
        problem = str(error).replace("\n ", ";")
        return [f"the vision tower can be carried, not converted: {problem}"]
    return []


def _tower(tensors: Mapping[str, HFTensor | MegatronTensor], prefix: str) -> dict[str, int]:
    """Tensors and parameters of the vision tower that are there."""
    shapes = [tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)]
    return {"vision_tensors": len(shapes), "vision_parameters": sum(map(prod, shapes))}


def _describe_config(config: Qwen35Config) -> dict[str, Any]:
    return {
        "model_type": config.model_type,
        "flavor": _flavor(config),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "experts": config.num_experts,
    }


def _flavor(config: Qwen35Config) -> str | None:
    bare = replace(config.to_text_only(), carried={}, mtp_num_hidden_layers=1)
    return next((name for name, flavor in FLAVORS.items() if flavor == bare), None)


def _dtypes(tensors: Iterable[HFTensor | MegatronTensor]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(counts.most_common())
