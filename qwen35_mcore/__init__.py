"""Qwen3.5 for Megatron-Core: what a user builds with, imported when it is first used.

`Qwen35Config`, `FLAVORS` and `get_flavor` describe a model; `transformer_config` and `build_model`
make it a Megatron module, `make_model_provider` a provider for megatron's ``pretrain``; every error
that is the user's to fix is a `Qwen35Error`. Importing this package imports no torch.

    import torch
    import qwen35_mcore as qwen35

    qwen35.initialize_model_parallel()  # this process alone, or a rank of torchrun
    model_config = qwen35.get_flavor(
        "35b-a3b", num_hidden_layers=4, hidden_size=256, num_experts=16, vocab_size=1024
    )
    # "local": plain torch, as without a GPU; leave it out for Transformer Engine
    config = qwen35.transformer_config(model_config, transformer_impl="local")
    print(model := qwen35.build_model(model_config, config).cuda())  # decoder="hybrid": HybridModel
    ids = torch.arange(64, device="cuda")[None]  # tokens, positions, labels; the CPU where no GPU
    (losses := model(ids, ids, None, labels=ids)).mean().backward()  # losses: [1, 64], float32

Training runs do the first line by themselves: see `qwen35_mcore.training.pretrain`.

``build_model(model_config, config, vision=True)`` makes the vision-language model of a config.json
that has a tower, a `Qwen35VisionLanguageModel`. It takes tokens and images as transformers'
processor gives them; `rope_index` makes positions ahead of time, `freeze` leaves parts untrained.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Qwen35Config": "qwen35_mcore.config.model_config",
    "FLAVORS": "qwen35_mcore.config.flavors",
    "get_flavor": "qwen35_mcore.config.flavors",
    "Qwen35TransformerConfig": "qwen35_mcore.model.transformer_config",
    "transformer_config": "qwen35_mcore.model.transformer_config",
    "initialize_model_parallel": "qwen35_mcore.mcore.process_groups",
    "Qwen35Model": "qwen35_mcore.model.gpt_model",
    "Qwen35HybridModel": "qwen35_mcore.model.hybrid_model",
    "build_model": "qwen35_mcore.model.build",
    "make_model_provider": "qwen35_mcore.model.build",
    "VisionConfig": "qwen35_mcore.config.vision",
    "Qwen35VisionLanguageModel": "qwen35_mcore.model.vision.vision_language_model",
    "rope_index": "qwen35_mcore.model.vision.rope",
    "place_features": "qwen35_mcore.model.vision.embedding",
    "freeze": "qwen35_mcore.model.vision.freeze",
    "Qwen35Error": "qwen35_mcore.errors",
    "ConfigError": "qwen35_mcore.errors",
    "PlanError": "qwen35_mcore.errors",
    "CheckpointError": "qwen35_mcore.errors",
    "DataError": "qwen35_mcore.errors",
    "KernelError": "qwen35_mcore.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
