"""The model on megatron's HybridModel, where a token mixer and a feed-forward are layers apart.

Half a layer of the model is a layer of HybridModel's. It bears the number of the whole layer, so
that logs, FP8 contexts and checkpoints know one numbering; `Qwen35HybridModel.sharded_state_dict`
gives the checkpoint keys of GPTModel.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch

from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.mcore.imports import (
    HybridModel,
    HybridStack,
    HybridStackSubmodules,
    IdentityOp,
    ModuleSpec,
    PackedSeqParams,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    apply_prefix_mapping,
)
from qwen35_mcore.mcore.vocabulary_layers import vocabulary_layers
from qwen35_mcore.model.corrections import Corrections
from qwen35_mcore.model.layers.vocabulary import OutputLayer, WordEmbedding
from qwen35_mcore.model.specs import (
    feed_forward_modules,
    layers_of_stages,
    mixer_modules,
    mtp_block_spec,
)
from qwen35_mcore.parallel.hybrid_pattern import write_hybrid_pattern


class HalfLayer(TransformerLayer):
    """A token mixer or a feed-forward, with its norm and its residual connection."""

    def __init__(
        self, config: TransformerConfig, submodules: Any, layer_number: int = 1, **kwargs: Any
    ) -> None:
        """``layer_number`` counts halves from 1; the attribute counts whole layers."""
        super().__init__(config, submodules, layer_number=(layer_number + 1) // 2, **kwargs)
        if isinstance(self.mlp, IdentityOp):
            self.recompute_mlp = False


class Decoder(HybridStack):
    """HybridStack with the final norm of the spec provider; megatron's is Transformer Engine's."""

    def __init__(
        self, config: TransformerConfig, submodules: Any, *, final_norm: type, **kwargs: Any
    ):
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        if self.post_process:
            self.post_layer_norm = True
            self.final_norm = final_norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        if config.recompute_num_layers:  # counts the layers of this stack, which are halves
            self.config = copy.copy(config)
            self.config.recompute_num_layers *= 2


def hybrid_stack_spec(
    config: TransformerConfig, spec_provider: Any, vp_stage: int | None = None
) -> ModuleSpec:
    """What each symbol of the pattern is built from, and the MTP block (None on stages without)."""
    feed_forward = _half(**feed_forward_modules(config, spec_provider))
    return ModuleSpec(
        module=Decoder,
        params={"final_norm": spec_provider.layer_norm(rms_norm=True)},
        submodules=HybridStackSubmodules(
            gdn_layer=_half(**mixer_modules(LayerKind.GDN, spec_provider)),
            attention_layer=_half(**mixer_modules(LayerKind.ATTENTION, spec_provider)),
            moe_layer=feed_forward,
            mlp_layer=feed_forward,
            mtp_block_spec=mtp_block_spec(config, spec_provider, vp_stage),
        ),
    )


def _half(**modules: Any) -> ModuleSpec:
    return ModuleSpec(module=HalfLayer, submodules=TransformerLayerSubmodules(**modules))


class Qwen35HybridModel(Corrections, HybridModel):
    """megatron's HybridModel, corrected as `Corrections` says, with the checkpoint of GPTModel.

    It also gives the padding mask to the MTP layers, which megatron's keeps from them.

    Args:
        hybrid_layer_pattern: of this model, with a ``|`` behind each virtual pipeline stage but the
            last; None: whole layers, as the configuration shares them out.
        rotary_percent, rotary_base, others: as of HybridModel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hybrid_stack_spec: ModuleSpec,
        *,
        model_config: Qwen35Config,
        hybrid_layer_pattern: str | None,
        rotary_percent: float,
        rotary_base: float,
        **kwargs: Any,
    ) -> None:
        if hybrid_layer_pattern is None:
            hybrid_layer_pattern = write_hybrid_pattern(model_config, layers_of_stages(config))
        # the pattern says it, and megatron refuses to be told twice
        config = copy.copy(config)
        config.num_layers_in_first_pipeline_stage = None
        config.num_layers_in_last_pipeline_stage = None
        with vocabulary_layers(OutputLayer, WordEmbedding):
            super().__init__(
                config,
                hybrid_stack_spec,
                hybrid_layer_pattern=hybrid_layer_pattern,
                rotary_percent=rotary_percent,
                rotary_base=rotary_base,
                **kwargs,
            )
        self._correct_modules(rotary_percent, rotary_base)

    def forward(
        self,
        *args: Any,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        padding_mask = self._own_part(padding_mask)
        with contextlib.ExitStack() as until_the_loss:
            if self.mtp_process:
                weights = self._mtp_weights(labels, loss_mask, packed_seq_params)
                mask_comes_in = self.mtp.register_forward_pre_hook(
                    lambda _, args, kwargs: (args, kwargs | {"padding_mask": padding_mask}),
                    with_kwargs=True,
                )
                # the MTP loss is what megatron computes between the MTP block and the logits
                loss_follows = self.mtp.register_forward_hook(
                    lambda *_: until_the_loss.enter_context(weights)
                )
                until_the_loss.callback(mask_comes_in.remove)
                until_the_loss.callback(loss_follows.remove)
            return super().forward(
                *args,
                labels=labels,
                loss_mask=loss_mask,
                packed_seq_params=packed_seq_params,
                padding_mask=padding_mask,
                **kwargs,
            )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> Any:
        """GPTModel's, key by key: a half is saved under the number of its layer."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)
        final_norm = {f"{prefix}decoder.final_norm.": f"{prefix}decoder.final_layernorm."}
        apply_prefix_mapping(state, final_norm)
        return state
