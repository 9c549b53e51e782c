"""What the pool's workers run: load a checkpoint with Megatron's loader, answer with logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from qwen35_mcore.config import Qwen35Config
from tests.helpers.training import Layout, build_chunks, config_for, initialize


def imported_logits(
    hf: Qwen35Config, checkpoint: str, tokens: torch.Tensor, layout: Layout
) -> dict[str, Any]:
    """Load strictly and run forward.

    Returns:
        logits ``[b, s, vocabulary]`` (None except on the last stage), the keys that the model
        asked for and the checkpoint lacks, and those that the checkpoint has beyond the model.
    """
    initialize(layout)
    chunks = build_chunks(hf, config_for(hf, layout), layout)
    not_asked, lacking = _load(chunks, checkpoint)
    return {"logits": _logits(chunks, tokens), "lacking": lacking, "not_asked": not_asked}


def _load(chunks: list[torch.nn.Module], checkpoint: str) -> tuple[set[str], set[str]]:
    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    state = {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(chunks)}
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    loaded, missing, unexpected = dist_checkpointing.load(
        state, checkpoint, strict=StrictHandling.RETURN_ALL
    )
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=True)
    return missing, unexpected


def _logits(chunks: list[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor | None:
    def forward_step(data_iterator: Any, model: Any) -> Any:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        output = model(tokens, positions, None)
        return output, lambda value, non_loss_data=True: gather_from_tensor_model_parallel_region(
            value.detach()
        )

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        data: Any = [iter([]) for _ in chunks]
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if len(chunks) > 1 else data[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=ps.get_pipeline_model_parallel_world_size(),
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[0] if outputs else None
