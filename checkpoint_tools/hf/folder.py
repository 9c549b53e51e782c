"""Which files of a Hugging Face folder are its weights, and what to do where they are not.

transformers takes ``model.safetensors`` before an index, and safetensors before pickles. Where a
folder holds two sets of weights that are not the same, nobody can know which one is meant.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection
from pathlib import Path

from checkpoint_tools.files.paths import no_folder
from qwen35_mcore.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_SHARD = re.compile(r"(.+)-\d+-of-\d+\.safetensors")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin")
_NO_PICKLED_WEIGHTS = {
    "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scheduler.bin",
    "scaler.pt",
}  # fmt: skip
_TO_SAFETENSORS = (
    'python -c "import torch; from safetensors.torch import save_file; t = {{}}; '
    "[t.update(torch.load(f, map_location='cpu', weights_only=True)) for f in {files!r}]; "
    "save_file({{k: v.contiguous().clone() for k, v in t.items()}}, {target!r}, "
    "{{'format': 'pt'}})\""
)
MERGE_ADAPTER = (
    "merge it into its base model first: "
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('{folder}', dtype='auto').merge_and_unload().save_pretrained('MERGED')\", "
    "copy the tokenizer's files there, and import MERGED"
)


def refuse_other_weights(folder: Path, used: Collection[str]) -> None:
    """Refuse what lies beside the weights and would change what they are.

    Args:
        used: names of the safetensors files that are read.

    Raises:
        CheckpointError: there is an adapter, or there are shards that the index does not name.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            "an adapter (PEFT) lies beside the weights: transformers would load both",
            got=str(folder / ADAPTER_CONFIG),
            fix="for the model without it move adapter_* out of the folder; for the model with it, "
            + MERGE_ADAPTER.format(folder=folder),
        )
    stems = {"model", SINGLE_NAME} | {
        match[1] for name in used if (match := _SHARD.fullmatch(name))
    }
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)
    unnamed = [name for name in others if (match := _SHARD.fullmatch(name)) and match[1] in stems]
    if unnamed:
        raise CheckpointError(
            f"{len(unnamed)} shards are not what this folder's weights consist of",
            got=f"{', '.join(unnamed[:4])} in {folder}",
            allowed=f"only {', '.join(sorted(used)[:4])}",
            fix=f"if they belong to the model, fetch {INDEX_NAME} again; else move them away",
        )


def two_sets(folder: Path, first: str, second: str) -> CheckpointError:
    """The error of two sets of weights that differ. transformers takes the first."""
    return CheckpointError(
        f"two sets of weights are here, and they are not the same: {first} and {second}",
        got=str(folder),
        fix=f"move the one that you do not mean out of the folder (transformers takes {first})",
    )


def pickled_weights(folder: Path) -> list[Path]:
    """The ``pytorch_model*.bin`` files."""
    return sorted(folder.glob("pytorch_model*.bin"))


def no_weights(folder: Path) -> CheckpointError:
    """The error of a folder without ``model.safetensors`` and index: what it is, what to do."""
    if not folder.is_dir():
        return no_folder(
            folder, "give a Hugging Face model folder, or a Hub id such as Qwen/Qwen3.5-35B-A3B"
        )
    for find in (_adapter, _safetensors, _sharded, _pickled, _gguf, _below):
        error = find(folder)
        if error is not None:
            return error
    return CheckpointError(
        "no safetensors weights here",
        got=str(folder),
        allowed=f"{SINGLE_NAME}, or {INDEX_NAME} with its shards",
        fix="name the folder that save_pretrained wrote, or fetch the model's weights",
    )


def _adapter(folder: Path) -> CheckpointError | None:
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "its base model"
    return CheckpointError(
        "this is an adapter (PEFT), not a model",
        got=f"{folder}, of {base}",
        fix=MERGE_ADAPTER.format(folder=folder),
    )


def _safetensors(folder: Path) -> CheckpointError | None:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if not found:
        return None
    indices = [p.name for p in sorted(folder.glob("*.safetensors.index.json")) if p.is_file()]
    if indices:
        fix = f"if {indices[0]} is the one that you mean, rename it to {INDEX_NAME}"
    elif any(_SHARD.fullmatch(name) for name in found):
        fix = f"fetch {INDEX_NAME}: without it a missing shard is not noticed"
    else:
        fix = f"if {found[0]} is the whole model, rename it to {SINGLE_NAME}"
    return CheckpointError(
        f"{len(found)} safetensors files and neither {INDEX_NAME} nor {SINGLE_NAME}",
        got=", ".join(found[:4]),
        fix=fix,
    )


def _sharded(folder: Path) -> CheckpointError | None:
    """What trainers save rank by rank, with the tool that each has for putting it together."""
    quoted = shlex.quote(str(folder))
    if (folder / "metadata.json").is_file() or (
        folder / "latest_checkpointed_iteration.txt"
    ).exists():
        kind, fix = "a Megatron checkpoint", "export converts those: qwen35-ckpt export"
    elif (folder / "zero_to_fp32.py").is_file():
        kind = "a DeepSpeed checkpoint"
        fix = f"python {quoted}/zero_to_fp32.py {quoted} OUT --safe_serialization, then copy "
        fix += "config.json and the tokenizer's files there, and import OUT"
    elif any(folder.glob("model_world_size_*_rank_*.pt")):
        kind = "a verl checkpoint"
        fix = f"python -m verl.model_merger merge --backend fsdp --local_dir {quoted} "
        fix += "--target_dir OUT, and import OUT"
    elif any(folder.glob("*.distcp")) or any(folder.glob("*/*.distcp")):
        inner = folder if any(folder.glob("*.distcp")) else next(folder.glob("*/*.distcp")).parent
        kind = "a sharded checkpoint of torch.distributed.checkpoint (FSDP)"
        fix = f"accelerate merge-weights {shlex.quote(str(inner))} OUT, then copy config.json and "
        fix += "the tokenizer's files there, and import OUT"
    else:
        return None
    return CheckpointError(f"this is {kind}, not a Hugging Face model", got=str(folder), fix=fix)


def _pickled(folder: Path) -> CheckpointError | None:
    for pattern in _PICKLES:
        files = sorted(p for p in folder.glob(pattern) if p.name not in _NO_PICKLED_WEIGHTS)
        if files:
            break
    else:
        return None
    command = _TO_SAFETENSORS.format(
        files=[str(file) for file in files], target=str(folder / SINGLE_NAME)
    )
    return CheckpointError(
        "the weights are pickled (torch.save), which may run programs when it is read",
        got=", ".join(file.name for file in files[:4]),
        allowed="safetensors",
        fix=f"if you trust them, write them anew: {command}",
    )


def _gguf(folder: Path) -> CheckpointError | None:
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files:
        return None
    return CheckpointError(
        "the weights are GGUF, a format for inference",
        got=", ".join(files[:4]),
        allowed="safetensors",
        fix="take the safetensors model that it was made from",
    )


def _below(folder: Path) -> CheckpointError | None:
    names = (INDEX_NAME, SINGLE_NAME)
    inner = sorted({path.parent for name in names for path in folder.glob(f"*/**/{name}")})
    if not inner:
        return None
    return CheckpointError(
        "no weights in this folder, only in folders below it",
        got=str(folder),
        fix=f"name the one that you mean: {', '.join(map(str, inner[:4]))}",
    )
