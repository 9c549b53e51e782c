"""Train, validation and test datasets of a run, from its flags."""

from __future__ import annotations

from typing import Any

from qwen35_mcore.mcore.imports import (
    BlendedMegatronDatasetBuilder,
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
    get_args,
    get_blend_and_blend_per_split,
    get_tokenizer,
    is_first_or_last_pipeline_stage,
    mpu,
)
from qwen35_mcore.training.image_data import conversations


def datasets(sample_counts: list[int], vp_stage: int | None = None) -> Any:
    """Train, validation and test datasets, as megatron asks for them on every rank.

    With ``--image-data`` they are the loaders of `conversations`.

    Args:
        sample_counts: samples of the three that the run will read.
        vp_stage: of the model chunk that they are for, under virtual pipeline parallelism.

    Returns:
        Three of megatron's GPTDataset, or lists of them; None on the ranks that feed no model.
    """
    args = get_args()
    if args.image_data:
        return conversations(vp_stage)
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
