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
        """The components by name, in the order of the forward pass."""
        return dict(vars(self))

    def _sum(self) -> Count:
        return sum(self.by_component().values(), _NONE)


def count_parameters(config: Qwen35Config) -> ParameterCounts:
    """Count every parameter of the text model that `config` describes."""
    table = config.vocab_size * config.hidden_size
    layers = config.num_hidden_layers
    return ParameterCounts(
        embedding=_everywhere(table),
        output=_NONE if config.tie_word_embeddings else _everywhere(table),
        gdn=_everywhere(gdn_parameters(config)) * config.num_gdn_layers,
        attention=_everywhere(attention_parameters(config)) * config.num_attention_layers,
        mlp=_everywhere(mlp_parameters(config)) * layers,
        experts=expert_parameters(config) * layers,
        router=_everywhere(router_parameters(config)) * layers,
        shared_expert=_everywhere(shared_expert_parameters(config)) * layers,
        norms=_everywhere((2 * layers + 1) * config.hidden_size),
        mtp=Count(mtp_parameters(config), 0),
    )


def gdn_parameters(config: Qwen35Config) -> int:
    """One GDN mixer: both projections, convolution, A_log and dt_bias, gated norm."""
    gdn = config.gdn_shape
    projections = config.hidden_size * (gdn.in_proj_width + gdn.value_width)
    convolution = config.linear_conv_kernel_dim * gdn.conv_width
    return projections + convolution + 2 * gdn.value_heads + gdn.value_head_dim


def attention_parameters(config: Qwen35Config) -> int:
    """One full attention mixer: query and output gate, key, value, output, q and k norms."""
    attention = config.attention_shape
    projections = config.hidden_size * (attention.qkv_width + attention.query_width)
    return projections + 2 * attention.head_dim


def mlp_parameters(config: Qwen35Config) -> int:
    """One dense SwiGLU; 0 in a mixture of experts."""
    return 3 * config.hidden_size * config.intermediate_size


def expert_parameters(config: Qwen35Config) -> Count:
    """The routed experts of one layer; 0 in a dense model."""
    one = 3 * config.hidden_size * config.moe_intermediate_size
    return Count(config.num_experts * one, config.num_experts_per_tok * one)


def router_parameters(config: Qwen35Config) -> int:
    """The router of one layer; 0 in a dense model."""
    return config.hidden_size * config.num_experts


def shared_expert_parameters(config: Qwen35Config) -> int:
    """The shared expert of one layer and its gate (one output); 0 in a dense model."""
    if not config.is_moe:
        return 0
    return config.hidden_size * (3 * config.shared_expert_intermediate_size + 1)


def layer_parameters(config: Qwen35Config, kind: LayerKind) -> Count:
    """One whole decoder layer of a kind: mixer, feed-forward, two norms."""
    mixer = gdn_parameters if kind is LayerKind.GDN else attention_parameters
    rest = mlp_parameters(config) + router_parameters(config) + shared_expert_parameters(config)
    norms = 2 * config.hidden_size
    return _everywhere(mixer(config) + rest + norms) + expert_parameters(config)


def mtp_parameters(config: Qwen35Config) -> int:
    """All MTP layers: for each the projection of [embedding, hidden] to hidden, a norm of either
    and of the result, and one decoder layer. Embedding and output layer are the model's."""
    own = 2 * config.hidden_size**2 + 3 * config.hidden_size
    return sum(
        own + layer_parameters(config, kind).total
        for kind in mtp_pattern(config.mtp_num_hidden_layers)
    )


def _everywhere(parameters: int) -> Count:
    return Count(parameters, parameters)
