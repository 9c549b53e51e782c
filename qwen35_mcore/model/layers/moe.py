"""megatron-core's MoE layer, without waiting for the host where nothing needs it.

megatron's all-to-all dispatcher copies the number of tokens per expert to the host in every layer,
because its experts split by it. Grouped experts read it on the device; only the all-to-all itself
needs sizes on the host, so a run without expert parallelism never waits. Without expert parallelism
the tokens also arrive sorted, and the second permutation would copy them to where they are.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.mcore.imports import (
    MoEAlltoAllTokenDispatcher,
    MoELayer,
    TransformerConfig,
    get_default_pg_collection,
)
from qwen35_mcore.model.layers.fixed_capacity import FixedCapacityDispatcher


class TokenDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all dispatcher that keeps the token counts on the device."""

    tokens_per_expert: Any

    @property
    def alone(self) -> bool:
        """Whether this rank holds every expert whole: no communication, no second permutation."""
        return self.ep_size * self.tp_size == 1 and not self.drop_and_pad

    def _maybe_update_cuda_sync_point(self, point: str) -> None:
        # counts are the only reason to wait at these points, and they stay on the device
        if self.alone and point in ("before_permutation_2", "before_finish"):
            return
        super()._maybe_update_cuda_sync_point(point)

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if not (self.alone and isinstance(self.num_out_tokens, int)):
            super()._maybe_dtoh_and_synchronize(point, None)
        return tokens_per_expert

    def dispatch_postprocess(self, tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        if not self.alone:
            return super().dispatch_postprocess(tokens, probs)
        counts, self.tokens_per_expert = self.tokens_per_expert, None
        return tokens, counts, probs

    def combine_preprocess(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens if self.alone else super().combine_preprocess(tokens)


class Qwen35MoELayer(MoELayer):
    """MoELayer whose dispatcher leaves the counts on the device, where the experts read them."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        dispatcher = self._dispatcher_class()
        if dispatcher is None:
            return
        self.token_dispatcher = dispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config=config,
            pg_collection=pg_collection,
        )
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)

    def _dispatcher_class(self) -> type | None:
        """Ours for the dispatcher that was asked for; None: megatron's, as for TEGroupedMLP, which
        splits by a list on the host."""
        if not getattr(self.experts, "reads_counts_on_device", False):
            return None
        asked = self.config.moe_token_dispatcher_type
        if asked == "flex" and self.config.moe_flex_dispatcher_backend == "ncclep":
            return FixedCapacityDispatcher
        return TokenDispatcher if asked == "alltoall" else None
