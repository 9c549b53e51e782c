"""Logits, router weights and shared-expert outputs of one forward pass, on both sides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.training import Layout


@dataclass
class Trace:
    """``logits [b, s, vocab]``; per MoE layer, tokens in batch-major order: router weights
    ``[tokens, experts]`` (zero where not chosen) and the gated shared expert ``[tokens, hidden]``.
    """

    logits: torch.Tensor
    router: list[torch.Tensor] = field(default_factory=list)
    shared: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of_reference(cls, model: Any, tokens: torch.Tensor) -> Trace:
        """Transformers' model."""
        router: list[torch.Tensor] = []
        gates: list[torch.Tensor] = []
        experts: list[torch.Tensor] = []
        hooks = []
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                hooks.append(module.register_forward_hook(_collect_router(router)))
            elif name.endswith("mlp.shared_expert_gate"):
                hooks.append(module.register_forward_hook(_collect(gates)))
            elif name.endswith("mlp.shared_expert"):
                hooks.append(module.register_forward_hook(_collect(experts)))
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        shared = [
            (gate.sigmoid() * expert).flatten(0, -2)
            for gate, expert in zip(gates, experts, strict=True)
        ]
        return cls(logits, router, shared)


def _collect(into: list[torch.Tensor]) -> Any:
    return lambda module, args, output: into.append(output.detach())


def _collect_router(into: list[torch.Tensor]) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        logits, weights, chosen = output
        into.append(torch.zeros_like(logits).scatter(1, chosen, weights))

    return hook


def trace_forward(
    config: Qwen35Config,
    layout: Layout,
    weights: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    packed: list[int] | None = None,
) -> Trace:
    """Our model, in a pool worker; ``packed`` are cumulative lengths of sequences in one row."""
    from tests.helpers.shards import load_global
    from tests.helpers.training import build_chunks, config_for, initialize

    initialize(layout)
    [model] = build_chunks(config, config_for(config, layout), layout)
    load_global([model], weights)
    router: list[torch.Tensor] = []
    shared: list[torch.Tensor] = []
    for name, module in model.decoder.named_modules():
        if name.endswith("mlp.router"):
            module.register_forward_hook(lambda m, a, output: router.append(output[0].detach()))
        elif name.endswith("mlp.shared_experts"):
            module.register_forward_hook(_collect(shared))
    position_ids = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    with torch.no_grad():
        logits = model(tokens, position_ids, None, packed_seq_params=packed_sequence(packed))
    batch = tokens.shape[0]
    return Trace(
        logits,
        [_batch_major(x, batch) for x in router],
        [_batch_major(x.flatten(0, -2), batch) for x in shared],
    )


def packed_sequence(cu_seqlens: list[int] | None) -> Any:
    """megatron's description of documents in one row, by their bounds; None without."""
    if cu_seqlens is None:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = torch.tensor(cu_seqlens, dtype=torch.int32)
    longest = int(lengths.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _batch_major(x: torch.Tensor, batch: int) -> torch.Tensor:
    """Megatron flattens ``[s, b]``, transformers ``[b, s]``."""
    return x.unflatten(0, (-1, batch)).transpose(0, 1).flatten(0, 1)
