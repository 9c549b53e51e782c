"""Bytes of GPU memory by part of the model: weights, gradients, optimizer, activations, overhead.

Weights, gradients and optimizer follow megatron-core's distributed optimizer with bfloat16 weights
(its ``docs/user-guide/features/dist_optimizer.md``, and ``compute_weight_and_optimizer_memory`` in
``megatron/training/theoretical_memory_usage.py``): 2 bytes a weight and 4 bytes of float32 gradient
on every rank, 4 of float32 weight and 8 of Adam's moments shared by the ranks that hold the same
weight. Routed experts are shared by the expert data parallel ranks, everything else by data and
context parallel ones. Activations are in `activations`.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen35_mcore.config.counts import (
    attention_parameters,
    expert_parameters,
    gdn_parameters,
    mlp_parameters,
    router_parameters,
    shared_expert_parameters,
)
from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.planner import activations
from qwen35_mcore.planner.activations import Kept
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.hardware import GIB, Gpu

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12
"""Bytes a parameter: bfloat16, float32, and float32 weight with two moments."""
FP8_COPIES = 2
"""Transformer Engine keeps an FP8 copy of a weight and of its transpose beside the bfloat16 one.
Routed experts have none: they stay in bfloat16."""

CONTEXT_BYTES = int(0.75 * GIB)
"""CUDA context, cuBLAS and cuDNN workspaces."""
COMMUNICATOR_BYTES = int(1.0 * GIB)
"""NCCL's buffers of the process groups of a multi-GPU run."""
FRAGMENTATION = 0.03
"""Share of a GPU's memory that PyTorch's allocator holds and cannot use (expandable segments)."""


@dataclass(frozen=True)
class Parameters:
    """Parameters on one rank, by how they are shared and whether FP8 products use them."""

    dense: float = 0.0
    expert: float = 0.0
    in_fp8: float = 0.0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            self.dense + other.dense, self.expert + other.expert, self.in_fp8 + other.in_fp8
        )

    @property
    def count(self) -> float:
        return self.dense + self.expert


@dataclass(frozen=True)
class Static:
    """Bytes that a part of the model occupies all the time."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0

    def __add__(self, other: Static) -> Static:
        return Static(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
        )

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class ElementMemory:
    """Memory of one element of a pipeline layout (a layer, the embedding, MTP, the loss)."""

    parameters: Parameters
    static: Static
    saved: float
    """Bytes of one microbatch, kept from its forward to its backward pass."""
    transient: float
    """Bytes on top while its own backward pass runs."""


def overhead_bytes(gpu: Gpu, gpus: int) -> int:
    """Memory that no model formula accounts for, stated in every report."""
    communicators = COMMUNICATOR_BYTES if gpus > 1 else 0
    return CONTEXT_BYTES + communicators + int(FRAGMENTATION * gpu.memory_bytes)


def static_bytes(parameters: Parameters, job: Job, candidate: Candidate) -> Static:
    """What megatron-core's distributed optimizer holds for these parameters on one rank."""
    copies = FP8_COPIES * parameters.in_fp8 if candidate.fp8 else 0.0
    shares = candidate.dp(job) * candidate.cp
    return Static(
        weights=WEIGHT * parameters.count + copies,
        gradients=GRADIENT * parameters.count,
        optimizer=OPTIMIZER
        * (parameters.dense / shares + parameters.expert / candidate.expert_dp(job)),
    )


def mixer_parameters(config: Qwen35Config, candidate: Candidate, kind: LayerKind) -> Parameters:
    """GatedDeltaNet or attention, and the norm before it, on one rank."""
    count = gdn_parameters if kind is LayerKind.GDN else attention_parameters
    split = count(config) / candidate.tp
    return Parameters(dense=split + config.hidden_size, in_fp8=split)


def feed_forward_parameters(config: Qwen35Config, candidate: Candidate) -> Parameters:
    """MLP or MoE, and the norm before it, on one rank. The router is on every TP rank."""
    split = (mlp_parameters(config) + shared_expert_parameters(config)) / candidate.tp
    expert = expert_parameters(config).total / (candidate.ep * candidate.etp)
    everywhere = config.hidden_size + router_parameters(config)
    return Parameters(dense=split + everywhere, expert=expert, in_fp8=split)


def layer_parameters(config: Qwen35Config, candidate: Candidate, kind: LayerKind) -> Parameters:
    """One decoder layer on one rank."""
    return mixer_parameters(config, candidate, kind) + feed_forward_parameters(config, candidate)


def element_parameters(config: Qwen35Config, candidate: Candidate, kind: str) -> Parameters:
    """Embedding (E), MTP layers (m) or output layer and final norm (L) on one rank.

    A pipeline's MTP stage holds a copy of the embedding; with tied embeddings that copy is its
    output layer too.
    """
    hidden, pipelined = config.hidden_size, candidate.pp > 1
    table = Parameters(dense=config.vocab_size * hidden / candidate.tp)
    if kind == "E":
        return table
    if kind == "L":
        norm = Parameters(dense=hidden)
        return norm if config.tie_word_embeddings and not pipelined else norm + table
    joining = 2 * hidden**2 / candidate.tp
    layer = layer_parameters(config, candidate, LayerKind.ATTENTION)
    own = layer + Parameters(dense=joining + 3 * hidden, in_fp8=joining)
    return own + table if pipelined and not config.tie_word_embeddings else own


def layer_memory(job: Job, candidate: Candidate, kind: LayerKind) -> ElementMemory:
    """A decoder layer of a kind."""
    batch = Microbatch(job.config, candidate, job.seq_length)
    mixer = activations.gdn if kind is LayerKind.GDN else activations.attention
    kept = _kept(mixer(batch) + activations.feed_forward(batch), batch, inputs=1)
    parameters = layer_parameters(job.config, candidate, kind)
    return _element(parameters, kept, job, candidate)


def element_memory(job: Job, candidate: Candidate, kind: str) -> ElementMemory:
    """Embedding (E), MTP layers (m) or output layer and losses (L)."""
    batch = Microbatch(job.config, candidate, job.seq_length)
    if kind == "E":
        kept = activations.embedding(batch)
    elif kind == "L":
        output = activations.output(batch)
        # both exist only around the loss, where its microbatch is the only one of the stage
        kept = Kept(output.saved + output.transient)
    else:
        layer = activations.attention(batch) + activations.feed_forward(batch)
        kept = _kept(layer + activations.mtp_joining(batch), batch, inputs=2)
    parameters = element_parameters(job.config, candidate, kind)
    return _element(parameters, kept, job, candidate)


def _kept(layer: Kept, batch: Microbatch, *, inputs: int) -> Kept:
    """A layer's activations under the candidate's recomputation."""
    if batch.candidate.recompute == "none":
        return layer
    if batch.candidate.recompute == "selective":
        return Kept(layer.saved - layer.recomputed, layer.transient + layer.recomputed)
    stored = batch.own_tokens * 2 * batch.config.hidden_size * inputs
    return Kept(stored, layer.saved + layer.transient)


def _element(parameters: Parameters, kept: Kept, job: Job, candidate: Candidate) -> ElementMemory:
    static = static_bytes(parameters, job, candidate)
    return ElementMemory(parameters, static, kept.saved, kept.transient)
