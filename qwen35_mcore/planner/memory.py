"""Bytes of GPU memory by part of the model: weights, gradients, optimizer, activations, overhead.

Megatron-core's distributed optimizer shares the state of routed experts between the expert data
parallel ranks, that of everything else between data and context parallel ones. Parts of a model
have the names of `parallel.parameters`.
"""

from __future__ import annotations

from qwen35_mcore.parallel.parameters import Parameters
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
    return WEIGHT * parameters.count + copies, GRADIENT * parameters.trained, optimizer


def own_share(parameters: Parameters, job: Job, candidate: Candidate) -> float:
    """Parameters of these whose optimizer state a rank holds."""
    shares = candidate.dp(job) * candidate.cp
    return parameters.dense / shares + parameters.expert / candidate.expert_dp(job)


def kept(batch: Microbatch, kind: str) -> Kept:
    """Activations of a part under the candidate's recomputation."""
    if kind == "E":
        return activations.tower(batch)
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
