"""The fields of a model config and what follows from them, unchecked.

Field names are Hugging Face's, so that every number can be looked up in a published config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen35_mcore.config.hf_keys import MODEL_TYPES, Family
from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.rope import RopeParameters, YarnScaling
from qwen35_mcore.config.shapes import AttentionShape, GdnShape


@dataclass(frozen=True, kw_only=True)
class ModelFields:
    """What `Qwen35Config` is made of: its checks and its JSON are written against this."""

    model_type: str
    """One of qwen3_5, qwen3_5_text (dense), qwen3_5_moe, qwen3_5_moe_text, qwen3_next. qwen3_5 and
    qwen3_5_moe are vision-language configs: their text model is the same, their files hold more.
    qwen3_next is computed as qwen3_5_moe_text: its files alone differ."""
    vocab_size: int
    """Rows of the embedding. Megatron's padded vocabulary is always this number: padding columns
    would take part in the softmax, so a tensor parallel size that does not divide it is refused."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Decoder layers, MTP layers not counted."""
    num_attention_heads: int
    """Query heads of a full attention layer; each has an output gate of the same size."""
    num_key_value_heads: int
    """Key and value heads of a full attention layer; divides num_attention_heads."""
    max_position_embeddings: int
    """Longest sequence that the model is meant for (RoPE has no table, so this is a promise)."""
    rope_parameters: RopeParameters
    """Rotary embedding: base, rotated fraction, MRoPE sections, YaRN."""
    linear_num_value_heads: int
    """Value heads of a GDN layer; a multiple of linear_num_key_heads."""

    intermediate_size: int = 0
    """Width of a dense layer's SwiGLU; 0 for mixture-of-experts, which has no dense layer."""
    num_experts: int = 0
    """Routed experts per layer. 0, and only 0, means dense."""
    num_experts_per_tok: int = 0
    """Experts that each token visits; their router weights are renormalised to add up to one."""
    moe_intermediate_size: int = 0
    """Width of one routed expert's SwiGLU."""
    shared_expert_intermediate_size: int = 0
    """Width of the sigmoid-gated expert that every token visits."""
    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss. It means nothing for a dense model, which stores 0."""

    layer_types: tuple[LayerKind, ...] = ()
    """The token mixer of every decoder layer. Left empty it becomes Qwen3.5's own pattern, every
    fourth layer full attention; it is stored explicitly because fine-tuned and pruned models have
    patterns that no interval describes."""
    head_dim: int = 256
    """Width of a full attention head; not hidden_size / num_attention_heads in Qwen3.5."""
    hidden_act: str = "silu"
    """Activation of the SwiGLU and of the GDN convolution. Only silu exists."""
    attention_bias: bool = False
    """Biases in the attention projections. Only false exists."""
    attention_dropout: float = 0.0
    """Dropout of the attention probabilities in training."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm, the gated GDN norm included."""
    tie_word_embeddings: bool = False
    """Whether the output layer is the embedding. For a vision-language config this is the top-level
    key, the one that counts; a nested one can be wrong."""

    linear_conv_kernel_dim: int = 4
    """Taps of the causal depthwise convolution over GDN's q, k and v."""
    linear_key_head_dim: int = 128
    """Width of a GDN query or key head."""
    linear_value_head_dim: int = 128
    """Width of a GDN value head, and of the gated norm after it."""
    linear_num_key_heads: int = 16
    """Query and key heads of a GDN layer. It bounds TP x CP, because the all-to-all splits them."""

    mtp_num_hidden_layers: int = 0
    """Multi-token-prediction layers, 0 or 1. What a config.json has that does not mention them is
    in `hf_keys`, by family."""

    carried: dict[str, Any] = field(default_factory=dict, hash=False)
    """Hugging Face keys beside the architecture (token ids, dtype...), given back by `to_hf`. For a
    vision-language config these are the ones inside ``text_config``."""
    carried_outer: dict[str, Any] = field(default_factory=dict, hash=False)
    """The same for the top level of a vision-language config (``vision_config`` is one of them, and
    `VisionConfig.of` reads it where a run trains the tower)."""

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward layers are mixtures of experts."""
        return self.num_experts > 0

    @property
    def is_vision_language(self) -> bool:
        """Whether the checkpoint this came from, or goes to, has the text model nested in it."""
        return MODEL_TYPES[self.model_type].nested

    @property
    def text_model_type(self) -> str:
        """Model type of the text model alone."""
        return MODEL_TYPES[self.model_type].text_model_type

    @property
    def family(self) -> Family:
        """How its config.json and its checkpoints are written."""
        return MODEL_TYPES[self.model_type].family

    @property
    def hf_architecture(self) -> str:
        """The transformers class, for the ``architectures`` key."""
        return MODEL_TYPES[self.model_type].architecture

    def is_gdn(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a GatedDeltaNet."""
        return self.layer_types[layer] is LayerKind.GDN

    @property
    def num_gdn_layers(self) -> int:
        """Decoder layers that are GatedDeltaNet."""
        return self.layer_types.count(LayerKind.GDN)

    @property
    def num_attention_layers(self) -> int:
        """Decoder layers that are full attention, MTP layers not counted."""
        return self.layer_types.count(LayerKind.ATTENTION)

    @property
    def rotary_dim(self) -> int:
        """Channels of an attention head that RoPE rotates."""
        return int(self.head_dim * self.rope_parameters.partial_rotary_factor)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return self.rope_parameters.rope_theta

    @property
    def yarn(self) -> YarnScaling | None:
        """YaRN parameters, or None for plain RoPE."""
        return self.rope_parameters.yarn

    @property
    def gdn_shape(self) -> GdnShape:
        """Heads and widths of a GDN layer."""
        return GdnShape(
            key_heads=self.linear_num_key_heads,
            value_heads=self.linear_num_value_heads,
            key_head_dim=self.linear_key_head_dim,
            value_head_dim=self.linear_value_head_dim,
        )

    @property
    def attention_shape(self) -> AttentionShape:
        """Heads and widths of a full attention layer."""
        return AttentionShape(
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )
