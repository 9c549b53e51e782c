"""Flags of the run: steps, batches, the optimizer and its schedule, validation, data."""

from __future__ import annotations

from qwen35_mcore.training.flags.rows import free, no_effect, unsupported

MUON = "optimizer=muon|optimizer=dist_muon"
NULL, TIKTOKEN = "tokenizer_type=NullTokenizer", "tokenizer_type=TikTokenizer"

STEPS = (
    free(
        "tests/distributed, tests/cli/test_pretrain_errors.py",
        """
        micro_batch_size global_batch_size train_iters exit_interval
        exit_signal_handler
        calculate_per_token_loss check_for_nan_in_loss_and_grad
        """,
    ),
    free(
        "Megatron's own",
        """
        manual_gc exit_duration_in_mins exit_signal_handler_for_training
        decrease_batch_size_if_needed iterations_to_skip
        check_weight_hash_across_dp_replicas_interval skip_train
        """,
    ),
    free(
        "Megatron's own; its FSDP does not read it",
        "check_for_large_grads",
        needs="use_megatron_fsdp=False",
    ),
    free(
        "tests/distributed/test_resume_changes.py",
        "train_samples",
        needs="train_iters=None|skip_train",
    ),
    free("Megatron's own", "step_batch_size_schedule", needs="global_batch_size=None"),
    free(
        "Megatron's own",
        "empty_unused_memory_level gpu_sniff_test_interval train_sync_interval",
        needs="gpu",
    ),
    free("Megatron's own", "exit_signal", needs="exit_signal_handler"),
    free("Megatron's own", "manual_gc_interval manual_gc_eval", needs="manual_gc"),
    no_effect(
        "megatron-core 0.19 reads it nowhere",
        "rampup_batch_size",
        fix="pass --step-batch-size-schedule in place of this flag and of --global-batch-size",
    ),
    no_effect(
        "megatron-core 0.19 reads it nowhere",
        "exit_signal_handler_for_dataloader",
        fix="pass --exit-signal-handler",
    ),
    unsupported(
        "megatron-core 0.19 takes it no longer", "batch_size", fix="pass --micro-batch-size"
    ),
    unsupported("it trains nothing", "freeze_all_layers"),
    no_effect("it stands for a test of megatron's inference", "test_mode"),
)

OPTIMIZER = (
    free("tests/distributed/test_resume.py", "optimizer weight_decay clip_grad"),
    free(
        "tests/distributed/test_muon.py",
        "optimizer",
        values="muon dist_muon",
        needs="package:emerging_optimizers use_megatron_fsdp=False use_torch_fsdp2=False "
        "use_precision_aware_optimizer=False optimizer_cpu_offload=False "
        "optimizer_cuda_graph=False fp8_param_gather=False fp4_param_gather=False "
        "num_distributed_optimizer_instances=1",
    ),
    free(
        "sharded by layers it takes bf16 alone",
        "optimizer",
        values="muon",
        needs="bf16|use_distributed_optimizer=False",
    ),
    free("sharded by layers it takes bf16 alone", "optimizer", values="dist_muon", needs="bf16"),
    unsupported(
        "it leaves stacked experts to Adam, and takes the projections of a GatedDeltaNet, and gate "
        "and up of an MLP, as one matrix",
        "optimizer",
        values="soap",
        fix="pass --optimizer muon",
    ),
    unsupported(
        "megatron-core 0.19 leaves stacked experts, embeddings and norms to Adam, and gives it "
        "Adam's betas",
        "optimizer",
        values="lion",
        fix="pass --optimizer adam, or --optimizer muon --muon-scalar-optimizer lion",
    ),
    unsupported(
        "megatron-core 0.19 builds it without its scale mode, and its first step fails",
        "optimizer",
        values="adaptive_muon",
        fix="pass --optimizer muon",
    ),
    free("Megatron's own", "apply_wd_to_qk_layernorm no_weight_decay_cond_type"),
    free(
        "Megatron's own",
        "adam_beta1 adam_beta2 adam_eps",
        needs=f"optimizer=adam|{MUON} muon_scalar_optimizer=adam",
    ),
    free("Megatron's own", "sgd_momentum", needs="optimizer=sgd"),
    free(
        "Megatron's own",
        """
        muon_momentum muon_nesterov muon_scale_mode muon_fp32_matmul_prec
        muon_coefficient_type muon_num_ns_steps muon_tp_mode muon_extra_scale_factor
        muon_scalar_optimizer
        """,
        needs=MUON,
    ),
    unsupported("Muon takes query, gate, key and value as a matrix each", "muon_split_qkv"),
    free(
        "Megatron's own",
        "lion_beta1 lion_beta2",
        needs="muon_scalar_optimizer=lion",
    ),
    free("Megatron's own", "dump_param_to_param_group_map"),
)

SCHEDULE = (
    free(
        "tests/distributed/test_resume.py, tests/cli/test_pretrain_errors.py",
        """
        lr min_lr lr_decay_style override_opt_param_scheduler
        """,
    ),
    free(
        "tests/distributed/test_resume.py, tests/cli/test_pretrain_errors.py",
        "lr_decay_iters lr_warmup_iters",
        needs="train_samples=None|skip_train",
    ),
    free(
        "tests/distributed/test_resume.py, tests/cli/test_pretrain_errors.py",
        "lr_decay_samples lr_warmup_samples",
        needs="train_iters=None|skip_train",
    ),
    free(
        "Megatron's own",
        "lr_warmup_fraction",
        needs="lr_warmup_iters=0|skip_train lr_warmup_samples=0|skip_train",
    ),
    free(
        "Megatron's own",
        """
        lr_warmup_init use_checkpoint_opt_param_scheduler weight_decay_incr_style
        decoupled_lr decoupled_min_lr
        """,
    ),
    free(
        "Megatron's own",
        "start_weight_decay end_weight_decay",
        needs="weight_decay_incr_style=linear|weight_decay_incr_style=cosine",
    ),
    free(
        "Megatron's own",
        "lr_decay_style",
        values="WSD",
        needs="lr_wsd_decay_iters|lr_wsd_decay_samples",
    ),
    free("Megatron's own", "lr_wsd_decay_style", needs="lr_decay_style=WSD"),
    free("Megatron's own", "lr_wsd_decay_iters", needs="lr_decay_style=WSD train_iters"),
    free("Megatron's own", "lr_wsd_decay_samples", needs="lr_decay_style=WSD train_samples"),
    unsupported("megatron-core 0.19 takes it no longer", "warmup", fix="pass --lr-warmup-fraction"),
)

VALIDATION = (
    free("tests/distributed", "eval_iters eval_interval"),
    free(
        "Megatron's own",
        """
        start_eval_at_iter eval_global_batch_size eval_micro_batch_size
        """,
    ),
    free(
        "Megatron's own, which has each with the other",
        "full_validation",
        needs="multiple_validation_sets",
    ),
    free(
        "Megatron's own, which has each with the other",
        "multiple_validation_sets",
        needs="full_validation",
    ),
    free("Megatron's own", "validation_set_names", needs="multiple_validation_sets"),
)

DATA = (
    free(
        "tests/unit/test_data_megatron.py, tests/cli/test_pretrain_errors.py",
        """
        data_path split train_data_path valid_data_path test_data_path data_args_path
        per_split_data_args_path mock_data seq_length num_workers
        """,
    ),
    free(
        "packed sequences, which parity/test_packed.py compares with documents one by one",
        "dataloader_inter_document_masking",
    ),
    free("tests/distributed", "eod_mask_loss"),
    free(
        "Megatron's own",
        """
        data_cache_path mmap_bin_files num_dataset_builder_threads mid_level_dataset_surplus
        dataloader_type
        """,
    ),
    free("it is as it is without the flag", "create_attention_mask_in_dataloader"),
    unsupported(
        "the script builds its own data sets",
        "dataloader_type",
        values="external",
        fix="pass single or cyclic, or drop the flag",
    ),
    no_effect(
        "neither the position embedding nor GatedDeltaNet reads what it changes",
        "reset_position_ids reset_attention_mask",
        fix="pass --dataloader-inter-document-masking, which separates documents",
    ),
    no_effect(
        "the data sets of this script do not read it",
        """
        phase_transition_iterations per_dataset_sequences_path dataloader_fast_cache_load
        dataloader_defer_npy_index_mmap object_storage_cache_path allow_ambiguous_pad_tokens
        sample_rate mask_prob short_seq_prob fim_data fim_rate fim_spm_rate fim_split_sample
        fim_fragment_rate fim_no_prefix fim_prefix_token fim_middle_token fim_suffix_token
        fim_pad_token fim_eod_token
        """,
    ),
    unsupported("the script trains on plain documents", "sft sft_tokenizer_prompt_format"),
    unsupported(
        "it is of models with an encoder and a decoder",
        "encoder_seq_length decoder_seq_length",
        fix="pass --seq-length",
    ),
)

TOKENIZER = (
    free("tests/cli/test_pretrain_errors.py", "tokenizer_type"),
    free("Megatron's own", "tokenizer_model"),
    free(
        "Megatron's own",
        """
        vocab_file merge_file metadata_path special_tokens tokenizer_hf_no_use_fast
        tokenizer_hf_no_include_special_tokens trust_remote_code chat_template
        """,
    ),
    free("Megatron's own", "tiktoken_pattern tiktoken_num_special_tokens", needs=TIKTOKEN),
    free(
        "Megatron's own",
        "tokenizer_sentencepiece_legacy tokenizer_sentencepiece_ignore_extra_whitespaces",
        needs="tokenizer_type=SentencePieceTokenizer|tokenizer_type=GPTSentencePieceTokenizer"
        "|tokenizer_type=Llama2Tokenizer",
    ),
    free(
        "tests/cli/test_pretrain_errors.py",
        "vocab_size",
        needs=f"{NULL}|{TIKTOKEN}",
    ),
    free("Megatron's own", "null_tokenizer_eod_id null_tokenizer_pad_id", needs=NULL),
    unsupported(
        "the script trains on plain documents",
        "tokenizer_type",
        values="SFTTokenizer MultimodalTokenizer NullMultimodalTokenizer",
        fix="drop the flag: the tokenizer that made the data is taken",
    ),
    no_effect("megatron-core 0.19 reads it nowhere", "vocab_extra_ids"),
)
