"""Pool cases about the parameters that stay float32 in a bfloat16 run."""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.batches import Batch
from tests.helpers.shards import load_global, local_shards
from tests.helpers.training import Layout, build_chunks, config_for, initialize, wrap

FLOAT32_SUFFIXES = ("A_log", "dt_bias", "gated_norm.weight")


def is_float32(key: str) -> bool:
    """Whether a checkpoint key is one of the three."""
    return key.endswith(FLOAT32_SUFFIXES)


def kept_parameters(chunks: list[Any]) -> dict[str, torch.Tensor]:
    """The three of every GDN layer, by key."""
    return {s.key: s.data.clone() for s in local_shards(chunks) if is_float32(s.key)}


def bfloat16_run(
    config: Qwen35Config, weights: dict[str, torch.Tensor], batch: Batch, folder: str
) -> dict[str, Any]:
    """Build in bf16, train one step, save, and load into a fresh model; returns each stage.

    ``other_dtypes`` are the dtypes of every other parameter. ``main`` are the optimizer's float32
    copies of the three after the step, or None for a parameter that has no copy of its own.
    """
    from megatron.core import dist_checkpointing

    layout = Layout(dtype=torch.bfloat16)
    initialize(layout)
    transformer_config = config_for(config, layout)
    chunks = build_chunks(config, transformer_config, layout)
    load_global(chunks, weights)
    wrapped, optimizer = wrap(chunks, transformer_config, layout, lr=1e-3)
    stages = {"start": kept_parameters(chunks)}

    sample = batch.sample(0, batch.tokens.shape[0])
    output = wrapped[0](sample["tokens"], sample["position_ids"], None, labels=sample["labels"])
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    output.mean().backward()
    wrapped[0].finish_grad_sync()
    optimizer.step()
    stages["trained"] = kept_parameters(chunks)

    metadata = _metadata()
    dist_checkpointing.save({"model": chunks[0].sharded_state_dict(metadata=metadata)}, folder)
    fresh_config = config_for(config, layout)
    fresh = build_chunks(config, fresh_config, layout)
    wrap(fresh, fresh_config, layout, lr=0.0)
    state = {"model": fresh[0].sharded_state_dict(metadata=metadata)}
    fresh[0].load_state_dict(dist_checkpointing.load(state, folder)["model"])
    stages["resumed"] = kept_parameters(fresh)
    stages["other_dtypes"] = {
        str(s.data.dtype) for s in local_shards(chunks) if not is_float32(s.key)
    }
    stages["optimizer"] = _optimizer_copies(optimizer, chunks)
    return stages


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _optimizer_copies(optimizer: Any, chunks: list[Any]) -> dict[str, torch.Tensor]:
    """What the optimizer steps on for each of the three (float32 values in float32 storage)."""
    by_address = {
        p.data_ptr(): name
        for chunk in chunks
        for name, p in chunk.named_parameters()
        if is_float32(name)
    }
    copies = {}
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in single.optimizer.param_groups:
            for p in group["params"]:
                name = by_address.get(p.data_ptr())
                if name is not None:
                    copies[name] = p.data.clone()
    return copies
