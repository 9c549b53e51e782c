"""Bytes that autograd keeps between the forward and the backward pass, by kind of layer.

Read from the modules that run: `gated_delta_net.py` and `experts.py` of `model/layers/`,
`kernels/fused_triton.py` and flash-linear-attention's chunked delta rule; megatron-core 0.19.2's
attention, router, dispatcher, shared expert and cross entropy; Transformer Engine's LayerNormLinear
(input, normed input) and Linear (input). A tensor that two operations keep counts once; views are
free. Numbers are bytes a token unless said otherwise: bfloat16 2, float32 4, an FP8 copy 1. Routed
experts stay in bfloat16 in FP8 runs (``--moe-experts auto``).
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen35_mcore.planner.candidate import Microbatch

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
        return Kept(
            self.saved + other.saved,
            max(self.transient, other.transient),
            self.recomputed + other.recomputed,
        )


def gdn(batch: Microbatch) -> Kept:
    """One GatedDeltaNet: input, normed input, projection, q, k, v, chunk matrices, gates, output
    before and after its norm."""
    config, tp, hidden = batch.config, batch.candidate.tp, batch.config.hidden_size
    heads = config.linear_num_value_heads
    key, value = config.gdn_shape.key_width, config.gdn_shape.value_width
    projection = 2 * (2 * key + 2 * value + 2 * heads)
    convolved = 2 * (2 * key + value)
    chunks = heads * 2 * DELTA_RULE_CHUNK
    gates = heads * (4 + 2 + 2 + 4)  # cumulated decay, its logit, write strength's logit and value
    normed = _linear_input(batch) * value
    inside = (projection + convolved + chunks + gates + 2 * value + normed) / tp
    gradients = (projection + convolved + 4 * value) / tp
    # in FP8 runs the gates' own projection keeps its input in bfloat16
    own = _layer_input(batch) + (2 * hidden if batch.candidate.fp8 else 0)
    return Kept(
        batch.own_tokens * own + batch.tokens * inside,
        batch.tokens * gradients + batch.own_tokens * 4 * hidden,
        batch.tokens * normed / tp,
    )


def attention(batch: Microbatch) -> Kept:
    """One gated attention: input, normed input, projection (the gate, and q and k before their
    norms, are views of it), q, k, v as the kernel takes them, its output and log sum, the gated
    output."""
    config, tp, hidden = batch.config, batch.candidate.tp, batch.config.hidden_size
    query = config.num_attention_heads * config.head_dim
    key_value = max(config.num_key_value_heads, tp) * config.head_dim
    projection = qkv_projection(batch) / (1 if gathers_qkv(batch) else tp)
    kernel = 2 * (query + 2 * key_value) + 2 * query + 4 * config.num_attention_heads
    inside = projection + (kernel + _linear_input(batch) * query) / tp
    gradients = projection + (2 * (2 * query + 2 * key_value) + 4 * query) / tp
    return Kept(
        batch.own_tokens * _layer_input(batch) + batch.tokens * inside,
        batch.tokens * gradients + batch.own_tokens * 4 * hidden,
    )


def qkv_projection(batch: Microbatch) -> int:
    """Of all tensor parallel ranks, what attention's first linear layer gives: query, gate, key and
    value."""
    config = batch.config
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return 2 * heads * config.head_dim


def gathers_qkv(batch: Microbatch) -> bool:
    """Whether every rank holds all of it: with fewer key heads than ranks, megatron gathers the
    projection and takes each rank's heads as views (`Attention.get_query_key_value_tensors`)."""
    return batch.candidate.tp > batch.config.num_key_value_heads


def mlp(batch: Microbatch) -> Kept:
    """One dense SwiGLU: input, normed input, gate and up, their product."""
    config, tp, hidden = batch.config, batch.candidate.tp, batch.config.hidden_size
    width = config.intermediate_size
    inside = (4 + _linear_input(batch)) * width / tp
    own = batch.own_tokens * _layer_input(batch)
    return Kept(
        own + batch.tokens * inside,
        batch.tokens * 6 * width / tp + batch.own_tokens * 4 * hidden,
        batch.own_tokens * _linear_input(batch) * hidden + batch.tokens * inside,
    )


def moe(batch: Microbatch) -> Kept:
    """One mixture of experts: norm, router, permutation, routed and shared expert."""
    return _norm_and_router(batch) + _routed_experts(batch) + _shared_expert(batch)


def _norm_and_router(batch: Microbatch) -> Kept:
    hidden, experts = batch.config.hidden_size, batch.config.num_experts
    # logits, scores and scores of the balancing loss; routing map; row map of the permutation
    routing = experts * (4 + 4 + 4 + 1 + 8)
    return Kept(batch.own_tokens * (4 * hidden + routing))


def _routed_experts(batch: Microbatch) -> Kept:
    """Input rows, gate and up, their product, the rows' weights; and, in the backward pass, the
    gradients of rows before they are summed up and those of one weight of every expert."""
    hidden, width = batch.config.hidden_size, batch.expert_width
    rows, experts = batch.expert_rows, batch.local_experts
    product = 2 * width
    second = rows * (2 * hidden + 2 * width) + 2 * experts * hidden * width
    # gate, up and product are free again by then, or as good as that
    first = rows * (2 * hidden - 2 * width) + 2 * experts * hidden * 2 * width
    return Kept(
        rows * (2 * hidden + 4 * width + product + 4 + 4),
        max(first, second) + batch.own_tokens * 4 * hidden + dispatcher_buffer(batch),
        rows * product,
    )


def dispatcher_buffer(batch: Microbatch) -> float:
    """Rows of the all-to-all beside the ones sorted by expert; nothing without communication."""
    if batch.candidate.ep * batch.candidate.etp == 1:
        return 0.0
    return batch.expert_rows * 2 * batch.config.hidden_size


def _shared_expert(batch: Microbatch) -> Kept:
    """Gate and up, their product, the output that the sigmoid gate multiplies."""
    hidden, tp = batch.config.hidden_size, batch.candidate.tp
    width = batch.config.shared_expert_intermediate_size
    inside = batch.tokens * (4 + _linear_input(batch)) * width / tp
    return Kept(inside + batch.own_tokens * (2 * hidden + 8))


def feed_forward(batch: Microbatch) -> Kept:
    """The model's MLP or MoE."""
    return moe(batch) if batch.config.is_moe else mlp(batch)


def mtp_joining(batch: Microbatch) -> Kept:
    """What an MTP layer adds to an attention layer: two norms (input and output), their
    concatenation, and the final norm."""
    hidden = batch.config.hidden_size
    return Kept(batch.own_tokens * hidden * (2 * (2 + 2) + 2 * _linear_input(batch) + 2))


def embedding(batch: Microbatch) -> Kept:
    """Token and position ids, 64 bits each."""
    return Kept(batch.tokens * 16)


def output(batch: Microbatch) -> Kept:
    """Final norm, and the logits of the loss and of every MTP layer's loss.

    megatron-core's fused cross entropy turns bfloat16 logits into float32 ones, makes them the
    softmax and keeps that. While one loss is made or its gradient rounded back, the bfloat16 logits
    and, in what torch.compile makes of it, a second float32 copy exist besides (measured).
    """
    config, tp = batch.config, batch.candidate.tp
    logits = batch.tokens * config.vocab_size / tp
    losses = 1 + config.mtp_num_hidden_layers
    norm = batch.own_tokens * 4 * config.hidden_size
    return Kept(norm + losses * 4 * logits, (2 + 4) * logits)


def _linear_input(batch: Microbatch) -> int:
    """Bytes for each element that a linear layer keeps of its input."""
    return 1 if batch.candidate.fp8 else 2


def _layer_input(batch: Microbatch) -> int:
    """A layer's input, kept by the norm in front of it, and the normed input."""
    return (2 + _linear_input(batch)) * batch.config.hidden_size
