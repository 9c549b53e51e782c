"""What is corrected of megatron's language models, whichever of them assembles the layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from qwen35_mcore.mcore.imports import (
    PackedSeqParams,
    YarnRotaryEmbedding,
    roll_tensor,
    scatter_to_sequence_parallel_region,
)


class Corrections:
    """Four corrections for a subclass of megatron's GPTModel or HybridModel.

    YaRN: megatron computes frequencies for the whole head and rotates all of it, whatever the
    rotary percentage is. This class builds the embedding for the rotated part.

    MTP loss: the last position of a sequence has no token after next, so megatron scales up the
    weight of the others, by the counts of each rank. Only one of the context-parallel ranks loses a
    position, so gradients differ from a serial run (by 2 % at 64 tokens, 1e-3 at a few thousand),
    and a rank without a counted token drops the one that it looks ahead to. This class uses the
    counts of the whole sequence.

    Padding mask: a pipeline stage gets its sequence-parallel part of it, whichever stage it is.

    Tied embeddings: the last of several pipeline stages holds a copy of the embedding for MTP and
    computes its logits from it. megatron also allocates an output weight there that nothing reads,
    and then refuses to save it. This class drops that weight.
    """

    config: Any
    pg_collection: Any
    output_layer: Any
    rotary_pos_emb: Any
    mtp_process: bool
    pre_process: bool
    post_process: bool
    position_embedding_type: str
    share_embeddings_and_output_weights: bool

    def _correct_modules(self, rotary_percent: float, rotary_base: float) -> None:
        """Replace what megatron built wrongly, at the end of the constructor."""
        if self.position_embedding_type == "yarn":
            self.rotary_pos_emb = self._partial_yarn(rotary_percent, rotary_base)
        ties_to_mtp_embedding = self.mtp_process and not self.pre_process
        if self.post_process and ties_to_mtp_embedding and self.share_embeddings_and_output_weights:
            self.output_layer.weight = None

    def _partial_yarn(self, rotary_percent: float, rotary_base: float) -> YarnRotaryEmbedding:
        config = self.config
        return YarnRotaryEmbedding(
            kv_channels=int(config.kv_channels * rotary_percent),
            rotary_base=rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            scaling_factor=config.yarn_rotary_scaling_factor,
            original_max_position_embeddings=config.yarn_original_max_position_embeddings,
            beta_fast=config.yarn_beta_fast,
            beta_slow=config.yarn_beta_slow,
            mscale=config.yarn_mscale,
            mscale_all_dim=config.yarn_mscale_all_dim,
            correction_range_round_to_int=config.yarn_correction_range_round_to_int,
            cp_group=self.pg_collection.cp,
        )

    def _own_part(self, padding_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Of a mask ``[b, s]``, the positions of this sequence-parallel rank."""
        if padding_mask is None or not self.config.sequence_parallel:
            return padding_mask
        by_sequence = padding_mask.transpose(0, 1).contiguous()  # b s -> s b
        here = scatter_to_sequence_parallel_region(by_sequence, group=self.pg_collection.tp)
        return here.transpose(0, 1).contiguous()

    @contextlib.contextmanager
    def _mtp_weights(
        self,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed: PackedSeqParams | None,
    ) -> Iterator[None]:
        """While megatron computes the MTP loss: weigh its positions by the whole sequence."""
        config, alone = self.config, self.pg_collection.cp.size() == 1
        if alone or not config.mtp_num_layers or labels is None:
            yield
            return
        scale, per_token = config.mtp_loss_scaling_factor, config.calculate_per_token_loss
        # megatron divides by this rank's count, which is all it does where losses are not per token
        config.calculate_per_token_loss = False
        config.mtp_loss_scaling_factor = scale * self._mtp_weight(
            labels, loss_mask, packed, per_token
        )
        try:
            yield
        finally:
            config.mtp_loss_scaling_factor = scale
            config.calculate_per_token_loss = per_token

    def _mtp_weight(
        self,
        labels: torch.Tensor,
        loss_mask: torch.Tensor | None,
        packed: PackedSeqParams | None,
        per_token: bool,
    ) -> torch.Tensor:
        """The weight of a counted position of the whole sequence, times this rank's count.

        A sequence of n counted tokens, m of them with a token after next, weighs each of the m by
        n / m where losses are per token, else by 1 / m; gradients are averaged over ranks then.
        """
        if loss_mask is None:
            loss_mask = torch.ones_like(labels)
        cp_group = self.pg_collection.cp
        _, rolled_count = roll_tensor(
            loss_mask, shifts=-1, dims=-1, cp_group=cp_group, packed_seq_params=packed
        )
        total = torch.stack([loss_mask.sum(), rolled_count]).float()
        here = total[1].clamp(min=1)
        torch.distributed.all_reduce(total, group=cp_group)
        return here * (total[0] if per_token else cp_group.size()) / total[1].clamp(min=1)
