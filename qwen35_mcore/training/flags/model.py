"""Flags of what is computed: the network, its experts, its initial weights."""

from __future__ import annotations

from qwen35_mcore.training.flags.rows import decided, free, no_effect, unsupported

OVERRIDE = "drop the flag; to change the model pass --override KEY=VALUE"
MOE = "num_experts"
FLEX = "moe_token_dispatcher_type=flex|moe_enable_deepep"

NETWORK = (
    decided(
        "the Hugging Face config says it",
        """
        num_layers hidden_size num_attention_heads num_query_groups group_query_attention
        kv_channels ffn_hidden_size normalization layernorm_epsilon layernorm_zero_centered_gamma
        add_bias_linear add_qkv_bias swiglu hidden_dropout attention_dropout qk_layernorm
        attention_output_gate init_method_std rotary_interleaved rotary_base rotary_percent
        position_embedding_type max_position_embeddings mtp_num_layers
        experimental_attention_variant linear_attention_freq linear_conv_kernel_dim
        linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
        untie_embeddings_and_output_weights padded_vocab_size encoder_num_layers
        """,
        fix=OVERRIDE,
    ),
    decided(
        "Qwen3.5 has no such thing, and transformers would compute another function",
        """
        glu_linear_offset activation_func_clamp_value openai_gelu squared_relu quick_geglu
        softmax_type qk_l2_norm window_size window_attn_skip_freq no_rope_freq
        multi_latent_attention rope_type use_rope_scaling rope_scaling_factor
        rotary_seq_len_interpolation_factor mrope_section relative_attention_num_buckets
        relative_attention_max_distance use_mup mup_width_mult mup_base_hidden_size
        mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power
        mtp_use_repeated_layer mtp_hybrid_override_pattern is_hybrid_model hybrid_override_pattern
        heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
        """,
    ),
    decided(
        "YaRN comes from rope_parameters of the config.json",
        """
        yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
        yarn_correction_range_round_to_int rotary_scaling_factor mscale mscale_all_dim
        """,
        fix="drop the flag, and name a config.json with YaRN: --hf-config",
    ),
    free(
        "it says of the network what the model says",
        "use_rotary_position_embeddings deprecated_use_mcore_models pad_vocab_size",
    ),
    free(
        "Megatron's own, of training alone",
        "mtp_loss_scaling_factor mtp_detach_heads",
        needs="mtp_num_layers",
    ),
    no_effect(
        "megatron-core 0.19 reads it nowhere, or in other models alone",
        """
        apply_residual_connection_post_layernorm add_position_embedding bert_binary_head onnx_safe
        decoder_num_layers make_vocab_size_divisible_by use_fused_weighted_squared_relu
        """,
    ),
    no_effect(
        "it is read by the attention of megatron's local layers, which has no part in this model",
        "apply_query_key_layer_scaling attention_softmax_in_fp32",
    ),
    no_effect(
        "it is read where megatron chooses the layers, and this model brings its own",
        """
        spec use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
        fused_residual_rmsnorm use_kitchen_attention kitchen_attention_backend
        """,
    ),
)

EXPERTS = (
    decided(
        "the Hugging Face config says it",
        """
        num_experts moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size
        moe_shared_expert_gate moe_router_pre_softmax moe_router_score_function moe_router_dtype
        """,
        fix=OVERRIDE,
    ),
    decided(
        "Qwen3.5 has no such thing, and transformers would compute another function",
        """
        moe_layer_freq moe_latent_size moe_apply_probs_on_input moe_router_topk_scaling_factor
        moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias
        moe_router_bias_update_rate moe_router_quantile_balancing_ema moe_mlp_glu_interleave_size
        moe_shared_expert_glu_interleave_size
        """,
    ),
    decided(
        "it weighs or chooses experts in another way than transformers, also after training",
        "moe_router_load_balancing_type",
        values="sinkhorn quantile_balancing",
        fix="pass aux_loss, seq_aux_loss, global_aux_loss or none, or drop the flag",
    ),
    free(
        "tests/parity/test_flags_function.py: in training alone",
        "moe_router_load_balancing_type moe_z_loss_coeff",
        needs=MOE,
    ),
    free(
        "tests/parity/test_flags_function.py: in training alone",
        "moe_aux_loss_coeff",
        needs=f"{MOE} moe_router_load_balancing_type=aux_loss"
        "|moe_router_load_balancing_type=seq_aux_loss"
        "|moe_router_load_balancing_type=global_aux_loss",
    ),
    free(
        "Megatron's own router: noise and limits of training, in its evaluation as well; the "
        "exported model has neither",
        "moe_input_jitter_eps moe_expert_capacity_factor",
        needs=MOE,
    ),
    free(
        "Megatron's own router",
        "moe_pad_expert_input_to_capacity moe_token_drop_policy",
        needs="moe_expert_capacity_factor",
    ),
    free(
        "routing at random, to measure with, as tests/bench does",
        "moe_router_force_load_balancing",
        needs=f"{MOE} save=None",
    ),
    free(
        "Megatron's own: routing at random, to measure with",
        "moe_router_force_biased",
        needs=f"{MOE} save=None",
    ),
    free("Megatron's own", "moe_token_dispatcher_type", values="flex", needs="gpu"),
    free(
        "tests/distributed; tests/parity/test_flags_function.py",
        """
        moe_token_dispatcher_type moe_grouped_gemm moe_shared_expert_overlap
        """,
        needs=MOE,
    ),
    free("Megatron's own", "moe_per_layer_logging", needs=f"{MOE} tensorboard_dir|wandb_project"),
    free("tests/parity/test_gpu.py", "moe_permute_fusion moe_router_fusion", needs=f"{MOE} gpu"),
    free(
        "Megatron's own: it pads what an expert gets with rows that weigh nothing",
        "moe_router_padding_for_quantization moe_router_padding_for_fp8",
        needs=f"{MOE} fp8|fp4",
    ),
    free(
        "Megatron's own dispatchers",
        "moe_enable_deepep moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms",
        needs=f"{MOE} gpu {FLEX}",
    ),
    free(
        "Megatron's own dispatcher",
        "moe_deepep_num_sms",
        needs=f"{MOE} gpu {FLEX} moe_flex_dispatcher_backend=deepep",
    ),
    free(
        "Megatron's own dispatcher",
        """
        moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs
        moe_hybridep_num_sms moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_hybridep_num_sms_preprocessing
        """,
        needs=f"{FLEX} moe_flex_dispatcher_backend=hybridep",
    ),
    free(
        "tests/distributed/test_nccl_ep.py",
        "moe_expert_rank_capacity_factor",
        needs=f"{MOE} gpu",
    ),
    no_effect(
        "grouped_mm experts always take the whole receive buffer",
        "moe_ncclep_static_shape",
    ),
    unsupported(
        "it is of Transformer Engine's fused operations, which the experts here are not made of",
        "moe_ncclep_zero_copy",
    ),
    unsupported(
        "the experts' weights would be stored under other keys",
        """
        moe_single_grouped_weight moe_single_grouped_bias moe_use_upcycling
        moe_upcycling_granularity
        """,
    ),
    unsupported(
        "it is of Transformer Engine's fused operations, which the experts here are not made of",
        """
        moe_paged_stash moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu use_transformer_engine_op_fuser
        """,
    ),
    no_effect(
        "it is of inference and reinforcement learning",
        "moe_enable_routing_replay moe_pad_experts_for_cuda_graph_inference",
    ),
)

INITIAL_WEIGHTS = (
    free(
        "tests/parity/test_flags_function.py",
        "seed use_cpu_initialization embedding_init_method_std",
    ),
    free("Megatron's own", "data_parallel_random_init"),
    free("Megatron's own", "te_rng_tracker", needs="gpu"),
    free(
        "every weight is read from the checkpoint",
        "perform_initialization",
        needs="load|pretrained_checkpoint",
    ),
    unsupported(
        "megatron-core 0.19 hands it to its config under a name that the config does not have",
        "init_method_xavier_uniform",
        fix="drop the flag; --override initializer_range=STD changes the spread",
    ),
    unsupported("it is of Megatron-FSDP", "init_model_with_meta_device"),
)
