"""Routed experts as two stacked weights and grouped matrix multiplies.

Takes the place of megatron-core's TEGroupedMLP and SequentialMLP behind the same dispatchers, with
the same checkpoint: megatron's modules hold one weight per expert and start kernels per expert,
which at Qwen3.5's expert widths costs far more than the arithmetic.

Shapes: e local experts, t dispatched rows, h hidden, f expert width (per expert-tensor rank).
"""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.kernels.grouped_linear import grouped_linear
from qwen35_mcore.kernels.weighted_swiglu import weighted_swiglu
from qwen35_mcore.mcore.imports import (
    CheckpointWithoutOutput,
    MegatronModule,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    TransformerConfig,
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)


class GroupedExperts(MegatronModule):
    """SwiGLU experts of one expert-parallel rank: ``w2 (silu(gate) * up * probability)``.

    ``weight1`` is ``[e, 2 f, h]``, gate rows then up rows; ``weight2`` is ``[e, h, f]``. Expert
    tensor parallelism splits f; the dispatcher gathers and reduces around this module.

    Raises:
        ConfigError: FP4 or delayed weight gradients, which need Transformer Engine's experts.
    """

    reads_counts_on_device = True  # what layers/moe.py looks for

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: Any,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        for unsupported in ("fp4", "delay_wgrad_compute"):
            if getattr(config, unsupported):
                raise ConfigError(
                    f"grouped_mm experts do not support {unsupported}",
                    fix="choose Transformer Engine's: --moe-experts te",
                )
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // self.tp_group.size()
        self.weight1 = self._new_weight(2 * width, hidden, config.init_method, partition_dim=1)
        self.weight2 = self._new_weight(
            hidden, width, config.output_layer_init_method, partition_dim=2
        )
        self.recompute_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )

    def _new_weight(
        self, rows: int, columns: int, init_method: Any, partition_dim: int
    ) -> torch.nn.Parameter:
        config = self.config
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weight: Any = torch.nn.Parameter(
            torch.empty(
                self.num_local_experts, rows, columns, dtype=config.params_dtype, device=device
            )
        )
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                init_method(weight)
        weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = (
            True,
            partition_dim,
            1,
        )
        # false: reduced over the expert-data-parallel group instead of the data-parallel one
        weight.allreduce = not (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        return weight

    def forward(
        self, x_th: torch.Tensor, tokens_per_expert: torch.Tensor, probs_t: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """``[t, h]`` to ``[t, h]``, each row weighed by its probability; and no bias.

        Rows behind the last expert's are unused: not read, and undefined in the result.
        """
        ends = tokens_per_expert.to(x_th.device).cumsum(0, dtype=torch.int32)
        gate_up = self._linear(x_th, self.weight1, ends)
        if not self.recompute_activation:
            activated = weighted_swiglu(gate_up, probs_t, ends[-1:])
            return self._linear(activated, self.weight2, ends), None
        checkpoint = CheckpointWithoutOutput(fp8=None)
        activated = checkpoint.checkpoint(weighted_swiglu, gate_up, probs_t, ends[-1:])
        output = self._linear(activated, self.weight2, ends)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None

    def _linear(
        self, x: torch.Tensor, weight: torch.nn.Parameter, ends: torch.Tensor
    ) -> torch.Tensor:
        fuse = self.config.gradient_accumulation_fusion
        return grouped_linear(x, weight, ends, fuse_accumulation=fuse)

    def backward_dw(self) -> None:
        """Weight gradients come with the backward pass; there is nothing left to compute."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> dict[str, Any]:
        """megatron's keys: one shard per expert, and one per gate and up half of the first weight.

        Small shards let a run with another expert parallelism read only what it needs. Raises
        ValueError for offsets: layers have keys of their own.
        """
        if sharded_offsets:
            raise ValueError("layers are stored under keys of their own, got sharded_offsets")
        state: dict[str, Any] = {}
        for weight, linear in (("weight1", "linear_fc1"), ("weight2", "linear_fc2")):
            key = f"{prefix}experts.{linear}"
            build = self._build_fc1 if linear == "linear_fc1" else self._build_fc2
            state[f"{prefix}{weight}"] = ShardedTensorFactory(
                f"{key}.weight", getattr(self, weight), build, self._merge, self._replica_id()
            )
            state |= self._empty_extra_states(f"{prefix}{weight}", f"{key}._extra_state")
        return state

    def _replica_id(self) -> tuple[int, int, int]:
        return (0, 0, self.dp_group.rank())

    def _global_index(self, expert: int) -> tuple[int, int, int]:
        """Axis, place and number of an expert among all of them."""
        first = self.ep_group.rank() * self.num_local_experts
        return (0, first + expert, self.ep_group.size() * self.num_local_experts)

    @torch.no_grad()
    def _build_fc1(self, key: str, t: torch.Tensor, replica_id: Any, flattened: Any) -> list:
        ranks, rank = self.tp_group.size(), self.tp_group.rank()
        return [
            ShardedTensor.from_rank_offsets(
                key,
                half,
                self._global_index(expert),
                (1, rank + ranks * which, 2 * ranks),
                replica_id=replica_id,
                prepend_axis_num=1,
            )
            for expert in range(self.num_local_experts)
            for which, half in enumerate(t[expert].chunk(2))
        ]

    @torch.no_grad()
    def _build_fc2(self, key: str, t: torch.Tensor, replica_id: Any, flattened: Any) -> list:
        return [
            ShardedTensor.from_rank_offsets(
                key,
                t[expert],
                self._global_index(expert),
                (2, self.tp_group.rank(), self.tp_group.size()),
                replica_id=replica_id,
                prepend_axis_num=1,
            )
            for expert in range(self.num_local_experts)
        ]

    @torch.no_grad()
    def _merge(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        per_expert = len(pieces) // self.num_local_experts
        groups = (pieces[i : i + per_expert] for i in range(0, len(pieces), per_expert))
        return torch.stack([torch.cat(group) for group in groups])

    def _empty_extra_states(self, prefix: str, key: str) -> dict[str, Any]:
        """What TEGroupedLinear stores per expert, without content, so that it can load this."""
        states = {}
        for expert in range(self.num_local_experts):
            _, place, count = self._global_index(expert)
            replica_id = (0, self.tp_group.rank(), self.dp_group.rank())
            states[f"{prefix}._extra_state{expert}"] = ShardedObject(
                key, None, (count,), (place,), replica_id
            )
        return states

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in [n for n in state_dict if n.startswith(prefix) and "._extra_state" in n]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)
