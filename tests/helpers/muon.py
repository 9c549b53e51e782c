"""Steps of Muon at any layout on given gradients, and the same steps in a few plain lines."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.training.training import wrap_model_chunks_with_ddp

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.mcore.muon import holds_matrices
from qwen35_mcore.mcore.patches.muon_matrices import PATCHES
from tests.helpers.shards import Shard, load_global, local_shards
from tests.helpers.training import Layout, build_chunks, config_for, initialize

SETTINGS: dict[str, Any] = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "muon_momentum": 0.9,
    "muon_nesterov": True,
    "muon_fp32_matmul_prec": "high",
    "muon_tp_mode": "duplicated",
}
"""Fields of megatron's OptimizerConfig."""
Tensors = dict[str, torch.Tensor]


def steps(
    model_config: Qwen35Config,
    layout: Layout,
    weights: Tensors,
    gradients: list[Tensors],
    **settings: Any,
) -> list[Shard]:
    """This rank's parameters after a step on each of the (global) gradients.

    Of matrices in a bf16 run, the float32 values that the rank keeps; other ranks keep the others.
    """
    for patch in PATCHES:
        patch.apply()
    initialize(layout)
    config = config_for(model_config, layout)
    chunks = build_chunks(model_config, config, layout)
    load_global(chunks, weights)
    _, optimizer = _wrap(chunks, config, layout, settings)
    for gradient in gradients:
        optimizer.zero_grad()
        with _data([(p, p.main_grad) for chunk in chunks for p in chunk.parameters()]):
            load_global(chunks, gradient)
        optimizer.step()
    return _parameters(chunks)


def _wrap(
    chunks: list[torch.nn.Module], config: Any, layout: Layout, settings: dict[str, Any]
) -> tuple[list[Any], Any]:
    from megatron.core.distributed import DistributedDataParallelConfig

    bf16, sharded = layout.dtype == torch.bfloat16, layout.distributed_optimizer
    wrapped = wrap_model_chunks_with_ddp(
        [Float16Module(config, chunk) for chunk in chunks] if bf16 else chunks,
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        use_layer_wise_distributed_optimizer=sharded,
    )
    optimizer_config = OptimizerConfig(
        optimizer="muon",
        bf16=bf16,
        params_dtype=layout.dtype,
        use_layer_wise_distributed_optimizer=sharded,
        **SETTINGS | settings,
    )
    return wrapped, get_megatron_optimizer(optimizer_config, wrapped)


class _data:  # noqa: N801
    """Parameters with other tensors in them for a while."""

    def __init__(self, pairs: list[tuple[Any, torch.Tensor]]) -> None:
        self.pairs = pairs

    def __enter__(self) -> None:
        self.own = [p.data for p, _ in self.pairs]
        for p, data in self.pairs:
            p.data = data

    def __exit__(self, *exc: object) -> None:
        for (p, _), own in zip(self.pairs, self.own, strict=True):
            p.data = own


def _parameters(chunks: list[torch.nn.Module]) -> list[Shard]:
    kept = []
    for p in (p for chunk in chunks for p in chunk.parameters()):
        if p.dtype == torch.bfloat16 and holds_matrices(p):
            kept.append((p, getattr(p, "main_param", torch.full(p.shape, torch.nan))))
    with _data(kept):
        shards = [
            Shard(s.key, s.global_shape, s.offset, s.data.float()) for s in local_shards(chunks)
        ]
    return [shard for shard in shards if not shard.data.isnan().any()]


# The reference: float64, by the keys and layouts of a checkpoint.

MATRICES = re.compile(
    r"in_proj\.weight\.(query|key|value|z)$|(out_proj|linear_proj|linear_qkv|eh_proj|linear_fc\d)"
    r"\.weight$"
)
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@torch.no_grad()
def reference(model_config: Qwen35Config, weights: Tensors, gradients: list[Tensors]) -> Tensors:
    """The parameters after a step on each of the gradients."""
    p = {key: value.double() for key, value in weights.items()}
    first = {key: torch.zeros_like(value) for key, value in p.items()}
    second = {key: torch.zeros_like(value) for key, value in p.items()}
    lr, decay, beta = SETTINGS["lr"], SETTINGS["weight_decay"], SETTINGS["muon_momentum"]
    for step, given in enumerate(gradients, start=1):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in given.values()))
        for key, g in ((key, g.double() / max(1.0, norm)) for key, g in given.items()):
            p[key] *= 1 - lr * decay
            if MATRICES.search(key):
                first[key].lerp_(g, 1 - beta)
                g = g.lerp(first[key], beta)  # Nesterov
                for part, update in _matrices(model_config, key, p[key], g):
                    part -= lr * orthogonal(update)
                continue
            first[key].lerp_(g, 0.1)
            second[key].lerp_(g.square(), 0.001)
            size = (second[key] / (1 - 0.999**step)).sqrt() + 1e-8
            p[key] -= lr * first[key] / (1 - 0.9**step) / size
    return p


def _matrices(model_config: Qwen35Config, key: str, *tensors: torch.Tensor) -> Any:
    """Views on single matrices of each tensor, matrix by matrix."""
    if tensors[0].dim() == 3:
        for expert in zip(*tensors, strict=True):
            yield from _matrices(model_config, key, *expert)
    elif "linear_fc1" in key:
        yield from zip(*(t.chunk(2) for t in tensors), strict=True)
    elif "linear_qkv" in key:
        head, groups = model_config.head_dim, model_config.num_key_value_heads
        queries = model_config.num_attention_heads // groups * head
        rows = (queries, queries, head, head)
        yield from zip(
            *(t.view(groups, -1, t.shape[-1]).split(rows, dim=1) for t in tensors), strict=True
        )
    else:
        yield tensors


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps of a matrix ``[(groups,) rows, columns]``, scaled by its shape."""
    matrix = x.reshape(-1, x.shape[-1])
    y = matrix / matrix.norm()
    for a, b, c in QUINTIC:
        square = y @ y.T
        y = a * y + (b * square + c * square @ square) @ y
    return (y * math.sqrt(max(matrix.shape))).view_as(x)
