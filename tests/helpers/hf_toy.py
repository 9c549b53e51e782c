"""Hugging Face folders as users have them: written by transformers, then completed.

transformers drops MTP when it saves and knows nothing of a tokenizer here, so both are added by
hand; `A_log` and the GDN norm become float32 among bfloat16, as in the released files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint_tools.table.names import Naming, rows
from qwen35_mcore.config.hf_keys import MODEL_TYPES
from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.hf_reference import model_class
from tests.helpers.toys import NEXT, toy_config

INDEX = "model.safetensors.index.json"
KINDS = ("qwen3_5_text", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe", "qwen3_next")
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
OTHER_FILES = {
    "generation_config.json": b'{"do_sample": true, "temperature": 0.6}\n',
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE"}}\n',
    "tokenizer_config.json": b'{"tokenizer_class": "Qwen2Tokenizer"}',
    "merges.txt": b"#version: 0.2\n\xc4\xa0 t\n",
    "assets/chat_template.jinja": b"{{ messages }}",
}


def toy_hf_config(
    kind: str,
    *,
    mtp: bool = True,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> Qwen35Config:
    """A toy of one of the model types."""
    config = toy_config(
        moe=MODEL_TYPES[kind].moe,
        mtp_num_hidden_layers=int(mtp),
        tie_word_embeddings=tied,
        carried={"dtype": str(dtype).removeprefix("torch."), "eos_token_id": 3},
        **(NEXT if kind == "qwen3_next" else {}) | changes,
    )
    outer = {"vision_config": VISION, "image_token_id": 5, "video_token_id": 6}
    outer = outer if MODEL_TYPES[kind].nested else {}
    return replace(config, model_type=kind, carried_outer=outer)


def build_transformers(config: Qwen35Config, seed: int = 0) -> Any:
    """The transformers model of a config, random weights, float32."""
    torch.manual_seed(seed)
    hf_config = model_class(config).config_class.from_dict(config.to_hf())
    for level in (hf_config, hf_config.get_text_config()):
        level.dtype = torch.float32  # the weights are made in the dtype of the config
    model = model_class(config)(hf_config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def write_toy(
    folder: Path,
    kind: str,
    *,
    mtp: bool = True,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **changes: Any,
) -> Qwen35Config:
    """Write a complete toy folder with several shards; returns its config."""
    config = toy_hf_config(kind, mtp=mtp, tied=tied, dtype=dtype, **changes)
    model = build_transformers(config, seed).to(dtype)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    for name, content in OTHER_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    mtp_tensors = random_mtp(config, dtype, seed) if mtp else {}
    rewrite(folder, lambda tensors: _float32_like_releases(tensors) | mtp_tensors)
    return config


def random_mtp(config: Qwen35Config, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """MTP tensors, experts one by one as in the 3.5 releases."""
    generator = torch.Generator().manual_seed(seed + 1)
    naming = Naming(prefix="model.", mtp_experts="per_expert")
    return {
        spec.name: 0.1 * torch.randn(spec.shape, generator=generator).to(dtype)
        for row in rows(config, naming)
        for spec in row.hf
        if spec.name.startswith("mtp.")
    }


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def save_folder(folder: Path, tensors: dict[str, torch.Tensor], config: Qwen35Config) -> None:
    """A folder of these tensors, without any other file than the config."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


def rewrite(
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    shards: int = 3,
) -> None:
    """Replace all tensors by what `change` makes of them, in new shards with a new index."""
    tensors = change(read_all(folder))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys at the top level of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def pack_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For `rewrite`: the decoder's experts stacked, as in the 3.5 releases."""
    result = dict(tensors)
    for name in tensors:
        if name.startswith("mtp.") or not name.endswith(".mlp.experts.0.down_proj.weight"):
            continue
        stem = name.removesuffix("0.down_proj.weight")
        count = sum(n.startswith(stem) and n.endswith("down_proj.weight") for n in tensors)

        def take(part: str, stem: str = stem, count: int = count) -> torch.Tensor:
            names = [f"{stem}{expert}.{part}_proj.weight" for expert in range(count)]
            return torch.stack([result.pop(one) for one in names])

        result[f"{stem}gate_up_proj"] = torch.cat([take("gate"), take("up")], dim=1)
        result[f"{stem}down_proj"] = take("down")
    return result


def _float32_like_releases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wide = ("linear_attn.A_log", "linear_attn.norm.weight")
    return {
        # values that bfloat16 cannot hold, so that a rounding on the way would show
        name: tensor.float() * 1.0001 if name.endswith(wide) else tensor
        for name, tensor in tensors.items()
    }
