"""Flags of other programs and other models: megatron's parser is one for all of them."""

from __future__ import annotations

from qwen35_mcore.training.flags.rows import no_effect, unsupported

OTHER_PROGRAMS = (
    unsupported("the script pretrains", "perform_rl_step"),
    no_effect(
        "it is of reinforcement learning, and the script pretrains",
        """
        rl_prompts_per_eval grpo_prompts_per_step grpo_group_size rl_generation_lag
        rl_submission_granularity rl_consumption_granularity grpo_iterations grpo_clamp_eps_lower
        grpo_clamp_eps_upper grpo_kl_beta grpo_entropy_term_weight
        grpo_filter_groups_with_same_reward langrl_env_config rl_default_temperature
        rl_default_top_p rl_default_top_k rl_offload_optimizer_during_inference
        rl_kv_cache_management_mode rl_persist_cuda_graphs rl_partial_rollouts
        rl_inference_logprobs_is_correction rl_importance_sampling_truncation_coef
        rl_use_sequence_packing rl_sequence_packing_max_sequences_per_bin rl_sequence_packing_algo
        rl_training_cuda_graphs rl_inference_tensor_model_parallel_size
        rl_inference_pipeline_model_parallel_size rl_inference_expert_model_parallel_size
        rl_inference_expert_tensor_model_parallel_size rl_inference_model_unified_memory_level
        rl_offload_inference_model_weights_when_idle refit_method rl_verify_model_weights_swap
        rl_skip_bos_token rl_profile rl_profile_dir rl_inference_parsers
        """,
    ),
    no_effect(
        "it is of inference, and the script trains",
        """
        inference_rng_tracker inference_cuda_graph_scope flash_decode symmetric_ar_type
        nccl_all_reduce_for_prefill inference_fuse_tp_communication
        inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
        mlp_chunks_for_prefill inference_batch_times_seqlen_threshold max_tokens_to_oom
        output_bert_embeddings bert_embedder_type use_legacy_static_engine inference_max_requests
        inference_max_seq_length inference_dynamic_batching
        inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_paused_buffer_size_gb
        inference_dynamic_batching_mamba_memory_ratio inference_dynamic_batching_block_size
        inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens
        inference_dynamic_batching_num_cuda_graphs
        inference_dynamic_batching_track_paused_request_events
        inference_dynamic_batching_track_generated_token_events decode_only_cuda_graphs
        inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens
        inference_dynamic_batching_unified_memory_level enable_chunked_prefill
        num_speculative_tokens inference_dynamic_batching_enable_prefix_caching
        inference_dynamic_batching_prefix_caching_eviction_policy
        inference_dynamic_batching_prefix_caching_coordinator_policy
        inference_dynamic_batching_prefix_caching_routing_alpha
        inference_dynamic_batching_prefix_caching_mamba_gb
        inference_dynamic_batching_cuda_graph_mixed_prefill_count
        inference_dynamic_batching_cuda_graph_sizing_distribution
        inference_dynamic_batching_sampling_backend offset_sampling_seed_by_dp_rank
        inference_dynamic_batching_async_sched_mode inference_dynamic_batching_logprobs_mode
        inference_logging_step_interval inference_text_gen_server_logging inference_wandb_logging
        inference_coordinator_port mamba_inference_conv_states_dtype
        mamba_inference_ssm_states_dtype inference_use_synchronous_zmq_collectives
        inference_disable_ep_consensus inference_shards
        """,
    ),
    unsupported(
        "the loss that reads saved logits is not in this script",
        """
        logits_save_top_k logits_save_top_p logits_save_top_p_min_k logits_save_dir
        logits_save_dtype logits_load_dir logits_load_decode_threads logits_load_prefetch_factor
        logits_load_msc_prefetch_depth logits_load_kd_loss_alpha logits_load_ignore_errors
        """,
    ),
)

OTHER_MODELS = (
    no_effect(
        "it is of multi-latent and sparse attention, which Qwen3.5 has not",
        """
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim cache_mla_latents
        mla_down_proj_fusion dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
        dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff
        dsa_indexer_use_sparse_loss dsa_kernel_backend dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
        dsa_indexer_k_norm_fp32
        """,
    ),
    no_effect(
        "it is of Mamba layers, which Qwen3.5 has not",
        """
        mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path
        mamba_training_ssm_states_dtype
        """,
    ),
    no_effect(
        "it is of biencoders",
        """
        ict_head_size biencoder_projection_dim biencoder_shared_query_context_model ict_load
        bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path
        retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path
        indexer_batch_size indexer_log_interval
        """,
    ),
    no_effect(
        "it is of megatron's vision models",
        """
        num_classes img_h img_w num_channels patch_dim classes_fraction data_per_class_fraction
        data_sharding head_lr_mult vision_pretraining vision_pretraining_type vision_backbone_type
        swin_backbone_type mask_type mask_factor iter_per_epoch dino_local_img_size
        dino_local_crops_number dino_head_hidden_size dino_bottleneck_size dino_freeze_last_layer
        dino_norm_last_layer dino_warmup_teacher_temp dino_teacher_temp
        dino_warmup_teacher_temp_epochs
        """,
    ),
)
