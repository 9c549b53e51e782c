"""Bytes of GPU memory by part of the model: weights, gradients, optimizer, activations, overhead.

Megatron-core's distributed optimizer shares the state of routed experts between the expert data
parallel ranks, that of everything else between data and context parallel ones.

The parts of a model are named by one character: E embedding, g GatedDeltaNet layer, a attention
layer, m MTP layer, L output layer with final norm and losses.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen35_mcore.config import counts
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.planner import activations
from qwen35_mcore.planner.activations import Kept
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.hardware import GIB, Gpu

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12
"""Bytes a parameter: bfloat16, float32, and float32 weight with two moments."""
FP8_COPIES = 2
"""Bytes of Transformer Engine's FP8 copies of a weight and of its transpose; experts have none."""
CONTEXT_BYTES, COMMUNICATOR_BYTES = int(0.75 * GIB), int(1.0 * GIB)
"""CUDA context with the workspaces of cuBLAS and cuDNN; NCCL's buffers of a multi-GPU run."""
FRAGMENTATION = 0.03
"""Share of a GPU's memory that PyTorch's allocator holds and cannot use (expandable segments)."""


@dataclass(frozen=True)
class Parameters:
    """Parameters on one rank, by how they are shared and whether FP8 products use them."""

    dense: float = 0.0
    expert: float = 0.0
    in_fp8: float = 0.0

    def __add__(self, other: Parameters) -> Parameters:
        dense, expert = self.dense + other.dense, self.expert + other.expert
        return Parameters(dense, expert, self.in_fp8 + other.in_fp8)

    @property
    def count(self) -> float:
        return self.dense + self.expert


def overhead_bytes(gpu: Gpu, gpus: int) -> int:
    """Memory that no model formula accounts for, stated in every report."""
    communicators = COMMUNICATOR_BYTES if gpus > 1 else 0
    return CONTEXT_BYTES + communicators + int(FRAGMENTATION * gpu.memory_bytes)


def static_bytes(
    parameters: Parameters, job: Job, candidate: Candidate
) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state that the distributed optimizer holds on one rank."""
    copies = FP8_COPIES * parameters.in_fp8 if candidate.fp8 else 0.0
    optimizer = OPTIMIZER * own_share(parameters, job, candidate)
    return WEIGHT * parameters.count + copies, GRADIENT * parameters.count, optimizer


def own_share(parameters: Parameters, job: Job, candidate: Candidate) -> float:
    """Parameters of these whose optimizer state a rank holds."""
    shares = candidate.dp(job) * candidate.cp
    return parameters.dense / shares + parameters.expert / candidate.expert_dp(job)


def mixer_parameters(model_config: Qwen35Config, candidate: Candidate, kind: str) -> Parameters:
    """GatedDeltaNet (g) or attention (a), and the norm before it, on one rank."""
    count = counts.gdn_parameters if kind == "g" else counts.attention_parameters
    split = count(model_config) / candidate.tp
    return Parameters(dense=split + model_config.hidden_size, in_fp8=split)


def feed_forward_parameters(model_config: Qwen35Config, candidate: Candidate) -> Parameters:
    """MLP or MoE, and the norm before it, on one rank. The router is on every TP rank."""
    dense = counts.mlp_parameters(model_config) + counts.shared_expert_parameters(model_config)
    split = dense / candidate.tp
    expert = counts.expert_parameters(model_config).total / (candidate.ep * candidate.etp)
    everywhere = model_config.hidden_size + counts.router_parameters(model_config)
    return Parameters(dense=split + everywhere, expert=expert, in_fp8=split)


def part_parameters(model_config: Qwen35Config, candidate: Candidate, kind: str) -> Parameters:
    """A part on one rank. A pipeline's MTP stage holds a copy of the embedding; with tied
    embeddings that copy is its output layer too."""
    hidden, tied = model_config.hidden_size, model_config.tie_word_embeddings
    pipelined = candidate.pp > 1
    table = Parameters(dense=model_config.vocab_size * hidden / candidate.tp)
    if kind == "E":
        return table
    if kind == "L":
        norm = Parameters(dense=hidden)
        return norm if tied and not pipelined else norm + table
    mixer = mixer_parameters(model_config, candidate, kind)
    layer = mixer + feed_forward_parameters(model_config, candidate)
    if kind != "m":
        return layer
    joining = 2 * hidden**2 / candidate.tp
    own = layer + Parameters(dense=joining + 3 * hidden, in_fp8=joining)
    return own + table if pipelined and not tied else own


def kept(batch: Microbatch, kind: str) -> Kept:
    """Activations of a part under the candidate's recomputation."""
    if kind == "E":
        return Kept(0.0)
    if kind == "L":
        both = activations.output(batch)
        # both exist only around the loss, where its microbatch is the only one of the stage
        return Kept(both.saved + both.transient)
    if kind == "m":
        layer, inputs = activations.mtp(batch), 2
    else:
        mixer = activations.gdn if kind == "g" else activations.attention
        layer, inputs = mixer(batch) + activations.feed_forward(batch), 1
    if batch.candidate.recompute == "none":
        return layer
    if batch.candidate.recompute == "selective":
        return Kept(layer.saved - layer.recomputed, layer.transient + layer.recomputed)
    stored = batch.own_tokens * 2 * batch.model_config.hidden_size * inputs
    return Kept(stored, layer.saved + layer.transient)
