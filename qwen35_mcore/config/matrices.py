"""Which parameters Muon takes, and which matrices one parameter holds: the one table.

A matrix maps one vector to another: the query projection is one, the key projection another,
although one parameter holds both. Muon orthogonalises each by itself. Adam takes what is no such
map, or a narrow one: embedding, output layer, norms, convolution, router, the gate of the shared
expert, A_log, dt_bias, and the projections to a GatedDeltaNet's logits b and a.

The projection of an MTP layer is one matrix, as in the published checkpoints: it maps the embedding
and the hidden state together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qwen35_mcore.config.counts import count_parameters
from qwen35_mcore.config.model_config import Qwen35Config


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A kind of parameter that is made of matrices, by the sizes of the whole model."""

    place: str
    """Where it stands: a layer, and whether it is the layer's input or output projection."""
    rows: dict[str, int]
    """Rows of each matrix, in the order in which the parameter holds them."""
    columns: int
    count: int
    """How many parameters of this kind the model has; each expert counts."""
    groups: int | None = None
    """How often the matrices take turns, each group with an equal part of each. None: as often as
    there are tensor-parallel ranks, each of which holds its part of one matrix after the other."""

    @property
    def parameters(self) -> int:
        """Of all parameters of this kind; Muon's state is a float32 momentum of each."""
        return self.count * sum(self.rows.values()) * self.columns

    def newton_schulz_flops(self, steps: int = 5) -> int:
        """Operations of Muon's update: each step multiplies ``x xT``, its square, and that by x."""
        sizes = [sorted((rows, self.columns)) for rows in self.rows.values()]
        once = sum(4 * short**2 * long + 2 * short**3 for short, long in sizes)
        return self.count * steps * once


def matrix_weights(model_config: Qwen35Config) -> tuple[Weight, ...]:
    """Every parameter of the model that Muon takes, MTP included."""
    hidden, gdn, attention = (
        model_config.hidden_size,
        model_config.gdn_shape,
        model_config.attention_shape,
    )
    mtp = model_config.mtp_num_hidden_layers
    layers = model_config.num_hidden_layers + mtp
    attention_layers = model_config.num_attention_layers + mtp
    return (
        Weight(
            place="gdn in",
            rows=dict(zip("qkvz", (*gdn.qkv_widths, gdn.value_width), strict=True)),
            columns=hidden,
            count=model_config.num_gdn_layers,
        ),
        _output("gdn", hidden, gdn.value_width, model_config.num_gdn_layers),
        Weight(
            place="attention in",
            rows={
                "query": attention.query_width,
                "gate": attention.query_width,
                "key": attention.kv_width,
                "value": attention.kv_width,
            },
            columns=hidden,
            count=attention_layers,
            groups=attention.kv_heads,
        ),
        _output("attention", hidden, attention.query_width, attention_layers),
        *_feed_forward(model_config, layers),
        *((_output("mtp", hidden, 2 * hidden, mtp),) if mtp else ()),
    )


def layer_weights(model_config: Qwen35Config, kind: str) -> list[Weight]:
    """Of one kind of layer: g GatedDeltaNet, a attention, m MTP."""
    mixer = {"g": ("gdn",), "a": ("attention",), "m": ("attention", "mtp")}[kind]
    layers = (*mixer, "mlp", "expert", "shared expert")
    return [w for w in matrix_weights(model_config) if w.place.rpartition(" ")[0] in layers]


def _feed_forward(model_config: Qwen35Config, layers: int) -> tuple[Weight, ...]:
    hidden = model_config.hidden_size
    if not model_config.is_moe:
        return _swiglu("mlp", hidden, model_config.intermediate_size, layers)
    return (
        *_swiglu(
            "expert", hidden, model_config.moe_intermediate_size, layers * model_config.num_experts
        ),
        *_swiglu("shared expert", hidden, model_config.shared_expert_intermediate_size, layers),
    )


def _swiglu(layer: str, hidden: int, width: int, count: int) -> tuple[Weight, Weight]:
    rows = {"gate": width, "up": width}
    return (
        Weight(place=f"{layer} in", rows=rows, columns=hidden, count=count),
        _output(layer, hidden, width, count),
    )


def _output(layer: str, hidden: int, width: int, count: int) -> Weight:
    return Weight(place=f"{layer} out", rows={"out": hidden}, columns=width, count=count)


def describe(model_config: Qwen35Config, scalar_optimizer: str = "adam") -> str:
    """How many matrices and parameters Muon takes, and how many another optimizer does."""
    weights = matrix_weights(model_config)
    kinds: Counter[str] = Counter()
    for weight in weights:
        layer = weight.place.rpartition(" ")[0]
        kinds.update({f"{layer} {name}": weight.count for name in weight.rows})
    ours = sum(weight.parameters for weight in weights)
    rest = count_parameters(model_config).total - ours
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return (
        f"muon: {kinds.total():,} matrices, each by itself, {ours:,} parameters ({listed}); "
        f"{scalar_optimizer}: the other {rest:,} parameters"
    )
