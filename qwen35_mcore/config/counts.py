"""Parameter counts from the config alone, by component, total and active per token.

*Total* is every parameter of the built model: MTP included, a tied embedding once.

*Active* is what takes part in predicting one token's successor, the convention of names such as
35B-A3B: of the routed experts the num_experts_per_tok that the token visits, everything else in
full, embedding and output layer included (a tied table once), but not MTP, which predicts the token
after that. It is a size, not a cost: the embedding is a lookup.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen35_mcore.config.layer_pattern import LayerKind, mtp_pattern
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig


@dataclass(frozen=True)
class Count:
    """Parameters in all, and those active per token."""

    total: int
    active: int

    def __add__(self, other: Count) -> Count:
        return Count(self.total + other.total, self.active + other.active)

    def __mul__(self, times: int) -> Count:
        return Count(self.total * times, self.active * times)


_NONE = Count(0, 0)


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """The parameters of a model by component, each summed over its layers."""

    embedding: Count
    """Token embedding; when tied, the output layer too."""
    output: Count
    """Output layer; zero when it is the embedding."""
    gdn: Count
    """GatedDeltaNet mixers: projections, convolution, A_log, dt_bias, gated norm."""
    attention: Count
    """Full attention mixers: projections with output gate, q and k norms."""
    mlp: Count
    """Dense SwiGLU layers; zero in a mixture of experts."""
    experts: Count
    """Routed experts."""
    router: Count
    """Router weights."""
    shared_expert: Count
    """Shared experts and their gates."""
    norms: Count
    """The two RMSNorms of every decoder layer and the final one."""
    mtp: Count
    """MTP in full: its projection, norms, attention and feed-forward layer."""
    vision: Count = _NONE
    """The vision tower and its merger, of a run that trains it; no token of text visits them."""

    @property
    def total(self) -> int:
        """Every parameter of the model, MTP included."""
        return self._sum().total

    @property
    def active(self) -> int:
        """Parameters that take part in predicting the next token (see the module's text)."""
        return self._sum().active

    @property
    def total_without_mtp(self) -> int:
        """What transformers builds, and (with the vision tower) what a name such as 35B counts."""
        return self.total - self.mtp.total

    def by_component(self) -> dict[str, Count]:
        """The components by name; the vision tower where it is counted."""
        return {
            name: count for name, count in vars(self).items() if name != "vision" or count.total
        }

    def _sum(self) -> Count:
        return sum(self.by_component().values(), _NONE)


def count_parameters(model_config: Qwen35Config, *, vision: bool = False) -> ParameterCounts:
    """Count every parameter of the text model that `model_config` describes; and of its vision
    tower with ``vision``, for a run that trains it.

    Raises:
        ConfigError: the model has no vision tower, or one that contradicts it.
    """
    table = model_config.vocab_size * model_config.hidden_size
    layers = model_config.num_hidden_layers
    return ParameterCounts(
        embedding=_everywhere(table),
        output=_NONE if model_config.tie_word_embeddings else _everywhere(table),
        gdn=_everywhere(gdn_parameters(model_config)) * model_config.num_gdn_layers,
        attention=_everywhere(attention_parameters(model_config))
        * model_config.num_attention_layers,
        mlp=_everywhere(mlp_parameters(model_config)) * layers,
        experts=expert_parameters(model_config) * layers,
        router=_everywhere(router_parameters(model_config)) * layers,
        shared_expert=_everywhere(shared_expert_parameters(model_config)) * layers,
        norms=_everywhere((2 * layers + 1) * model_config.hidden_size),
        mtp=Count(mtp_parameters(model_config), 0),
        vision=Count(vision_parameters(VisionConfig.of(model_config)), 0) if vision else _NONE,
    )


def gdn_parameters(model_config: Qwen35Config) -> int:
    """One GDN mixer: both projections, convolution, A_log and dt_bias, gated norm."""
    gdn = model_config.gdn_shape
    projections = model_config.hidden_size * (gdn.in_proj_width + gdn.value_width)
    convolution = model_config.linear_conv_kernel_dim * gdn.conv_width
    return projections + convolution + 2 * gdn.value_heads + gdn.value_head_dim


def attention_parameters(model_config: Qwen35Config) -> int:
    """One full attention mixer: query and output gate, key, value, output, q and k norms."""
    attention = model_config.attention_shape
    projections = model_config.hidden_size * (attention.qkv_width + attention.query_width)
    return projections + 2 * attention.head_dim


def mlp_parameters(model_config: Qwen35Config) -> int:
    """One dense SwiGLU; 0 in a mixture of experts."""
    return 3 * model_config.hidden_size * model_config.intermediate_size


def expert_parameters(model_config: Qwen35Config) -> Count:
    """The routed experts of one layer; 0 in a dense model."""
    one = 3 * model_config.hidden_size * model_config.moe_intermediate_size
    return Count(model_config.num_experts * one, model_config.num_experts_per_tok * one)


def router_parameters(model_config: Qwen35Config) -> int:
    """The router of one layer; 0 in a dense model."""
    return model_config.hidden_size * model_config.num_experts


def shared_expert_parameters(model_config: Qwen35Config) -> int:
    """The shared expert of one layer and its gate (one output); 0 in a dense model."""
    if not model_config.is_moe:
        return 0
    return model_config.hidden_size * (3 * model_config.shared_expert_intermediate_size + 1)


def layer_parameters(model_config: Qwen35Config, kind: LayerKind) -> Count:
    """One whole decoder layer of a kind: mixer, feed-forward, two norms."""
    mixer = gdn_parameters if kind is LayerKind.GDN else attention_parameters
    rest = (
        mlp_parameters(model_config)
        + router_parameters(model_config)
        + shared_expert_parameters(model_config)
    )
    norms = 2 * model_config.hidden_size
    return _everywhere(mixer(model_config) + rest + norms) + expert_parameters(model_config)


def mtp_parameters(model_config: Qwen35Config) -> int:
    """All MTP layers: for each the projection of [embedding, hidden] to hidden, a norm of either
    and of the result, and one decoder layer. Embedding and output layer are the model's."""
    own = 2 * model_config.hidden_size**2 + 3 * model_config.hidden_size
    return sum(
        own + layer_parameters(model_config, kind).total
        for kind in mtp_pattern(model_config.mtp_num_hidden_layers)
    )


def vision_parameters(vision: VisionConfig) -> int:
    """The tower and its merger."""
    return sum(vision_parts(vision).values())


def vision_parts(vision: VisionConfig, tp: int = 1) -> dict[str, int]:
    """The tower (patch embedding, learned positions, and blocks: two LayerNorms, attention, MLP,
    all with biases) and its merger, on each of ``tp`` tensor-parallel ranks. These split the heads
    and both inner widths, and hold embedding, norms and the biases of summed outputs whole."""
    h, ffn, merged = vision.hidden_size, vision.intermediate_size, vision.merged_width
    embedding = h * (vision.patch_values + 1 + vision.num_position_embeddings)
    block = 6 * h + ((h + 1) * 3 * h + h * h + (h + 1) * ffn + ffn * h) // tp
    inner = (merged + 1) * merged + merged * vision.out_hidden_size
    merger = 2 * h + vision.out_hidden_size + inner // tp
    return {"vision": embedding + vision.depth * block, "merger": merger}


def _everywhere(parameters: int) -> Count:
    return Count(parameters, parameters)
