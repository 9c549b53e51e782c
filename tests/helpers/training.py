"""Build and train a small model at any parallel layout, inside a pool worker."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import get_batch_on_this_cp_rank

from qwen35_mcore.config import Qwen35Config
from qwen35_mcore.provider import build_model
from qwen35_mcore.transformer_config import Qwen35TransformerConfig, transformer_config
from tests.helpers.shards import Shard, gradient_shards, load_global, local_shards

LOCAL = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "calculate_per_token_loss": True,
    "moe_grouped_gemm": True,
}


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and what a run switches on beside the model; the default is the serial run."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    stages: str | None = None  # megatron's pipeline_model_parallel_layout
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool | None = None  # None: on when tp > 1
    dtype: torch.dtype = torch.float32
    distributed_optimizer: bool = True
    overlap: bool = False
    run: dict[str, Any] = field(default_factory=dict)  # further TransformerConfig fields


@dataclass
class Batch:
    """One global batch: tokens ``[b, s + 1]`` int64 and the mask of the positions that count."""

    tokens: torch.Tensor
    loss_mask: torch.Tensor | None = None

    def to(self, device: Any) -> Batch:
        mask = None if self.loss_mask is None else self.loss_mask.to(device)
        return Batch(self.tokens.to(device), mask)

    def sample(self, first: int, count: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[first : first + count]
        length = tokens.shape[1] - 1
        positions = torch.arange(length, device=tokens.device)
        mask = self.loss_mask
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(count, length, device=tokens.device)
            if mask is None
            else mask[first : first + count].float(),
            "position_ids": positions.expand(count, -1).contiguous(),
        }


@dataclass
class Result:
    """What one rank saw: step-0 values in full, then one number per step."""

    token_loss: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    gradients: list[Shard] = field(default_factory=list)
    parameters: list[Shard] = field(default_factory=list)
    loss_sums: list[torch.Tensor] = field(default_factory=list)  # [loss, tokens] per step
    grad_norms: list[float] = field(default_factory=list)
    mtp_loss: torch.Tensor | None = None


def initialize(layout: Layout, seed: int = 123) -> None:
    """Process groups and random states for one layout, whatever ran before in this process."""
    for switch in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(switch, None)  # megatron sets and checks them, and sticks to the first
    ps.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def config_for(hf: Qwen35Config, layout: Layout) -> Qwen35TransformerConfig:
    """The TransformerConfig of a layout, with the local backend."""
    run: dict[str, Any] = LOCAL | {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "pipeline_model_parallel_layout": layout.stages,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.tp > 1 if layout.sp is None else layout.sp,
        "params_dtype": layout.dtype,
        "pipeline_dtype": layout.dtype,
        "bf16": layout.dtype == torch.bfloat16,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
    if layout.vpp:
        run |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return transformer_config(hf, **run | layout.run)


def build_chunks(
    hf: Qwen35Config, config: Qwen35TransformerConfig, layout: Layout
) -> list[torch.nn.Module]:
    """This rank's model chunks, unwrapped."""
    chunks = []
    for stage in range(layout.vpp or 1):
        vp_stage = stage if layout.vpp else None
        first = ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        chunk = build_model(hf, config, pre_process=first, post_process=last, vp_stage=vp_stage)
        chunks.append(chunk.cuda())
    return chunks


def train(
    hf: Qwen35Config,
    layout: Layout,
    weights: dict[str, torch.Tensor] | None,
    batches: list[Batch],
    micro_batch_size: int = 1,
    lr: float = 1e-3,
) -> Result:
    """Train one step per batch from the given global weights; the step-0 gradients come whole."""
    initialize(layout)
    MTPLossLoggingHelper.tracker.clear()
    config = config_for(hf, layout)
    chunks = build_chunks(hf, config, layout)
    if weights is not None:
        load_global(chunks, weights)
    wrapped, optimizer = wrap(chunks, config, layout, lr)
    result = Result()
    for step, batch in enumerate(batches):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        here = batch.to(torch.cuda.current_device())
        losses = forward_backward(here, wrapped, config, micro_batch_size, result, step)
        if step == 0:
            result.gradients = gradient_shards(wrapped)
            result.mtp_loss = _mtp_loss()
        _, grad_norm, _ = optimizer.step()
        result.loss_sums.append(losses)
        result.grad_norms.append(float(grad_norm))
    result.parameters = [
        Shard(s.key, s.global_shape, s.offset, s.data.clone()) for s in local_shards(chunks)
    ]
    return result


def wrap(
    chunks: list[torch.nn.Module], config: Qwen35TransformerConfig, layout: Layout, lr: float
) -> tuple[list[Any], Any]:
    modules: list[Any] = chunks
    if layout.dtype == torch.bfloat16:
        modules = [Float16Module(config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap,
        bucket_size=20_000 if layout.overlap else None,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=i > 0)
        for i, module in enumerate(modules)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=lr,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=layout.dtype == torch.bfloat16,
            params_dtype=layout.dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap,
        ),
        wrapped,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if layout.overlap:
        config.no_sync_func = _one_or_list([c.no_sync for c in wrapped])
        if layout.pp > 1:
            config.grad_sync_func = _one_or_list([c.start_grad_sync for c in wrapped])
            config.param_sync_func = _one_or_list([c.start_param_sync for c in wrapped])
    return wrapped, optimizer


def _one_or_list(values: list[Any]) -> Any:
    return values if len(values) > 1 else values[0]


def forward_backward(
    batch: Batch,
    wrapped: list[Any],
    config: Qwen35TransformerConfig,
    micro_batch_size: int,
    result: Result,
    step: int,
) -> torch.Tensor:
    """One global batch; returns the summed loss and the token count, equal on every rank."""
    replicas, replica = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    per_replica = batch.tokens.shape[0] // replicas
    firsts = range(replica * per_replica, (replica + 1) * per_replica, micro_batch_size)

    def forward_step(data_iterator: Any, model: Any) -> Any:
        first = next(data_iterator)
        sample = batch.sample(first, micro_batch_size)
        sample = get_batch_on_this_cp_rank(sample, False, cp_group=ps.get_context_parallel_group())
        output = model(
            sample["tokens"],
            sample["position_ids"],
            None,
            labels=sample["labels"],
            loss_mask=sample["loss_mask"],
        )
        return output, partial(loss_function, first, sample["loss_mask"])

    def loss_function(first: int, mask: torch.Tensor, output: torch.Tensor) -> Any:
        if step == 0:
            place = (first, ps.get_context_parallel_rank())
            result.token_loss[place] = output.detach().float().clone()
        loss, tokens = (output.float() * mask).sum(), mask.sum().to(torch.int)
        return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=_one_or_list([iter(firsts) for _ in wrapped]),
        model=_one_or_list(wrapped),
        num_microbatches=len(firsts),
        seq_length=batch.tokens.shape[1] - 1,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=batch.tokens.shape[1] - 1,
        forward_only=False,
    )
    losses = torch.zeros(2, device=batch.tokens.device)
    if ps.is_pipeline_last_stage(ignore_virtual=True):
        losses = torch.stack([o["lm loss"] for o in outputs]).sum(0)
        group = ps.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(losses, group=group)
    torch.distributed.broadcast(
        losses, ps.get_pipeline_model_parallel_last_rank(), ps.get_pipeline_model_parallel_group()
    )
    return losses


def _mtp_loss() -> torch.Tensor | None:
    """The multi-token-prediction loss that megatron's own log shows, as this rank keeps it."""
    tracker = MTPLossLoggingHelper.tracker
    losses = tracker.get("loss_values")
    return None if losses is None else losses.clone()
