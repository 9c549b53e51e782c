"""One microbatch: a rank's part of it, and its way through a model chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qwen35_mcore.mcore.imports import (
    flatten_batch_for_packed_sequences,
    get_args,
    get_attr_wrapped_model,
    get_batch_on_this_tp_rank,
    get_timers,
    is_first_or_last_pipeline_stage,
    mpu,
    mtp_on_this_rank,
)
from qwen35_mcore.training.checks.data import check_batch
from qwen35_mcore.training.image_batches import IMAGES, broadcast_batch, part_of_this_rank
from qwen35_mcore.training.loss import loss_function
from qwen35_mcore.training.packed_documents import batch_on_this_cp_rank, packed_sequences

BATCH_KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
)


def get_batch(data_iterator: Any, model: Any, vp_stage: int | None) -> dict[str, Any]:
    """This rank's part of the next microbatch, on its device; all None on stages without tokens.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` int64 and ``loss_mask`` float32, ``[b, s / cp]``,
        what describes packed documents, and ``padding_mask``: see `batch_on_this_cp_rank`. Of
        ``--image-data`` also the images, and positions ``[3, b, s / cp]``, on every stage.
    """
    args = get_args()
    if args.image_data:
        return _conversations(data_iterator, model, args)
    packed = args.dataloader_inter_document_masking
    layout = get_attr_wrapped_model(model, "config").pipeline_model_parallel_layout
    has_mtp = mtp_on_this_rank(layout, args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)
    if not (is_first_or_last_pipeline_stage(vp_stage) or has_mtp or packed):
        return dict.fromkeys((*BATCH_KEYS, "padding_mask"))
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        batch = dict(next(data_iterator))
        check_batch(batch["tokens"], batch["labels"], args.padded_vocab_size)
        for key in BATCH_KEYS:
            value = batch.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size if model.training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(False, vp_stage),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(False, vp_stage),
    )
    return batch_on_this_cp_rank(
        flatten_batch_for_packed_sequences(batch),
        mpu.get_context_parallel_group(),
        args.tensor_model_parallel_size,
        fp8=bool(args.fp8),
    )


def _conversations(data_iterator: Any, model: Any, args: Any) -> dict[str, Any]:
    given = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        given = next(data_iterator)
        check_batch(given["tokens"], given["labels"], args.padded_vocab_size)
    has_tower = get_attr_wrapped_model(model, "pre_process") and args.qwen35_vision
    batch = part_of_this_rank(
        broadcast_batch(given, patches=has_tower),
        get_attr_wrapped_model(model, "vision") if args.qwen35_vision else None,
        mpu.get_context_parallel_group(),
        tp_size=args.tensor_model_parallel_size,
        fp8=bool(args.fp8),
    )
    return batch | {"attention_mask": None}


def forward_step(
    data_iterator: Any,
    model: Any,
    return_schedule_plan: bool = False,
    *,
    loss_function: Callable[..., tuple[Any, ...]] = loss_function,
) -> tuple[torch.Tensor, Callable[..., tuple[Any, ...]]]:
    """One microbatch through one model chunk, as megatron's schedules call it.

    Args:
        data_iterator: of megatron's batches: dicts of CPU tensors ``[b, s]``; see `get_batch`.
        return_schedule_plan: leave the computation to megatron's schedule, which runs it beside
            the backward pass of another microbatch (``--overlap-moe-expert-parallel-comm``).
        loss_function: takes the loss mask and the losses, see `qwen35_mcore.training.loss`.

    Returns:
        What the chunk computes (on the last stage the losses ``[b, s / cp]``, float32) or its
        schedule plan, and the function that megatron calls with the losses.

    Raises:
        DataError: a token that the model does not have, or images and their tokens that do not fit
            together.
    """
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, model, vp_stage)
    timers("batch-generator").stop()
    compute = model.build_schedule_plan if return_schedule_plan else model
    output = compute(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_sequences(batch),
        padding_mask=batch["padding_mask"],
        **{name: batch[name] for name in IMAGES if get_args().qwen35_vision},
    )
    return output, partial(loss_function, batch["loss_mask"])
