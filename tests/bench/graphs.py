"""CUDA graphs of benchmarked decoder layers: a whole step, or Megatron's own graphs of parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.tensor_parallel.random import get_all_rng_states
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper, set_current_microbatch

from tests.bench.common import peak_gib

PARTS = {
    "cuda_graph_impl": "transformer_engine",
    "cuda_graph_modules": ["attn", "moe_router", "moe_preprocess"],
}


def first_steps(step: Callable[[], Any]) -> tuple[torch.cuda.Stream, float]:
    """Eager steps where a capture may follow: not on the default stream, which autograd's nodes
    would remember as the place to add up gradients, and which no capture may wait for.

    Returns:
        The stream, and the peak memory of a step, GiB.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        peak = peak_gib(step)
    torch.cuda.current_stream().wait_stream(stream)
    return stream, peak


def whole(step: Callable[[], Any], stream: torch.cuda.Stream) -> Callable[[], None]:
    """The step as one CUDA graph: its time without what the host needs to launch it.

    What `--cuda-graph-impl full_iteration` does; nothing in the step may wait for the host.

    Args:
        stream: of `first_steps`.
    """
    graph = torch.cuda.CUDAGraph()
    for state in get_all_rng_states().values():  # routing forced to balance is drawn from them
        graph.register_generator_state(state)
    with torch.cuda.graph(graph, stream=stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


class _Model(torch.nn.Module):
    """What Megatron's helper asks of a model, around a TransformerBlock."""

    position_embedding_type = "rope"

    def __init__(self, block: torch.nn.Module, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.decoder, self.rotary_pos_emb = block, rotary

    def zero_grad_buffer(self) -> None:
        """Megatron's DDP has one; here gradients are the parameters' own."""


def parts(block: Any, rotary: torch.nn.Module, length: int, batch: int) -> None:
    """Capture attention or GDN, router and preprocessing of each layer, as Megatron's training
    does with `--cuda-graph-impl transformer_engine`; the block replays them from then on.

    Args:
        block: TransformerBlock whose config has `PARTS`, after `first_steps`.
        rotary: the RotaryEmbedding that makes its `rotary_pos_emb`.
    """
    init_num_microbatches_calculator(
        rank=0, global_batch_size=batch, micro_batch_size=batch, data_parallel_size=1
    )
    model = _Model(block, rotary)
    helper = TECudaGraphHelper([model], block.config, length, batch)
    helper.create_cudagraphs()
    destroy_num_microbatches_calculator()
    set_current_microbatch(model, 0)
