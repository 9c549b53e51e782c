"""Pretrain Qwen3.5 with megatron.training, on GPUs or (over gloo) on CPUs.

    torchrun --nproc-per-node 8 examples/pretrain_qwen35.py --flavor 35b-a3b ...

--flavor or --hf-config choose the model; every other flag is Megatron's own. See README.md beside
this file for a walk-through.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

from qwen35_mcore.process.interrupts import quiet_imports

if __name__ == "__main__":
    imports = contextlib.ExitStack()
    imports.enter_context(quiet_imports())

from qwen35_mcore.mcore import cpu_mode

if cpu_mode.is_needed():
    cpu_mode.enable_training()

import torch

from qwen35_mcore.config.flops import training_flops
from qwen35_mcore.mcore.imports import (
    BlendedMegatronDatasetBuilder,
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
    ModelType,
    flatten_batch_for_packed_sequences,
    get_args,
    get_attr_wrapped_model,
    get_batch_on_this_tp_rank,
    get_blend_and_blend_per_split,
    get_timers,
    get_tokenizer,
    is_first_or_last_pipeline_stage,
    mpu,
    mtp_on_this_rank,
    pretrain,
    pretrain_cfg_container_from_args,
)
from qwen35_mcore.mcore.patches.install import install
from qwen35_mcore.model.build import make_model_provider
from qwen35_mcore.training.arguments import parse_arguments
from qwen35_mcore.training.checks.data import check_batch
from qwen35_mcore.training.job_errors import reported_once
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
    """This rank's part of the next microbatch; all None on stages that need no tokens."""
    args = get_args()
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


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """One microbatch through one model chunk, as megatron's schedules call it."""
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, model, vp_stage)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_sequences(batch),
        padding_mask=batch["padding_mask"],
    )
    return output, partial(loss_function, batch["loss_mask"])


def datasets(sample_counts: list[int], vp_stage: int | None = None) -> Any:
    """Train, validation and test datasets; built on the ranks that feed a model."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        inter_document_masking=args.dataloader_inter_document_masking,
        context_parallel_size=args.context_parallel_size,
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    needed = is_first_or_last_pipeline_stage(vp_stage) or args.dataloader_inter_document_masking
    on_this_rank = needed and mpu.get_tensor_model_parallel_rank() == 0
    return BlendedMegatronDatasetBuilder(
        dataset, sample_counts, lambda: on_this_rank, config
    ).build()


datasets.is_distributed = True  # type: ignore[attr-defined]


def main() -> None:
    args, model = parse_arguments()
    install(partial(training_flops, model), accept_untested=args.accept_untested_megatron)
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=make_model_provider(model, args),
    )


if __name__ == "__main__":
    imports.close()
    with reported_once():
        main()
