"""Value checks of `Qwen35Config`, each with its own message. Run by the constructor."""

from __future__ import annotations

from math import inf

from qwen35_mcore.config.fields import ModelFields
from qwen35_mcore.config.hf_keys import MODEL_TYPES
from qwen35_mcore.config.rope import RopeParameters
from qwen35_mcore.errors import ConfigError

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
_MOE_SIZES = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


def check_config(model_config: ModelFields) -> None:
    """Refuse the first impossible value.

    Raises:
        ConfigError: with the value, what is allowed and, where there is one, the way out.
    """
    _check_kinds(model_config)
    _check_numbers(model_config)
    _check_feed_forward(model_config)
    _check_attention(model_config)
    _check_gdn(model_config)
    _check_depth(model_config)


def _check_kinds(model_config: ModelFields) -> None:
    if model_config.model_type not in MODEL_TYPES:
        raise ConfigError(
            "model_type is not a Qwen3.5 or Qwen3-Next text model",
            got=model_config.model_type,
            allowed=", ".join(MODEL_TYPES),
        )
    if not isinstance(model_config.rope_parameters, RopeParameters):
        raise ConfigError(
            "rope_parameters must be a RopeParameters", got=model_config.rope_parameters
        )
    for name in ("tie_word_embeddings", "attention_bias"):
        if not isinstance(getattr(model_config, name), bool):
            raise ConfigError(f"{name} must be true or false", got=getattr(model_config, name))
    if model_config.attention_bias:
        raise ConfigError("attention_bias must be false: no published model has biases", got="true")
    if model_config.hidden_act != "silu":
        raise ConfigError("hidden_act must be silu", got=model_config.hidden_act, allowed="silu")
    if model_config.carried_outer and not model_config.is_vision_language:
        raise ConfigError(
            "carried_outer belongs to vision-language configs only",
            got=", ".join(model_config.carried_outer),
            fix="use to_text_only() to drop the wrapper",
        )


def _check_numbers(model_config: ModelFields) -> None:
    for name in _POSITIVE:
        _integer(model_config, name, minimum=1)
    for name in (*_MOE_SIZES, "intermediate_size", "mtp_num_hidden_layers"):
        _integer(model_config, name, minimum=0)
    if not 0 < _number(model_config, "rms_norm_eps") < inf:
        raise ConfigError("rms_norm_eps must be positive", got=model_config.rms_norm_eps)
    if not 0 < _number(model_config, "initializer_range") < inf:
        raise ConfigError("initializer_range must be positive", got=model_config.initializer_range)
    if not 0 <= _number(model_config, "attention_dropout") < 1:
        raise ConfigError("attention_dropout must be in [0, 1)", got=model_config.attention_dropout)
    if not 0 <= _number(model_config, "router_aux_loss_coef") < inf:
        raise ConfigError(
            "router_aux_loss_coef must not be negative", got=model_config.router_aux_loss_coef
        )


def _check_feed_forward(model_config: ModelFields) -> None:
    moe_kind = MODEL_TYPES[model_config.model_type].moe
    dense: tuple[str, ...] = ("intermediate_size",)
    needed, unused = (_MOE_SIZES, dense) if moe_kind else (dense, _MOE_SIZES)
    for name in needed:
        if not getattr(model_config, name):
            raise ConfigError(
                f"model_type {model_config.model_type} needs a positive {name}", got=0
            )
    for name in unused:
        if getattr(model_config, name):
            raise ConfigError(
                f"model_type {model_config.model_type} has no {name}",
                got=getattr(model_config, name),
                fix=f"set it to 0, or use a {'dense' if moe_kind else 'mixture-of-experts'} type",
            )
    if model_config.num_experts_per_tok > model_config.num_experts:
        raise ConfigError(
            "num_experts_per_tok is larger than num_experts",
            got=model_config.num_experts_per_tok,
            allowed=f"1 to {model_config.num_experts}",
        )


def _check_attention(model_config: ModelFields) -> None:
    if model_config.num_attention_heads % model_config.num_key_value_heads:
        raise ConfigError(
            "num_attention_heads must be a multiple of num_key_value_heads",
            got=f"{model_config.num_attention_heads} and {model_config.num_key_value_heads}",
        )
    rotary_dim = model_config.rotary_dim
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            "head_dim * partial_rotary_factor must be a positive even number of channels",
            got=f"{model_config.head_dim} * {model_config.rope_parameters.partial_rotary_factor}",
        )
    section = model_config.rope_parameters.mrope_section
    if section is not None and sum(section) != rotary_dim // 2:
        raise ConfigError(
            "mrope_section must add up to half the rotated channels",
            got=f"{list(section)}, sum {sum(section)}",
            allowed=f"a sum of {rotary_dim // 2}",
        )


def _check_gdn(model_config: ModelFields) -> None:
    if model_config.linear_num_value_heads % model_config.linear_num_key_heads:
        raise ConfigError(
            "linear_num_value_heads must be a multiple of linear_num_key_heads",
            got=f"{model_config.linear_num_value_heads} and {model_config.linear_num_key_heads}",
        )


def _check_depth(model_config: ModelFields) -> None:
    if len(model_config.layer_types) != model_config.num_hidden_layers:
        raise ConfigError(
            "layer_types must have one entry per decoder layer",
            got=f"{len(model_config.layer_types)} entries for num_hidden_layers "
            f"{model_config.num_hidden_layers}",
            fix="when you change the depth, pass layer_types too (empty for the default pattern)",
        )
    if model_config.mtp_num_hidden_layers > 1:
        raise ConfigError(
            "more than one MTP layer is not supported: published sizes have one",
            got=model_config.mtp_num_hidden_layers,
            allowed="0 or 1",
        )


def _integer(model_config: ModelFields, name: str, *, minimum: int) -> None:
    value = getattr(model_config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        kind = "positive integer" if minimum else "non-negative integer"
        raise ConfigError(f"{name} must be a {kind}", got=value)


def _number(model_config: ModelFields, name: str) -> float:
    value = getattr(model_config, name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a number", got=value)
    return value
