"""Flags of how the work is shared: the layout, communication, gradients, the optimizer's state."""

from __future__ import annotations

from qwen35_mcore.training.flags.rows import free, unsupported

OF_FSDP = "it is of FSDP, which was not tested with it"

LAYOUT = (
    free(
        "tests/distributed",
        """
        tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size
        context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
        pipeline_model_parallel_layout
        """,
    ),
    free(
        "Megatron's own ways to say what --pipeline-model-parallel-layout says",
        """
        num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
        """,
    ),
    free(
        "tests/distributed/cases.py: cuts also between a token mixer and its feed-forward",
        "hybrid_layer_pattern",
        needs="decoder=hybrid",
    ),
    free(
        "tests/distributed",
        "microbatch_group_size_per_vp_stage",
        needs="num_layers_per_virtual_pipeline_stage|num_virtual_stages_per_pipeline_rank"
        "|pipeline_model_parallel_layout|hybrid_layer_pattern",
    ),
    free("Megatron's own", "use_tp_pp_dp_mapping"),
    unsupported(
        "the layers here do not shard their weights that way",
        "tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards",
    ),
    unsupported(
        "batches here are cut evenly over context-parallel ranks",
        "hybrid_context_parallel max_seqlen_per_dp_cp_rank hierarchical_context_parallel_sizes",
    ),
    free("Transformer Engine's own", "cp_comm_type", needs="gpu"),
    unsupported(
        "its two levels of groups were not tested with GatedDeltaNet",
        "cp_comm_type",
        values="a2a+p2p",
        fix="pass p2p, a2a or allgather, or drop the flag",
    ),
    unsupported("megatron sets it from the pipeline layout", "mtp_standalone"),
    unsupported(
        "megatron-core 0.19 takes it no longer",
        "model_parallel_size",
        fix="pass --tensor-model-parallel-size",
    ),
)

COMMUNICATION = (
    free("tests/distributed", "overlap_p2p_comm overlap_p2p_comm_warmup_flush"),
    free("tests/distributed/test_overlap.py", "overlap_grad_reduce overlap_param_gather"),
    free(
        "Megatron's own",
        """
        align_grad_reduce ddp_num_buckets ddp_bucket_size ddp_average_in_collective
        create_all_gather_group defer_embedding_wgrad_compute distributed_timeout_minutes
        distributed_timeout_seconds_after_init use_gloo_process_groups local_rank
        """,
    ),
    free(
        "Megatron's own; its FSDP does not read it",
        """
        align_param_gather ddp_pad_buckets_for_high_nccl_busbw
        ddp_reduce_scatter_with_fp32_accumulation
        ddp_param_name_patterns_for_fp32_local_accumulation
        """,
        needs="use_megatron_fsdp=False",
    ),
    unsupported(
        "megatron does not save it in the one format that converts and changes layout",
        "overlap_param_gather_with_optimizer_step",
    ),
    free("Megatron's own", "wgrad_deferral_limit", needs="defer_embedding_wgrad_compute"),
    free("gloo on a CPU, as every test of several ranks, NCCL on a GPU", "distributed_backend"),
    free("Megatron's own", "distributed_backend", values="nccl", needs="gpu"),
    free(
        "Megatron's own",
        """
        pipeline_model_parallel_comm_backend tp_comm_overlap nccl_ub use_sharp
        high_priority_stream_groups nccl_communicator_config_path use_ring_exchange_p2p
        flight_recorder_dump_path
        """,
        needs="gpu",
    ),
    free(
        "tests/distributed/test_hidden_exchange.py; HybridModel has no schedule for it",
        "overlap_moe_expert_parallel_comm",
        needs="decoder=gpt",
    ),
    free(
        "Megatron's own",
        """
        flight_recorder_trace_buffer_size flight_recorder_dump_on_timeout
        flight_recorder_include_stack_trace flight_recorder_include_only_active
        flight_recorder_extra_dump_on_exec
        """,
        needs="flight_recorder_dump_path",
    ),
    free("Megatron's own", "sharp_enabled_group", needs="use_sharp"),
    free("Megatron's own", "disable_symmetric_registration", needs="nccl_ub"),
    free(
        "Transformer Engine's own",
        """
        tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_bootstrap_backend
        tp_comm_overlap_cfg
        """,
        needs="tp_comm_overlap",
    ),
    free(
        "Megatron's own",
        "delay_wgrad_compute high_priority_a2a_comm_stream",
        needs="overlap_moe_expert_parallel_comm gpu",
    ),
    free(
        "Megatron's own",
        "ep_overlap_early_attn_memory_release",
        needs="overlap_moe_expert_parallel_comm",
    ),
    free(
        "Transformer Engine's experts alone do it",
        "overlap_dispatch_backward_with_experts_wgrad",
        needs="gpu moe_experts=te",
    ),
    unsupported("process groups are needed before the model is built", "lazy_mpu_init"),
    unsupported(
        "its ranks do not talk to each other, and nothing is trained", "fake_process_group"
    ),
)

SHARDED_STATE = (
    free("tests/distributed/test_resume.py", "use_distributed_optimizer"),
    free(
        "Megatron's own",
        "num_distributed_optimizer_instances",
        needs="use_distributed_optimizer package:einops",
    ),
    free(
        "Megatron's own, which then cannot write the state of float32 parameters",
        "use_layer_wise_param_layout",
        needs="optimizer=muon|optimizer=dist_muon save=None load=None",
    ),
    free("tests/distributed/test_fsdp.py", "use_megatron_fsdp", needs="package:einops"),
    free(
        "tests/distributed/test_fsdp.py",
        "data_parallel_sharding_strategy",
        needs="use_megatron_fsdp",
    ),
    unsupported(
        "megatron refuses it beside expert parallelism, tied embeddings and the distributed "
        "optimizer, without which a bf16 run cannot save its float32 parameters",
        "use_torch_fsdp2 torch_fsdp2_reshard_after_forward",
        fix="pass --use-megatron-fsdp",
    ),
    unsupported(
        "main parameters and gradients of FSDP are float32, as they are without it",
        """
        megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype
        megatron_fsdp_grad_comm_dtype
        """,
    ),
    unsupported("FSDP saves in the format of every other run", "strict_fsdp_dtensor_load"),
    unsupported(
        OF_FSDP,
        """
        fsdp_manual_registration outer_dp_sharding_strategy
        gradient_reduce_div_fusion fsdp_double_buffer suggested_communication_unit_size
        keep_fp8_transpose_cache enable_full_sharding_in_hsdp
        megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_max_pool_double_buffer fsdp_db_use_persist_buf_on_alloc_fail
        """,
    ),
)
