"""The tower: patches in, one token of text for every merged block out.

Shapes: n patches of all images, h channels of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import DataError
from qwen35_mcore.mcore.imports import (
    MLP,
    AttnMaskType,
    IdentityOp,
    MegatronModule,
    MLPSubmodules,
    ModuleSpec,
    PackedSeqParams,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlock,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    apply_rotary_pos_emb,
    get_bias_dropout_add,
    get_mlp_module_spec_for_backend,
)
from qwen35_mcore.model.vision.grids import Grid, frame_lengths, position_taps, rotary_angles
from qwen35_mcore.model.vision.transformer_config import EPSILON, blocks_config, merger_config


class VisionModel(MegatronModule):
    """transformers' ``Qwen3_5VisionModel`` of Megatron's layers, each split by tensor parallelism.

    Args:
        config: of the language model; the tower's own are derived from it.
        spec_provider: what the language model's layers are made of, too.
    """

    def __init__(
        self,
        vision: VisionConfig,
        config: TransformerConfig,
        spec_provider: Any,
        pg_collection: Any,
    ) -> None:
        blocks = blocks_config(vision, config)
        super().__init__(config=blocks)
        self.vision = vision
        self.patch_embed = VisionPatchEmbed(vision, blocks)
        self.pos_embed = nn.Embedding(
            vision.num_position_embeddings, vision.hidden_size, **_placed(blocks)
        )
        self.decoder = TransformerBlock(
            config=blocks,
            spec=TransformerBlockSubmodules(
                layer_specs=[block_spec(spec_provider)] * vision.depth, layer_norm=None
            ),
            post_layer_norm=False,
            pg_collection=pg_collection,
        )
        self.merger = VisionPatchMerger(
            vision, merger_config(vision, config), spec_provider, pg_collection.tp
        )
        _initialize(self.pos_embed, blocks)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Patches ``[n, patch_values]``, normalised, to ``[n / merge size squared, text width]``.

        Raises:
            DataError: there are not as many patches as the grids say, or of another size.
        """
        shape = (sum(t * h * w for t, h, w in grids), self.vision.patch_values)
        if tuple(pixel_values.shape) != shape:
            raise DataError(
                "the images have other patches than their grids say",
                got=f"{tuple(pixel_values.shape)}",
                allowed=f"{shape}: patches, numbers in a patch",
                fix="let transformers' processor of this model make both",
            )
        device = self.pos_embed.weight.device
        indices, weights = (each.to(device) for each in position_taps(grids, self.vision))
        x = self.patch_embed(pixel_values.to(device))
        positions = (self.pos_embed(indices) * weights[:, :, None]).sum(1)
        x = self.decoder(
            hidden_states=(x + positions.to(x.dtype)).unsqueeze(1),  # n h -> n 1 h
            attention_mask=None,
            rotary_pos_emb=rotary_angles(grids, self.vision).to(device),
            packed_seq_params=_frames(grids, device),
        )
        return self.merger(x.squeeze(1))


class VisionPatchEmbed(nn.Module):
    """transformers' convolution over patches that do not overlap: a product with each patch."""

    def __init__(self, vision: VisionConfig, config: TransformerConfig) -> None:
        super().__init__()
        kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.proj = _PatchProduct(
            vision.in_channels, vision.hidden_size, kernel, stride=kernel, **_placed(config)
        )
        _initialize(self.proj, config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[n, patch_values]`` to ``[n, h]``."""
        return self.proj(pixel_values)


class _PatchProduct(nn.Conv3d):
    """Called as a module: where megatron overlaps the gathering of parameters, that waits for
    them."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        weight = self.weight.flatten(1)
        return F.linear(pixel_values.to(weight.dtype), weight, self.bias)


class VisionPatchMerger(MegatronModule):
    """A LayerNorm of each patch, then an MLP of the patches of a block together."""

    def __init__(
        self, vision: VisionConfig, config: TransformerConfig, spec_provider: Any, tp_group: Any
    ) -> None:
        super().__init__(config=config)
        self.norm = spec_provider.layer_norm()(
            config=config, hidden_size=vision.hidden_size, eps=EPSILON
        )
        self.mlp = MLP(
            config,
            MLPSubmodules(
                linear_fc1=spec_provider.column_parallel_linear(),
                linear_fc2=spec_provider.row_parallel_linear(),
            ),
            input_size=vision.merged_width,
            ffn_hidden_size=vision.merged_width,
            tp_group=tp_group,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, h]``, the patches of a block in a row, to ``[blocks, text width]``."""
        merged = self.norm(x).view(-1, 1, self.mlp.input_size)
        output, bias = self.mlp(merged)
        return (output + bias).squeeze(1)


class VisionAttention(SelfAttention):
    """Attention within each frame. Every patch has an angle of its own, so queries and keys rotate
    before megatron packs them: its packed rotation counts positions from each sequence's start, and
    asks the host for every length."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        self._angles = rotary_pos_emb
        return super().forward(*args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        query, key = (
            apply_rotary_pos_emb(x, self._angles, self.config, cp_group=self.pg_collection.cp)
            for x in (query, key)
        )
        return query, key, value


def block_spec(spec_provider: Any) -> ModuleSpec:
    """One block: attention and feed-forward, a LayerNorm fused into the first product of each."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=VisionAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=spec_provider.column_parallel_layer_norm_linear(),
                    core_attention=spec_provider.core_attention(),
                    linear_proj=spec_provider.row_parallel_linear(),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=get_mlp_module_spec_for_backend(spec_provider, num_experts=None),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _frames(grids: Sequence[Grid], device: torch.device) -> PackedSeqParams:
    lengths = frame_lengths(grids)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def _placed(config: TransformerConfig) -> dict[str, Any]:
    on_cpu = config.use_cpu_initialization
    device = "cpu" if on_cpu else torch.cuda.current_device()
    return {"dtype": config.params_dtype, "device": device}


def _initialize(module: nn.Conv3d | nn.Embedding, config: TransformerConfig) -> None:
    """Normal weights, equal on tensor-parallel ranks, which share the default generator's seed."""
    if not config.perform_initialization:
        return
    nn.init.normal_(module.weight, std=config.init_method_std)
    if isinstance(module, nn.Conv3d) and module.bias is not None:
        nn.init.zeros_(module.bias)
