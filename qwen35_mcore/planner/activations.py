"""Bytes that autograd keeps between the forward and the backward pass, by kind of layer.

Read from the layers and kernels of this package, megatron-core 0.19.2, flash-linear-attention and
Transformer Engine. A tensor that two operations keep counts once; views, and vectors of one number
a token or a head, not at all. Numbers are bytes a token unless said otherwise: bfloat16 2, float32
4, an FP8 copy 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen35_mcore.planner.candidate import Microbatch

_LOGITS = {"te": (2, 2), "native": (4, 2 + 4)}
"""Bytes a logit that every loss keeps, and those alive besides while one is made. Transformer
Engine 2.20.2 keeps a bfloat16 copy of the logits, which its backward pass makes their gradient;
megatron the float32 softmax, beside which logits and another float32 copy exist (measured)."""
FEWEST_EXPERTS = 32
"""From so many local experts on one kernel adds the gradients of their weights to the main ones
(`kernels.grouped_linear`)."""
DELTA_RULE_CHUNK = 64
"""Rows of the matrix that flash-linear-attention keeps for every chunk and value head."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one microbatch in one part of a layer."""

    saved: float
    """Kept until the backward pass."""
    transient: float = 0.0
    """Alive on top of that while the part's backward pass runs."""
    recomputed: float = 0.0
    """Of `saved`, what selective recomputation drops."""

    def __add__(self, other: Kept) -> Kept:
        """Parts of one layer: what they keep adds up, their backward passes take turns."""
        transient = max(self.transient, other.transient)
        return Kept(self.saved + other.saved, transient, self.recomputed + other.recomputed)


def gdn(batch: Microbatch) -> Kept:
    """One GatedDeltaNet: input, normed input, projection, q, k, v, chunk matrices, output before
    and after its norm."""
    config, tp = batch.model_config, batch.candidate.tp
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    key, value = config.gdn_shape.key_width, config.gdn_shape.value_width
    projection = 2 * (2 * key + 2 * value + 2 * heads)
    convolved = 2 * (2 * key + value)
    chunks = heads * 2 * DELTA_RULE_CHUNK
    normed = _linear_input(batch) * value
    inside = (projection + convolved + chunks + 2 * value + normed) / tp
    gradients = (projection + convolved + 4 * value) / tp
    # in FP8 runs the gates' own projection keeps its input in bfloat16
    own = _layer_input(batch) + (2 * hidden if batch.candidate.fp8 else 0)
    return Kept(
        batch.own_tokens * own + batch.tokens * inside,
        batch.tokens * gradients + batch.own_tokens * 4 * hidden,
        batch.tokens * normed / tp,
    )


def attention(batch: Microbatch) -> Kept:
    """One gated attention: input, normed input, projection, q, k, v as the kernel takes them, its
    output, the gated output."""
    config, tp, hidden = batch.model_config, batch.candidate.tp, batch.model_config.hidden_size
    query = config.num_attention_heads * config.head_dim
    key_value = max(config.num_key_value_heads, tp) * config.head_dim
    projection = qkv_projection(batch) / (1 if gathers_qkv(batch) else tp)
    kernel = 2 * (query + 2 * key_value) + 2 * query
    inside = projection + (kernel + _linear_input(batch) * query) / tp
    gradients = projection + kernel / tp
    return Kept(
        batch.own_tokens * _layer_input(batch) + batch.tokens * inside,
        batch.tokens * gradients + batch.own_tokens * 4 * hidden,
    )


def qkv_projection(batch: Microbatch) -> int:
    """Bytes of query, gate, key and value, of all tensor parallel ranks."""
    config = batch.model_config
    return 4 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim


def gathers_qkv(batch: Microbatch) -> bool:
    """Whether every rank holds all of it: with fewer key heads than ranks, megatron gathers it."""
    return batch.candidate.tp > batch.model_config.num_key_value_heads


def mlp(batch: Microbatch) -> Kept:
    """One dense SwiGLU: input, normed input, gate and up, their product."""
    config, tp, hidden = batch.model_config, batch.candidate.tp, batch.model_config.hidden_size
    width = config.intermediate_size
    inside = batch.tokens * (4 + _linear_input(batch)) * width / tp
    return Kept(
        batch.own_tokens * _layer_input(batch) + inside,
        batch.tokens * 6 * width / tp + batch.own_tokens * 4 * hidden,
        batch.own_tokens * _linear_input(batch) * hidden + inside,
    )


def moe(batch: Microbatch) -> Kept:
    """One mixture of experts. Of the routed ones input rows, gate and up, their product; and, in
    the backward pass, the gradients of rows before they are summed up and, of few experts, those of
    one weight of each. Of the shared one gate and up, their product, the output."""
    config, candidate = batch.model_config, batch.candidate
    hidden, width = config.hidden_size, config.moe_intermediate_size // candidate.etp
    rows, experts = batch.kept_rows, config.num_experts // candidate.ep
    # logits, scores and scores of the balancing loss; routing map; row map of the permutation
    routing = config.num_experts * (4 + 4 + 4 + 1 + 8)
    shared = (4 + _linear_input(batch)) * config.shared_expert_intermediate_size / candidate.tp
    dense = batch.own_tokens * (6 * hidden + routing) + batch.tokens * shared
    gradient = 2 * experts * hidden * width if experts < FEWEST_EXPERTS else 0
    second = rows * (2 * hidden + 2 * width) + gradient
    # gate, up and product are free again by then, or as good as that
    first = rows * (2 * hidden - 2 * width) + 2 * gradient
    return Kept(
        dense + rows * (2 * hidden + 6 * width),
        max(first, second) + batch.own_tokens * 4 * hidden + dispatcher_buffer(batch),
        rows * 2 * width,
    )


def dispatcher_buffer(batch: Microbatch) -> float:
    """Rows of the all-to-all beside the ones sorted by expert; nothing without communication, or
    where NCCL EP sorts."""
    candidate = batch.candidate
    if candidate.ep * candidate.etp == 1 or candidate.dispatcher == "ncclep":
        return 0.0
    return batch.expert_rows * 2 * batch.model_config.hidden_size


def feed_forward(batch: Microbatch) -> Kept:
    """The model's MLP or MoE."""
    return moe(batch) if batch.model_config.is_moe else mlp(batch)


def tower(batch: Microbatch) -> Kept:
    """The vision tower of a run that trains it."""
    if batch.images is None:
        return Kept(0.0)
    recomputed = batch.candidate.recompute == "full"
    saved, transient = batch.images.kept_bytes(batch.candidate.tp, recomputed=recomputed)
    return Kept(batch.patches * saved, batch.patches * transient)


def mtp(batch: Microbatch) -> Kept:
    """An MTP layer: an attention layer, two norms and their concatenation, the final norm."""
    joining = batch.model_config.hidden_size * (2 * (2 + 2) + 2 * _linear_input(batch) + 2)
    return attention(batch) + feed_forward(batch) + Kept(batch.own_tokens * joining)


def output(batch: Microbatch) -> Kept:
    """Final norm, and what the cross entropy keeps of the logits of every loss."""
    config, tp = batch.model_config, batch.candidate.tp
    logits = batch.tokens * config.vocab_size / tp
    saved, besides = _LOGITS[batch.candidate.cross_entropy]
    saved *= 1 + config.mtp_num_hidden_layers
    return Kept(batch.own_tokens * 4 * config.hidden_size + saved * logits, besides * logits)


def _linear_input(batch: Microbatch) -> int:
    """Bytes for each element that a linear layer keeps of its input."""
    return 1 if batch.candidate.fp8 else 2


def _layer_input(batch: Microbatch) -> int:
    """A layer's input, kept by the norm in front of it, and the normed input."""
    return (2 + _linear_input(batch)) * batch.model_config.hidden_size
