"""Bytes of GPU memory by part of the model: weights, gradients, optimizer, activations, overhead.

Megatron-core's distributed optimizer shares the state of routed experts between the expert data
parallel ranks, that of everything else between data and context parallel ones: Adam's cut anywhere,
Muon's in whole parameters, with buffers padded to the fullest rank's. Under tensor parallelism each
rank gathers and orthogonalises whole matrices.
Parts of a model have the names of `parallel.parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qwen35_mcore.parallel.parameters import Parameters
from qwen35_mcore.planner import activations
from qwen35_mcore.planner.activations import Kept
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.hardware import GIB, Gpu

WEIGHT, MOMENT = 2, 4
"""Bytes of a bfloat16 weight, and of a moment of Adam or Muon."""
FP8_COPIES = 2
"""Bytes of Transformer Engine's FP8 copies of a weight and of its transpose; experts have none."""
CONTEXT_BYTES, COMMUNICATOR_BYTES = int(0.75 * GIB), int(1.0 * GIB)
"""CUDA context with the workspaces of cuBLAS and cuDNN; NCCL's buffers of a multi-GPU run."""
FRAGMENTATION = 0.03
"""Share of a GPU's memory that PyTorch's allocator holds and cannot use (expandable segments)."""
GRAPH_POOL = 0.4
"""Of the activations in one graph of a step, those of all microbatches in flight, what its pool
reserves on top: for four layers 15.4 GiB were reserved, 11.6 without the graph
(tests/bench/NOTES.md). Graphs of parts added nothing."""


def overhead_bytes(gpu: Gpu, gpus: int) -> int:
    """Memory that no model formula accounts for, stated in every report."""
    communicators = COMMUNICATOR_BYTES if gpus > 1 else 0
    return CONTEXT_BYTES + communicators + int(FRAGMENTATION * gpu.memory_bytes)


def graph_pool(candidate: Candidate) -> float:
    """What a candidate's graph reserves on top of its activations, as a share of them."""
    return GRAPH_POOL if candidate.graphs == "full" else 0.0


def static_bytes(
    parameters: Parameters, job: Job, candidate: Candidate
) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state on one rank, the state in even shares."""
    copies = FP8_COPIES * parameters.in_fp8 if candidate.fp8 else 0.0
    gradients = gradient_bytes(job) * parameters.trained
    optimizer = state_bytes(job, candidate) * own_share(parameters, job, candidate)
    optimizer -= MOMENT * sum(even for _, even, _ in muon_shares(parameters, job, candidate))
    return WEIGHT * parameters.count + copies, gradients, optimizer


def gradient_bytes(job: Job) -> int:
    """Bytes a parameter of what microbatches add up to: float32, or bfloat16."""
    return 2 if job.optimizer == "precision-aware" else 4


def state_bytes(job: Job, candidate: Candidate) -> int:
    """Bytes a parameter of the rank that updates it: a float32 weight and two moments (Muon has one
    of a matrix). Precision-aware: moments in bfloat16, and of the weight the 16 bits that the
    bfloat16 one lacks, or all in an FP8 run; A_log, dt_bias and GDN's norm, the few, as in Adam."""
    aware = job.optimizer == "precision-aware"
    return (4 if candidate.fp8 else 2) + 2 * 2 if aware else 4 + 2 * MOMENT


def own_share(parameters: Parameters, job: Job, candidate: Candidate) -> float:
    """Parameters of these whose optimizer state a rank holds."""
    dense, expert = _ranks(job, candidate)
    return parameters.dense / dense + parameters.expert / expert


def _ranks(job: Job, candidate: Candidate) -> tuple[int, int]:
    """Ranks that share the state of dense parameters, and of experts."""
    return candidate.dp(job) * candidate.cp, candidate.expert_dp(job)


def muon_shares(
    parameters: Parameters, job: Job, candidate: Candidate, what: str = "elements"
) -> Iterator[tuple[int, float, float]]:
    """Where Muon updates matrices, of dense ones and of experts: the ranks that share them, an even
    share of their elements or flops, and the largest parameter's, which one rank has whole."""
    for expert, ranks in enumerate(_ranks(job, candidate) if job.optimizer == "muon" else ()):
        held = [getattr(one, what) for one in parameters.matrices if one.expert == expert]
        yield ranks, sum(held) / ranks, max(held, default=0.0)


def placeholder_bytes(parts: Iterable[Parameters]) -> float:
    """Of layers, the gradients without content that autograd is given in place of those that layers
    add to the main gradient themselves (`kernels.main_gradient`): Transformer Engine keeps one for
    every shape of a weight."""
    weights = {(one.expert, one.elements) for part in parts for one in part.matrices}
    return WEIGHT * sum(elements for _, elements in weights)


def padding_bytes(parameters: Parameters, job: Job, candidate: Candidate) -> float:
    """What Muon's whole parameters cost beyond even shares on the average pipeline rank of a model:
    state, and room in the buffers of weights and gradients for every rank's share."""
    shares = muon_shares(parameters, job, candidate)
    more = ((ranks, max(0.0, largest - even / candidate.pp)) for ranks, even, largest in shares)
    return sum(one * (4 + MOMENT + ranks * (WEIGHT + 4)) for ranks, one in more)


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
