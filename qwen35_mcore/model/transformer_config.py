"""Qwen35Config to megatron's TransformerConfig, and to megatron's command-line defaults.

:func:`architecture_fields` is the only place where a Hugging Face name meets a Megatron name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from qwen35_mcore.config.layer_pattern import linear_attention_freq
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.rope import YarnScaling
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.imports import GDN_VARIANT, TransformerConfig
from qwen35_mcore.parallel.layout import GDN_CONTEXT_PARALLEL

_GDN_HEADS = ("linear_num_key_heads", "linear_num_value_heads")


@dataclass
class Qwen35TransformerConfig(TransformerConfig):
    """TransformerConfig with what Qwen3.5 needs on top.

    Raises:
        ConfigError: for a combination that megatron accepts and computes wrongly.
    """

    gdn_kernel: str = "auto"
    """Kernels of the GatedDeltaNet: auto, fla or torch. auto says what it chose and why, and never
    falls back to torch on a GPU."""

    gdn_context_parallel: str = "all_to_all"
    """How context-parallel ranks share a GatedDeltaNet: all_to_all (each takes some heads of the
    whole sequence) or state_passing (each keeps its tokens, and states travel; not bounded by the
    number of heads, and not for packed sequences)."""

    gdn_gates_apart: bool | None = None
    """A projection of their own, never in FP8, for the decay and write-strength logits of the
    GatedDeltaNet. None: in FP8 runs. The checkpoint is the same either way."""

    moe_experts: str = "auto"
    """Routed experts with Transformer Engine: grouped_mm (one kernel for all experts,
    bfloat16 also in an FP8 run), te (TEGroupedMLP, in FP8 where the run is), or auto."""

    pipeline_tensors: int = 1
    """Tensors of the hidden states' size that a pipeline stage hands to the next; the model with a
    vision tower sets it."""

    batch_p2p_sync: bool = False
    """Whether the host waits for the device after each exchange between pipeline stages: what
    megatron does for releases of torch that freed a batch's tensors too early."""

    hetereogenous_dist_checkpoint: bool = True
    """Layers differ, so each has its own checkpoint keys (megatron's spelling)."""

    def __post_init__(self) -> None:
        self._check_base()
        if self.gdn_gates_apart is None:
            self.gdn_gates_apart = bool(self.fp8)
        if self.virtual_pipeline_model_parallel_size is None or self.batch_p2p_comm is False:
            return
        if self.pipeline_model_parallel_size == 2:
            raise ConfigError(
                "interleaved pipeline over two ranks with batched p2p is silently wrong: the "
                "previous and the next rank are the same peer",
                got="pipeline_model_parallel_size=2, batch_p2p_comm=True",
                allowed="batch_p2p_comm=False with overlap_p2p_comm=True",
                fix="pass overlap_p2p_comm=True, batch_p2p_comm=False, or drop the interleaving",
            )

    def _check_base(self) -> None:
        """Megatron's checks. It knows the all-to-all alone, and wants heads for TP times CP ranks;
        where states are passed TP ranks alone share them, so it is shown CP times as many."""
        if self.gdn_context_parallel not in GDN_CONTEXT_PARALLEL:
            raise ConfigError(
                "no such way to share a GatedDeltaNet between context-parallel ranks",
                got=self.gdn_context_parallel,
                allowed=" or ".join(GDN_CONTEXT_PARALLEL),
            )
        heads = {name: vars(self)[name] for name in _GDN_HEADS}
        if self.gdn_context_parallel == "state_passing":
            for name, count in heads.items():
                setattr(self, name, None if count is None else count * self.context_parallel_size)
        super().__post_init__()
        for name, count in heads.items():
            setattr(self, name, count)


def architecture_fields(model_config: Qwen35Config) -> dict[str, Any]:
    """TransformerConfig fields that the model alone decides, by their megatron names.

    Raises:
        ConfigError: for routing to a single expert: its renormalised weight is always 1, so the
            router would never learn (megatron refuses it as well).
    """
    if model_config.num_experts_per_tok == 1:
        raise ConfigError(
            "routing to one expert gives the router no gradient",
            got="num_experts_per_tok=1",
            allowed="2 or more",
        )
    fields: dict[str, Any] = {
        "num_layers": model_config.num_hidden_layers,
        "hidden_size": model_config.hidden_size,
        "num_attention_heads": model_config.num_attention_heads,
        "num_query_groups": model_config.num_key_value_heads,
        "kv_channels": model_config.head_dim,
        "ffn_hidden_size": model_config.intermediate_size or model_config.moe_intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model_config.rms_norm_eps,
        "layernorm_zero_centered_gamma": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": model_config.attention_dropout,
        "qk_layernorm": True,
        "attention_output_gate": True,
        "init_method_std": model_config.initializer_range,
        "rotary_interleaved": False,
        "experimental_attention_variant": GDN_VARIANT,
        "linear_attention_freq": linear_attention_freq(model_config.layer_types),
        "linear_conv_kernel_dim": model_config.linear_conv_kernel_dim,
        "linear_key_head_dim": model_config.linear_key_head_dim,
        "linear_value_head_dim": model_config.linear_value_head_dim,
        "linear_num_key_heads": model_config.linear_num_key_heads,
        "linear_num_value_heads": model_config.linear_num_value_heads,
        "mtp_num_layers": model_config.mtp_num_hidden_layers or None,
    }
    if model_config.is_moe:
        fields |= {
            "num_moe_experts": model_config.num_experts,
            "moe_router_topk": model_config.num_experts_per_tok,
            "moe_ffn_hidden_size": model_config.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": model_config.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
            # softmax over the chosen logits is softmax over all of them, renormalised
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "softmax",
            "moe_router_dtype": "fp32",
        }
    return fields


_RENAMED_ARGUMENTS = {"num_moe_experts": "num_experts"}
_NOT_ARGUMENTS = ("activation_func", "gated_linear_unit")


def architecture_arguments(model_config: Qwen35Config) -> dict[str, Any]:
    """The same, and what lies outside TransformerConfig, as megatron.training's argument names.

    YaRN stays out: megatron's argument check refuses MTP together with ``yarn``, although the model
    handles both, so `make_model_provider` adds it (:func:`apply_yarn`).
    """
    arguments = {
        _RENAMED_ARGUMENTS.get(name, name): value
        for name, value in architecture_fields(model_config).items()
        if name not in _NOT_ARGUMENTS
    }
    return arguments | {
        "swiglu": True,
        "group_query_attention": True,
        "max_position_embeddings": model_config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": model_config.rope_theta,
        "rotary_percent": model_config.rope_parameters.partial_rotary_factor,
        "untie_embeddings_and_output_weights": not model_config.tie_word_embeddings,
        # unmasked padding columns would change the loss, so the vocabulary is never padded
        "padded_vocab_size": model_config.vocab_size,
    }


def transformer_config(model_config: Qwen35Config, **run: Any) -> Qwen35TransformerConfig:
    """A TransformerConfig built by hand: the architecture, and what the caller says of the run.

    Args:
        run: any TransformerConfig field that the architecture leaves open (parallel sizes, dtypes,
            recompute, kernels...).

    Raises:
        ConfigError: when ``run`` contradicts the architecture.
    """
    fields = architecture_fields(model_config)
    for name in fields.keys() & run.keys():
        if fields[name] != run[name]:
            raise ConfigError(
                f"{name} is decided by the model config",
                got=run[name],
                allowed=repr(fields[name]),
                fix="change the Qwen35Config (dataclasses.replace) instead",
            )
    built = Qwen35TransformerConfig(**fields | run)
    apply_yarn(built, model_config.yarn)
    return built


def apply_yarn(config: TransformerConfig, yarn: YarnScaling | None) -> None:
    """Set the attributes from which megatron's YaRN embedding and attention read their numbers.

    Megatron knows the attention factor only as ``mscale``: with ``mscale_all_dim`` 0 it computes
    ``0.1 * mscale * ln(factor) + 1``, which is solved here for the factor that is wanted. The fused
    RoPE kernels know no attention factor (for packed sequences they ignore it), so
    they are switched off.
    """
    if yarn is None:
        return
    config.apply_rope_fusion = False
    log_factor = 0.1 * math.log(yarn.factor)
    wanted = yarn.resolved_attention_factor
    for name, value in {
        "yarn_rotary_scaling_factor": yarn.factor,
        "yarn_original_max_position_embeddings": yarn.original_max_position_embeddings,
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
        "yarn_mscale": (wanted - 1.0) / log_factor if log_factor else 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": yarn.truncate,
    }.items():
        setattr(config, name, value)
