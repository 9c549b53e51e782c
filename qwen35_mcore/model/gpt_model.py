"""GPTModel with corrections: YaRN on partial RoPE, MTP under context parallelism, and MTP with tied
embeddings under pipeline parallelism."""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.mcore.imports import (
    GPTModel,
    PackedSeqParams,
    YarnRotaryEmbedding,
    roll_tensor,
    scatter_to_sequence_parallel_region,
)
from qwen35_mcore.mcore.vocabulary_layers import vocabulary_layers
from qwen35_mcore.model.layers.vocabulary import OutputLayer, WordEmbedding


class Qwen35Model(GPTModel):
    """megatron's GPTModel with four corrections.

    YaRN: megatron computes frequencies for the whole head and rotates all of it, whatever the
    rotary percentage is. This class builds the embedding for the rotated part.

    MTP loss: the last position of a sequence has no token after next, so megatron scales up the
    weight of the others, by the counts of each rank. Only one of the context-parallel ranks loses a
    position, so gradients differ from a serial run (by 2 % at 64 tokens, 1e-3 at a few thousand),
    and a rank without a counted token drops the one that it looks ahead to. This class uses the
    counts of the whole sequence.

    Padding mask: pipeline stages after the first get their sequence-parallel part of it as well.

    Tied embeddings: the last of several pipeline stages holds a copy of the embedding for MTP and
    computes its logits from it. megatron also allocates an output weight there that nothing reads,
    and then refuses to save it. This class drops that weight.
    """

    word_embedding: type = WordEmbedding
    """What looks tokens up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with vocabulary_layers(OutputLayer, self.word_embedding):
            super().__init__(*args, **kwargs)
        if self.position_embedding_type == "yarn":
            self.rotary_pos_emb = self._partial_yarn()
        ties_to_mtp_embedding = self.mtp_process and not self.pre_process
        if self.post_process and ties_to_mtp_embedding and self.share_embeddings_and_output_weights:
            self.output_layer.weight = None

    def _partial_yarn(self) -> YarnRotaryEmbedding:
        config = self.config
        return YarnRotaryEmbedding(
            kv_channels=int(config.kv_channels * self.rotary_percent),
            rotary_base=self.rotary_base,
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

    def _preprocess(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._preprocess(*args, **kwargs)
        padding_mask = prepared[5]
        if self.pre_process or padding_mask is None or not self.config.sequence_parallel:
            return prepared
        by_sequence = padding_mask.transpose(0, 1).contiguous()  # b s -> s b
        here = scatter_to_sequence_parallel_region(by_sequence, group=self.pg_collection.tp)
        return (*prepared[:5], here.transpose(0, 1).contiguous(), *prepared[6:])

    def _postprocess(self, *args: Any, **kwargs: Any) -> Any:
        config, alone = self.config, self.pg_collection.cp.size() == 1
        if alone or not config.mtp_num_layers or kwargs["labels"] is None:
            return super()._postprocess(*args, **kwargs)
        scale, per_token = config.mtp_loss_scaling_factor, config.calculate_per_token_loss
        # megatron divides by this rank's count, which is all it does where losses are not per token
        config.calculate_per_token_loss = False
        config.mtp_loss_scaling_factor = scale * self._mtp_weight(
            kwargs["labels"], kwargs["loss_mask"], kwargs["packed_seq_params"], per_token
        )
        try:
            return super()._postprocess(*args, **kwargs)
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
