"""What the pool's workers run: load a checkpoint with Megatron's loader, answer with logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as ps
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.ssm.gated_delta_net import common as native_gdn
from megatron.core.ssm.gated_delta_net.gdn import GatedDeltaNet as NativeGatedDeltaNet
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.model import specs
from tests.helpers.training import Layout, build_chunks, config_for, initialize


def imported_logits(
    model_config: Qwen35Config, checkpoint: str, tokens: torch.Tensor, layout: Layout
) -> dict[str, Any]:
    """Load strictly and run forward.

    Returns:
        logits ``[b, s, vocabulary]`` (None except on the last stage), the keys that the model
        asked for and the checkpoint lacks, and those that the checkpoint has beyond the model.
    """
    initialize(layout)
    chunks = build_chunks(model_config, config_for(model_config, layout), layout)
    not_asked, lacking = _load(chunks, checkpoint)
    return {"logits": _logits(chunks, tokens), "lacking": lacking, "not_asked": not_asked}


def native_logits(
    model_config: Qwen35Config, checkpoint: str, tokens: torch.Tensor, layout: Layout
) -> dict[str, Any]:
    """The same with megatron-core's own GatedDeltaNet in place of this package's."""
    ours = specs.gated_delta_net_spec
    specs.gated_delta_net_spec = _native_spec
    native_gdn.HAVE_FLA, native_gdn.l2norm = True, _l2norm
    try:
        return imported_logits(model_config, checkpoint, tokens, layout)
    finally:
        specs.gated_delta_net_spec = ours
        native_gdn.HAVE_FLA, native_gdn.l2norm = False, None


def _native_spec(backend: Any) -> Any:
    return specs.ModuleSpec(
        module=NativeGatedDeltaNet,
        submodules=specs.GatedDeltaNetSubmodules(
            in_proj=backend.column_parallel_layer_norm_linear(),
            out_norm=backend.layer_norm(rms_norm=True),
            out_proj=backend.row_parallel_linear(),
        ),
    )


def _l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def _load(chunks: list[torch.nn.Module], checkpoint: str) -> tuple[set[str], set[str]]:
    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    for chunk in chunks:
        for parameter in chunk.parameters():
            # what the checkpoint does not fill must show in the logits
            parameter.data.fill_(float("nan"))
    state = {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(chunks)}
    loaded, missing, unexpected = dist_checkpointing.load(
        state, checkpoint, strict=StrictHandling.RETURN_ALL
    )
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=True)
    return missing, unexpected


def _logits(chunks: list[torch.nn.Module], tokens: torch.Tensor) -> torch.Tensor | None:
    def collect(logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return gather_from_tensor_model_parallel_region(logits.detach())

    def forward_step(data_iterator: Any, model: Any) -> Any:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None), collect

    for chunk in chunks:
        chunk.eval()
    iterators: list[Any] = [iter([]) for _ in chunks]
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=ps.get_pipeline_model_parallel_world_size(),
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[0] if outputs else None
