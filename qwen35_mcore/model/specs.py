"""Layer specs for megatron's TransformerBlock, HybridStack and MultiTokenPredictionBlock."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.mcore.imports import (
    AttnMaskType,
    GatedDeltaNetSubmodules,
    IdentityOp,
    LayerType,
    ModuleSpec,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
    get_moe_module_spec_for_backend,
    get_num_layers_to_build,
    get_transformer_layer_offset,
)
from qwen35_mcore.model.layers.gated_delta_net import GatedDeltaNet
from qwen35_mcore.model.layers.moe import Qwen35MoELayer
from qwen35_mcore.model.layers.mtp import MTPLayer
from qwen35_mcore.model.layers.router import Router
from qwen35_mcore.model.layers.shared_expert import SharedExpert


def gated_delta_net_spec(spec_provider: Any) -> ModuleSpec:
    """The linear attention of three layers in four, input norm fused into its projection."""
    return ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=spec_provider.column_parallel_layer_norm_linear(),
            out_norm=IdentityOp,  # ours is gated_norm, see layers/gated_delta_net.py
            out_proj=spec_provider.row_parallel_linear(),
        ),
    )


def gated_attention_spec(spec_provider: Any) -> ModuleSpec:
    """Full attention with output gate and query/key norms, input norm fused into its projection."""
    qk_norm = spec_provider.layer_norm(rms_norm=True, for_qk=True)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=spec_provider.column_parallel_layer_norm_linear(),
            core_attention=spec_provider.core_attention(),
            linear_proj=spec_provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def moe_spec(config: TransformerConfig, spec_provider: Any) -> Any:
    """megatron's MoE; layer, router and shared expert are subclasses of ours."""
    spec = get_moe_module_spec_for_backend(
        spec_provider, config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    native = spec.keywords["submodules"]
    shared = functools.partial(SharedExpert, **native.shared_experts.keywords)
    submodules = dataclasses.replace(native, router=Router, shared_experts=shared)
    return functools.partial(Qwen35MoELayer, submodules=submodules)


def mixer_modules(kind: LayerKind, spec_provider: Any) -> dict[str, Any]:
    """The token mixer of a layer, by the names of megatron's TransformerLayerSubmodules."""
    mixer = gated_delta_net_spec if kind is LayerKind.GDN else gated_attention_spec
    return {"self_attention": mixer(spec_provider), "self_attn_bda": get_bias_dropout_add}


def feed_forward_modules(config: TransformerConfig, spec_provider: Any) -> dict[str, Any]:
    """The model's MLP or MoE, by the names of megatron's TransformerLayerSubmodules."""
    is_moe = config.num_moe_experts is not None
    if is_moe:
        mlp = moe_spec(config, spec_provider)
    else:
        mlp = get_mlp_module_spec_for_backend(spec_provider, num_experts=None)
    return {
        # the router and the shared expert read the normed input too, so nothing is fused there
        "pre_mlp_layernorm": spec_provider.layer_norm(rms_norm=True) if is_moe else IdentityOp,
        "mlp": mlp,
        "mlp_bda": get_bias_dropout_add,
    }


def layer_spec(kind: LayerKind, config: TransformerConfig, spec_provider: Any) -> ModuleSpec:
    """One decoder layer: a token mixer of the given kind and the model's MLP or MoE."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            **mixer_modules(kind, spec_provider), **feed_forward_modules(config, spec_provider)
        ),
    )


def decoder_block_spec(
    model_config: Qwen35Config,
    config: TransformerConfig,
    spec_provider: Any,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The decoder layers of one pipeline stage (and virtual stage), and the final norm."""
    specs = {
        kind: layer_spec(kind, config, spec_provider) for kind in set(model_config.layer_types)
    }
    return TransformerBlockSubmodules(
        layer_specs=[
            specs[model_config.layer_types[layer]]
            for layer in _local_layer_ids(config, vp_stage, pp_rank)
        ],
        layer_norm=spec_provider.layer_norm(rms_norm=True),
    )


def mtp_block_spec(
    config: TransformerConfig,
    spec_provider: Any,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> Any:
    """The multi-token-prediction block, a full-attention layer; None on stages without one."""
    if not config.mtp_num_layers:
        return None
    block = get_gpt_mtp_block_spec_for_backend(
        config,
        layer_spec(LayerKind.ATTENTION, config, spec_provider),
        spec_provider,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    if block is not None:
        for layer in block.layer_specs:
            layer.module = MTPLayer
    return block


def layers_of_stages(config: TransformerConfig) -> list[int]:
    """Decoder layers of every virtual pipeline stage, in the order of the forward pass."""
    vpp = config.virtual_pipeline_model_parallel_size
    return [
        len(_local_layer_ids(config, vp_stage if vpp else None, pp_rank))
        for vp_stage in range(vpp or 1)
        for pp_rank in range(config.pipeline_model_parallel_size)
    ]


def _local_layer_ids(
    config: TransformerConfig, vp_stage: int | None, pp_rank: int | None
) -> list[int]:
    """Global numbers (from 0) of the decoder layers that this pipeline stage builds."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(first, first + count))
