"""The kinds of config.json, and every key of theirs by what is done with it. Data for `hf_json`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Family(NamedTuple):
    """How a family writes down the one model: keys of config.json, and tensors of a checkpoint."""

    always_written: dict[str, Any]
    """Architecture that has one value and is in every published file: `to_hf` writes it always."""
    mtp_key: str
    """The key of `mtp_num_hidden_layers`."""
    mtp_default: int
    """MTP layers of a file without that key."""
    gdn_projections: Literal["by_part", "by_key_head"]
    """The rows of a GDN layer's input projections: all of q, then all of k, of v...; or, for each
    key head in turn, its q, k, v and z in one tensor and its b and a in another."""
    experts: Literal["packed", "per_expert"]
    """Whether published files hold the experts of a layer as one tensor, or one by one."""


# its config.json has no MTP layer where transformers, which drops the weights, wrote it
QWEN3_5 = Family(
    always_written={
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_use_dedicated_embeddings": False,
    },
    mtp_key="mtp_num_hidden_layers",
    mtp_default=0,
    gdn_projections="by_part",
    experts="packed",
)
# the published config.json does not mention the MTP layer that is there; the key is vLLM's, which
# takes one layer for none that is mentioned
QWEN3_NEXT = Family(
    always_written={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    mtp_key="num_nextn_predict_layers",
    mtp_default=1,
    gdn_projections="by_key_head",
    experts="per_expert",
)


class ModelType(NamedTuple):
    """What a ``model_type`` says about the file."""

    text_model_type: str
    architecture: str
    moe: bool
    nested: bool
    """Vision-language: the text model's keys are under ``text_config``."""
    family: Family


MODEL_TYPES = {
    "qwen3_5": ModelType("qwen3_5_text", "Qwen3_5ForConditionalGeneration", False, True, QWEN3_5),
    "qwen3_5_text": ModelType("qwen3_5_text", "Qwen3_5ForCausalLM", False, False, QWEN3_5),
    "qwen3_5_moe": ModelType(
        "qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration", True, True, QWEN3_5
    ),
    "qwen3_5_moe_text": ModelType(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", True, False, QWEN3_5
    ),
    "qwen3_next": ModelType("qwen3_next", "Qwen3NextForCausalLM", True, False, QWEN3_NEXT),
}
MTP_KEYS = {kind.family.mtp_key for kind in MODEL_TYPES.values()}

# Sizes differ in these, so transformers' class defaults are right for one size and wrong for the
# others: a file without them is refused.
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "linear_num_value_heads",
)
REQUIRED_DENSE = ("intermediate_size",)
REQUIRED_MOE = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
# Equal in every size and in transformers' defaults, which are ours too.
OPTIONAL = (
    "head_dim",
    "hidden_act",
    "attention_bias",
    "attention_dropout",
    "initializer_range",
    "rms_norm_eps",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
)
OPTIONAL_MOE = ("router_aux_loss_coef",)
READ_APART = (
    "model_type",
    "layer_types",
    "full_attention_interval",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
)

# Architecture that has one value in all of them; carried where its family does not always write it.
FIXED: dict[str, tuple[Any, ...]] = {
    "attn_output_gate": (True,),
    "mamba_ssm_dtype": ("float32",),
    "mtp_use_dedicated_embeddings": (False,),
    "output_gate_type": ("swish", "silu"),
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "is_encoder_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
}

_CARRIED_NAMES = """
architectures auto_map dtype torch_dtype transformers_version use_cache tokenizer_class prefix
bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
image_token_id video_token_id vision_start_token_id vision_end_token_id language_model_only
output_router_logits output_attentions output_hidden_states output_scores return_dict
return_dict_in_generate torchscript chunk_size_feed_forward problem_type id2label label2id
finetuning_task task_specific_params use_bfloat16 tf_legacy_loss
do_sample temperature top_k top_p typical_p min_p repetition_penalty length_penalty
exponential_decay_length_penalty diversity_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids max_length min_length max_new_tokens num_beams
num_beam_groups early_stopping num_return_sequences forced_bos_token_id forced_eos_token_id
remove_invalid_values suppress_tokens begin_suppress_tokens
unsloth_fixed unsloth_version unsloth_fixed_mtp
"""
CARRIED = frozenset(_CARRIED_NAMES.split())
CARRIED_OUTER = CARRIED | {"vision_config"}
QUANTIZED = ("quantization_config", "quantization", "compression_config")


def architecture_keys(kind: ModelType) -> tuple[str, ...]:
    """The keys that hold a field of `Qwen35Config` under the same name."""
    if kind.moe:
        return REQUIRED + OPTIONAL + REQUIRED_MOE + OPTIONAL_MOE
    return REQUIRED + OPTIONAL + REQUIRED_DENSE


def read_keys(kind: ModelType) -> tuple[str, ...]:
    """Every key that says something about the architecture of the text model."""
    return (*architecture_keys(kind), kind.family.mtp_key, *READ_APART)
