"""Flags around the run: checkpoints, logs, profiles, failures."""

from __future__ import annotations

from qwen35_mcore.training.flags.rows import free, no_effect, unsupported

RESILIENCY = "package:nvidia_resiliency_ext"
WRITER = "tensorboard_dir|wandb_project"
ONE_FORMAT = "checkpoints are written in one format, the one that converts and changes layout"

CHECKPOINTS = (
    free(
        "tests/distributed/test_resume.py, tests/cli/test_pretrain_errors.py",
        """
        save save_interval load finetune pretrained_checkpoint no_save_optim no_save_rng
        no_load_optim no_load_rng
        """,
    ),
    free("tests/cli/test_pretrain_errors.py", "ckpt_step", needs="load|pretrained_checkpoint"),
    free("Megatron's own", "override_ckpt_iteration", needs="load"),
    free("Megatron's own", "save_retain_interval", needs="save"),
    free(
        "Megatron's own",
        """
        exit_on_missing_checkpoint
        ckpt_fully_parallel_save ckpt_fully_parallel_load ckpt_fully_parallel_save_process_group
        ckpt_fully_parallel_load_process_group ckpt_assume_constant_structure
        ckpt_load_validate_sharding_integrity dist_ckpt_strictness dist_ckpt_workers
        verify_integrity distrib_optim_fully_reshardable_mem_efficient
        """,
    ),
    free(
        "it is as it is without the flag",
        """
        use_dist_ckpt_deprecated ckpt_fully_parallel_save_deprecated
        dist_ckpt_optim_fully_reshardable
        """,
    ),
    unsupported(
        "megatron itself warns of the others; here gather_rounds fails, gather_object never ends",
        "ckpt_fully_parallel_load_exchange_algo",
    ),
    free(
        "tests/distributed/test_saves.py",
        "async_save",
        needs="use_persistent_ckpt_worker async_strategy=mcore|package:nvidia_resiliency_ext",
    ),
    free(
        "Megatron's own",
        """
        use_persistent_ckpt_worker async_strategy async_ckpt_cpu_priority async_ckpt_io_priority
        async_ckpt_use_cpu_shm
        """,
        needs="async_save",
    ),
    unsupported(
        "megatron keeps the one of the highest iteration, not the last one written: it may remove "
        "the last one before the next is complete, and takes one past --ckpt-step",
        """
        non_persistent_save_interval non_persistent_ckpt_type non_persistent_global_ckpt_dir
        non_persistent_local_ckpt_dir non_persistent_local_ckpt_algo replication
        replication_jump replication_factor
        """,
        fix="drop the flag; to save often and keep few, pass --save-interval N and "
        "--save-retain-interval M: of the older ones, multiples of M stay",
    ),
    unsupported(ONE_FORMAT, "ckpt_format"),
    unsupported(
        ONE_FORMAT,
        """
        auto_detect_ckpt_format ckpt_convert_format ckpt_convert_save
        ckpt_convert_update_legacy_dist_opt_format
        """,
        fix="drop the flag; qwen35-ckpt converts",
    ),
    unsupported(
        "the model comes from --flavor or --hf-config",
        """
        use_checkpoint_args yaml_cfg use_mp_args_from_checkpoint_args
        use_tokenizer_model_from_checkpoint_args
        """,
    ),
    unsupported(
        "it copies what was rounded to bfloat16 before; --float32-main-params does what it is "
        "meant for",
        "load_main_params_from_ckpt",
    ),
    no_effect(
        "megatron-core 0.19 reads it nowhere",
        "dist_ckpt_format_deprecated dist_ckpt_save_pre_mcore_014",
    ),
    unsupported("checkpoints are written to a file system", "enable_msc"),
    free("it is as it is without the flag", "disable_msc_deprecated"),
    free(
        "Megatron's own",
        "save_params_interval save_wgrads_interval",
        needs="save",
    ),
    free(
        "Megatron's own, of Transformer Engine's layers",
        "save_dgrads_interval save_activations_interval",
        needs="save gpu",
    ),
    free("Megatron's own", "save_tokens_per_expert_interval", needs="num_experts save"),
)

LOGS = (
    free(
        "tests/distributed, examples",
        "log_interval tensorboard_dir log_throughput",
    ),
    free(
        "Megatron's own",
        """
        timing_log_level timing_log_option log_num_zeros_in_grad
        barrier_with_L1_time logging_level log_memory_interval
        """,
    ),
    free("Megatron's own", "log_params_norm", needs="use_precision_aware_optimizer=False"),
    unsupported("megatron-core 0.19 cannot write its process groups", "config_logger_dir"),
    free("Megatron's own", "log_progress", needs="save"),
    free(
        "Megatron's own",
        "tensorboard_log_interval tensorboard_queue_size",
        needs="tensorboard_dir",
    ),
    free(
        "Megatron's own",
        """
        log_timers_to_tensorboard log_validation_ppl_to_tensorboard log_world_size_to_tensorboard
        """,
        needs=WRITER,
    ),
    free("Megatron's own", "log_memory_to_tensorboard", needs=f"gpu {WRITER}"),
    free(
        "it leaves out a value that bf16 and float32 do not have", "log_loss_scale_to_tensorboard"
    ),
    free("Megatron's own", "log_device_memory_used log_max_attention_logit", needs="gpu"),
    free("Megatron's own", "log_energy", needs="gpu package:pynvml"),
    free("Megatron's own", "wandb_project", needs="package:wandb"),
    free("Megatron's own", "wandb_exp_name wandb_save_dir wandb_entity", needs="wandb_project"),
    free("Megatron's own", "moe_routing_trace_path", needs="num_experts"),
    free(
        "Megatron's own",
        """
        moe_routing_trace_max_training_iters moe_routing_trace_capture_logits
        moe_routing_trace_capture_hidden_states moe_routing_trace_dump_weights
        """,
        needs="moe_routing_trace_path",
    ),
    free("Megatron's own", "enable_one_logger"),
    free(
        "Megatron's own",
        """
        one_logger_project one_logger_run_name one_logger_async app_tag_run_name
        app_tag_run_version
        """,
        needs="package:one_logger",
    ),
    free("Megatron's own", "log_straggler", needs="gpu"),
    free(
        "Megatron's own",
        "straggler_ctrlr_port straggler_minmax_count disable_straggler_on_startup",
        needs="log_straggler",
    ),
    free("Megatron's own", "run_workload_inspector_server", needs="package:workload_inspector"),
)

PROFILES = (
    free("Megatron's own", "profile", needs="gpu|use_pytorch_profiler"),
    free(
        "Megatron's own",
        "profile_step_start profile_step_end profile_ranks",
        needs="profile",
    ),
    free(
        "Megatron's own; it writes beside the event files",
        "use_pytorch_profiler",
        needs="profile tensorboard_dir",
    ),
    free("Megatron's own", "nvtx_ranges record_shapes", needs="profile gpu"),
    free(
        "Megatron's own",
        """
        pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack
        pytorch_profiler_collect_chakra
        """,
        needs="profile use_pytorch_profiler",
    ),
    free("Megatron's own", "record_memory_history", needs="gpu"),
    free("Megatron's own", "memory_snapshot_path", needs="record_memory_history"),
)

FAILURES = (
    free(
        "disabled by default: the check of losses and gradients then includes the first step",
        "rerun_mode",
    ),
    unsupported(
        "megatron-core 0.19 does not know the name that its own parser offers",
        "rerun_mode",
        values="report_stats",
        fix="pass --rerun-mode validate_results, or drop the flag",
    ),
    free(
        "Megatron's own",
        "error_injection_rate error_injection_type result_rejected_tracker_filename",
        needs="rerun_mode=validate_results",
    ),
    no_effect("the loss function of this script does not read it", "check_for_spiky_loss"),
    free("Megatron's own", "enable_ft_package", needs=RESILIENCY),
    free("Megatron's own", "calc_ft_timeouts ft_num_warmup_iters", needs="enable_ft_package"),
    free(
        "Megatron's own",
        """
        fault_injector_ranks fault_injector_num_ranks fault_injector_fault_types
        fault_injector_fault_probabilities fault_injector_fault_delay
        fault_injector_delay_start_iteration fault_injector_mtti_seconds
        fault_injector_offset_seconds fault_injector_seed
        """,
        needs=RESILIENCY,
    ),
    no_effect(
        "this script does not wrap its run in it",
        """
        inprocess_restart inprocess_max_iterations inprocess_monitor_thread_interval
        inprocess_monitor_process_interval inprocess_progress_watchdog_interval
        inprocess_heartbeat_interval inprocess_soft_timeout inprocess_hard_timeout
        inprocess_heartbeat_timeout inprocess_barrier_timeout inprocess_completion_timeout
        inprocess_last_call_wait inprocess_termination_grace_time inprocess_granularity
        inprocess_active_world_size inprocess_empty_cuda_cache
        """,
    ),
    unsupported(
        "it needs a module of NVIDIA's clusters", "adlr_autoresume adlr_autoresume_interval"
    ),
    free("it lets experimental functions of megatron-core be called", "enable_experimental"),
)
