"""Build and train a small model at any parallel layout, inside a pool worker."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    FullyShardedDataParallel,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.mcore.patches.mtp_loss_log import PATCHES as MTP_LOSS_LOG
from qwen35_mcore.model.build import build_model
from qwen35_mcore.model.transformer_config import (
    Qwen35TransformerConfig,
    apply_yarn,
)
from qwen35_mcore.model.vision.freeze import Part, freeze
from qwen35_mcore.training.arguments import read_flags, validated_config
from qwen35_mcore.training.checks.run import check_flags
from qwen35_mcore.training.packed_documents import packed_sequences
from tests.helpers.batches import Batch, on_this_rank
from tests.helpers.shards import (
    Shard,
    copies,
    fsdp_gradient_shards,
    fsdp_parameter_shards,
    gradient_shards,
    load_global,
    local_shards,
)

LOCAL = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "calculate_per_token_loss": True,
    "moe_grouped_gemm": True,
}
"""For a TransformerConfig built by hand; `config_for` reads flags as a run does."""


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and what a run switches on beside the model; the default is the serial run."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    stages: str | None = None  # megatron's pipeline_model_parallel_layout
    decoder: str = "gpt"
    pattern: str | None = None  # of the hybrid decoder, with its cuts
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sp: bool | None = None  # None: on when tp > 1
    dtype: torch.dtype = torch.float32
    distributed_optimizer: bool = True
    overlap: bool = False
    fsdp: str | None = None  # what megatron's FSDP shards
    packed: bool = False  # the batches have documents
    vision: bool = False  # the vision-language model
    frozen: tuple[Part, ...] = ()  # parts of it that do not train
    run: dict[str, Any] = field(default_factory=dict)  # further TransformerConfig fields


@dataclass
class Result:
    """What one rank saw: step-0 values in full, then one number per step."""

    # first sample and CP rank: positions in the microbatch and their losses
    token_loss: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )
    gradients: list[Shard] = field(default_factory=list)
    parameters: list[Shard] = field(default_factory=list)
    loss_sums: list[torch.Tensor] = field(default_factory=list)  # [loss, tokens] per step
    grad_norms: list[float] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)  # what megatron's log says of step 0


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
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # the last case's may have another shape


def config_for(model_config: Qwen35Config, layout: Layout) -> Qwen35TransformerConfig:
    """What a user's run on a CPU gets who asks for this layout: defaults, flags and megatron's
    completion of them, with the layout's ``run`` on top."""
    with _world(), contextlib.redirect_stdout(io.StringIO()):
        args = read_flags(_flags(layout), model_config, on_cpu=True)
        for name, value in layout.run.items():
            setattr(args, _ARGUMENTS.get(name, name), value)
        check_flags(args)
        config = validated_config(args)
    apply_yarn(config, model_config.yarn)
    for name, value in layout.run.items():
        assert getattr(config, name) == value, name
    return config


_ARGUMENTS = {"bias_activation_fusion": "bias_swiglu_fusion"}
"""TransformerConfig fields that an argument of another name decides."""


def _flags(layout: Layout) -> list[str]:
    flags = {
        "--tensor-model-parallel-size": layout.tp,
        "--pipeline-model-parallel-size": layout.pp,
        "--context-parallel-size": layout.cp,
        "--expert-model-parallel-size": layout.ep,
        "--expert-tensor-parallel-size": layout.etp,
        "--micro-batch-size": 1,
        "--global-batch-size": 64,
        "--train-iters": 1,
        "--lr": 1e-3,
        "--seq-length": 64,
        "--cuda-graph-impl": "none",
        "--decoder": layout.decoder,
    }
    if layout.pattern:
        flags["--hybrid-layer-pattern"] = layout.pattern
    elif layout.stages:
        flags["--pipeline-model-parallel-layout"] = layout.stages
    elif layout.vpp:
        flags["--num-virtual-stages-per-pipeline-rank"] = layout.vpp
    switches = {
        "--sequence-parallel": layout.tp > 1 if layout.sp is None else layout.sp,
        "--bf16": layout.dtype == torch.bfloat16,
        "--dataloader-inter-document-masking": layout.packed,
        "--use-distributed-optimizer": layout.distributed_optimizer,
        "--mock-data": True,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return words + [name for name, on in switches.items() if on]


@contextlib.contextmanager
def _world() -> Iterator[None]:
    """The environment from which megatron reads the number of ranks."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(ranks), "RANK": str(rank)}):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        yield


def build_chunks(
    model_config: Qwen35Config, config: Qwen35TransformerConfig, layout: Layout
) -> list[torch.nn.Module]:
    """This rank's model chunks, unwrapped."""
    chunks = []
    for stage in range(layout.vpp or 1):
        vp_stage = stage if layout.vpp else None
        first = ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        chunk = build_model(
            model_config,
            config,
            decoder=layout.decoder,
            hybrid_layer_pattern=layout.pattern,
            pre_process=first,
            post_process=last,
            vp_stage=vp_stage,
            vision=layout.vision,
        )
        chunks.append(chunk.cuda())
    return chunks


def train(
    model_config: Qwen35Config,
    layout: Layout,
    weights: dict[str, torch.Tensor] | None,
    batches: Sequence[Batch],
    micro_batch_size: int = 1,
    lr: float = 1e-3,
) -> Result:
    """Train one step per batch from the given global weights; the step-0 gradients come whole."""
    initialize(layout)
    MTPLossLoggingHelper.tracker.clear()
    for patch in MTP_LOSS_LOG:
        patch.apply()
    config = config_for(model_config, layout)
    chunks = build_chunks(model_config, config, layout)
    if weights is not None:
        load_global(chunks, weights)
    for chunk in chunks:
        freeze(chunk, layout.frozen)
    wrapped, optimizer = wrap(chunks, config, layout, lr)
    result = Result()
    for step, batch in enumerate(batches):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        here = batch.to(torch.cuda.current_device())
        losses = forward_backward(here, wrapped, config, micro_batch_size, result, step)
        logged = _logged(config, len(batch.tokens) // micro_batch_size)
        if step == 0:
            shards = fsdp_gradient_shards if layout.fsdp else gradient_shards
            result.gradients = shards(wrapped)
            result.logged = logged
        _, grad_norm, _ = optimizer.step()
        result.loss_sums.append(losses)
        result.grad_norms.append(float(grad_norm))
    result.parameters = (
        fsdp_parameter_shards(wrapped) if layout.fsdp else copies(local_shards(chunks))
    )
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
        use_megatron_fsdp=layout.fsdp is not None,
        data_parallel_sharding_strategy=layout.fsdp or "no_shard",
        megatron_fsdp_main_grads_dtype=torch.float32,
        gradient_reduce_div_fusion=dist.get_backend() == "nccl",
    )
    kind = FullyShardedDataParallel if layout.fsdp else DistributedDataParallel
    wrapped = [
        kind(config, ddp_config, module, disable_bucketing=i > 0)
        for i, module in enumerate(modules)
    ]
    if not layout.fsdp:
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
    forward_only: bool = False,
) -> torch.Tensor:
    """One global batch; returns the summed loss and the token count, equal on every rank. A
    microbatch of all replicas is consecutive samples, as in megatron's sampler."""
    replicas, replica = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    at_once = replicas * micro_batch_size
    firsts = range(replica * micro_batch_size, batch.tokens.shape[0], at_once)
    hidden = config.overlap_moe_expert_parallel_comm

    def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        assert return_schedule_plan == (hidden and not forward_only)  # else nothing is hidden
        first = next(data_iterator)
        sample = batch.sample_on_this_rank(first, micro_batch_size)
        compute = model.build_schedule_plan if return_schedule_plan else model
        output = compute(
            sample["tokens"],
            sample["position_ids"],
            None,
            labels=sample["labels"],
            loss_mask=sample["loss_mask"],
            packed_seq_params=packed_sequences(sample),
            padding_mask=sample["padding_mask"],
            **batch.images(first, micro_batch_size),
        )
        return output, partial(loss_function, first, sample["loss_mask"])

    def loss_function(first: int, mask: torch.Tensor, output: torch.Tensor) -> Any:
        if step == 0:
            places = _places(batch.sample(first, micro_batch_size))
            place = (first, ps.get_context_parallel_rank())
            result.token_loss[place] = (places, output.detach().float().clone())
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
        forward_only=forward_only,
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


def _places(sample: dict[str, Any]) -> torch.Tensor:
    """The position in the microbatch, row after row, of every token of this rank; -1 is padding."""
    numbers = torch.arange(1, sample["tokens"].numel() + 1, device=sample["tokens"].device)
    sample["tokens"] = numbers.view_as(sample["tokens"])
    return on_this_rank(sample)["tokens"] - 1


_BALANCING = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def _logged(config: Qwen35TransformerConfig, microbatches: int) -> dict[str, float]:
    """The losses beside the language model's in megatron's log line, on ranks that know them."""
    losses: dict[str, torch.Tensor] = {}
    scale = ps.get_data_parallel_world_size() / microbatches
    name = _BALANCING.get(config.moe_router_load_balancing_type)
    if config.num_moe_experts and name:
        get_moe_metrics_tracker().report(
            loss_scale=scale,
            iteration=1,
            force_initialize=True,
            track_names=[name],
            num_layers=config.num_layers,
            mtp_num_layers=config.mtp_num_layers,
            total_loss_dict=losses,
        )
    if config.mtp_num_layers:
        MTPLossLoggingHelper.track_mtp_metrics(scale, 1, None, None, losses)
    return {name: float(loss) for name, loss in losses.items()}
