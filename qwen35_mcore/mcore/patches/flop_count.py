"""Operations of a step, for the throughput in megatron's log."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.training import training

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict

_step_flops: Callable[[float, float], float] | None = None


def count_by(step_flops: Callable[[float, float], float]) -> None:
    """Set what counts.

    Args:
        step_flops: operations of a step, from its tokens and the sum of its squared sequence
            lengths.
    """
    global _step_flops
    _step_flops = step_flops


def _counting_by_us(original: Any) -> Any:
    def num_floating_point_operations(
        args: Any,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        assert _step_flops is not None, "count_by comes before training"
        tokens = total_real_tokens_in_batch or batch_size * args.seq_length
        return _step_flops(tokens, seqlen_squared_sum_in_batch or tokens * args.seq_length)

    return num_floating_point_operations


class _Arguments(Namespace):
    """Megatron's arguments; what is not set is None."""

    def __getattr__(self, name: str) -> None:
        return None


def _probe() -> Verdict:
    """Can megatron count a list of layer kinds with an MTP layer?"""
    sizes = ("hidden_size", "ffn_hidden_size", "kv_channels", "seq_length", "padded_vocab_size")
    gdn = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads", "conv_kernel_dim")
    heads = ("num_attention_heads", "num_query_groups")
    args = _Arguments(
        **dict.fromkeys((*sizes, *(f"linear_{name}" for name in gdn), *heads), 4),
        num_layers=4,
        mtp_num_layers=1,
        moe_layer_freq=1,
        group_query_attention=True,
        swiglu=True,
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=[1, 1, 1, 0],
    )
    try:
        training.num_floating_point_operations(args, 1)
    except AssertionError:
        return Verdict.FAULT
    return Verdict.NO_FAULT


PATCH = Patch(
    name="operations of a step",
    target="megatron.training.training:num_floating_point_operations",
    why="megatron's count raises for a list of layer kinds with MTP, and takes the MTP layer for a "
    "GatedDeltaNet otherwise",
    replace=_counting_by_us,
    probe=_probe,
)
