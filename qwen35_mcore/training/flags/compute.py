"""Flags of how it is computed: precision, kernels, recomputation, offloading, CUDA graphs."""

from __future__ import annotations

from qwen35_mcore.training.flags.rows import free, no_effect, unsupported

GRAPHS = (
    "cuda_graph_impl=local|cuda_graph_impl=transformer_engine|cuda_graph_impl=full_iteration"
    "|cuda_graph_impl=auto|enable_cuda_graph|external_cuda_graph"
)
SELECTIVE = "recompute_granularity=selective|recompute_activations|moe_layer_recompute"

PRECISION = (
    free("tests/distributed/test_resume.py, tests/parity/test_precision.py", "bf16"),
    unsupported("Qwen3.5 is trained in bf16 or float32", "fp16", fix="pass --bf16"),
    unsupported(
        "it is of --fp16, and Qwen3.5 is trained in bf16 or float32",
        """
        fp16_lm_cross_entropy loss_scale initial_loss_scale min_loss_scale loss_scale_window
        hysteresis
        """,
    ),
    free("Megatron's own", "accumulate_allreduce_grads_in_fp32"),
    free(
        "Megatron's own; the gradients of its FSDP are float32",
        "grad_reduce_in_bf16",
        needs="bf16 use_megatron_fsdp=False",
    ),
    free("Megatron's own", "disable_bf16_reduced_precision_matmul", needs="bf16 gpu"),
    unsupported("the layers take their input in the parameters' dtype", "fp32_residual_connection"),
    free(
        "tests/distributed/test_precision_aware.py",
        "use_precision_aware_optimizer",
        needs="optimizer=adam use_megatron_fsdp=False use_distributed_optimizer bf16 "
        "package:transformer_engine|cpu",
    ),
    free(
        "tests/distributed/test_precision_aware.py",
        "main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype",
        needs="use_precision_aware_optimizer",
    ),
    free(
        "tests/distributed/test_precision_aware.py",
        "main_grads_dtype",
        values="bf16",
        needs="accumulate_allreduce_grads_in_fp32=False",
    ),
    unsupported(
        "nobody has compared an update on the CPU with the optimizer on the GPU",
        """
        optimizer_cpu_offload
        optimizer_offload_fraction use_torch_optimizer_for_cpu_offload
        overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params
        """,
        fix="drop the flag; --use-distributed-optimizer or --use-megatron-fsdp spreads the state "
        "over more ranks",
    ),
    free("tests/parity/test_gpu.py", "fp8"),
    free(
        "Transformer Engine's own",
        """
        fp8_recipe fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_output_proj
        fp8_quantizer_factory
        """,
        needs="fp8",
    ),
    free(
        "Transformer Engine's own",
        "fp8_param_gather",
        needs="fp8 use_precision_aware_optimizer=False",
    ),
    free("Transformer Engine's own", "fp4"),
    free("Transformer Engine's own", "fp4_recipe fp4_quantizer_factory", needs="fp4"),
    free(
        "Transformer Engine's own",
        "fp4_param_gather",
        needs="fp4 use_precision_aware_optimizer=False",
    ),
    free(
        "Megatron's own",
        "reuse_grad_buf_for_mxfp8_param_ag stream_ckpt_dequant",
        needs="fp8|fp4",
    ),
    free(
        "Megatron's own; HybridStack counts a token mixer and its feed-forward as two layers",
        "first_last_layers_bf16",
        needs="decoder=gpt fp8|fp4",
    ),
    free(
        "Megatron's own",
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16",
        needs="first_last_layers_bf16",
    ),
    free(
        "Transformer Engine's own; it names modules, which HybridModel names otherwise",
        "te_precision_config_file",
        needs="decoder=gpt gpu",
    ),
    no_effect("Transformer Engine scales anew in every step", "fp8_interval"),
    unsupported(
        "it is of NVIDIA's kitchen package, whose layers this model does not use",
        "kitchen_config_file kitchen_recipe_number",
    ),
)

KERNELS = (
    free("tests/unit, tests/parity/test_gpu.py", "transformer_impl"),
    unsupported(
        "its layers infer and do not train",
        "transformer_impl",
        values="inference_optimized",
        fix="pass transformer_engine or local, or drop the flag",
    ),
    free("tests/parity/test_gpu_runs.py", "attention_backend", needs="gpu"),
    free("Transformer Engine's own", "flash_attention_version", needs="gpu"),
    unsupported(
        "megatron takes it with other layers than this model's",
        "attention_backend",
        values="local",
        fix="pass --transformer-impl local",
    ),
    no_effect(
        "megatron-core 0.19 reads it nowhere",
        "use_flash_attn",
        fix="drop the flag; on a GPU --attention-backend flash does what it says",
    ),
    free("tests/parity/test_gpu.py", "cross_entropy_loss_fusion cross_entropy_fusion_impl"),
    free(
        "it leaves out a fused kernel, or one that no layer here has",
        """
        apply_rope_fusion bias_swiglu_fusion bias_gelu_fusion bias_dropout_fusion
        masked_softmax_fusion gradient_accumulation_fusion no_persist_layer_norm disable_jit_fuser
        """,
    ),
    free("tests/parity/test_flags_function.py", "clone_scatter_output_in_embedding"),
    free(
        "Megatron's own; each chunk of an MoE layer would count its experts' load by itself",
        "mlp_chunks_for_training",
        needs="num_experts=None",
    ),
    free(
        "Megatron's own; FLA's kernels are not among what it makes deterministic",
        "deterministic_mode",
        needs="cpu|gdn_kernel=torch",
    ),
    unsupported("it replaces kernels that GatedDeltaNet does not use", "batch_invariant_mode"),
    unsupported("the layers here have SwiGLU built in", "use_te_activation_func"),
    unsupported(
        "the norms of query and key come after the weights that it scales, and undo it",
        "qk_clip qk_clip_alpha qk_clip_threshold",
    ),
)

RECOMPUTATION = (
    free("tests/distributed/cases.py", "recompute_granularity recompute_activations"),
    free(
        "tests/distributed/cases.py",
        "recompute_method recompute_num_layers",
        needs="recompute_granularity=full",
    ),
    free("Megatron's own", "distribute_saved_activations", needs="recompute_granularity=full"),
    free("tests/distributed/cases.py", "recompute_modules", needs=SELECTIVE),
    free("it is --recompute-modules moe", "moe_layer_recompute", needs="num_experts"),
    free(
        "tests/distributed/cases.py",
        "recompute_modules",
        values="moe moe_act shared_experts",
        needs="num_experts",
    ),
    free("Megatron's own", "recompute_modules", values="mlp", needs="num_experts=None"),
    free("Megatron's own", "recompute_modules", values="layernorm", needs="gpu"),
    unsupported(
        "mla_up_proj is of multi-latent attention, which Qwen3.5 has not",
        "recompute_modules",
        values="mla_up_proj",
        fix="name other modules",
    ),
    unsupported(
        "megatron ends the run when it meets it",
        "checkpoint_activations",
        fix="pass --recompute-activations",
    ),
)

OFFLOADING = (
    unsupported(
        "whole layers come back with copies of their experts' weights, which have no gradient to "
        "add to",
        "cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers",
        fix="pass --fine-grained-activation-offloading with --offload-modules",
    ),
    free("Megatron's own", "fine_grained_activation_offloading", needs="gpu"),
    free(
        "Megatron's own",
        """
        offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph
        delta_offload_bytes_across_pp_ranks activation_offload_fraction
        fine_grained_offloading_max_inflight_offloads
        """,
        needs="fine_grained_activation_offloading",
    ),
    free(
        "Transformer Engine's experts alone offload these",
        "offload_modules",
        values="expert_fc1 moe_act",
        needs="moe_experts=te",
    ),
)

CUDA_GRAPHS = (
    free("tests/parity/test_gpu_runs.py", "cuda_graph_impl enable_cuda_graph external_cuda_graph"),
    free(
        "tests/parity/test_gpu_runs.py",
        "cuda_graph_modules cuda_graph_warmup_steps",
        needs=GRAPHS,
    ),
    free("it is --cuda-graph-modules", "cuda_graph_scope_deprecated", needs=GRAPHS),
    free("Megatron's own", "optimizer_cuda_graph", needs="gpu use_precision_aware_optimizer=False"),
)
