"""The rows of the vision tower, for runs that train it."""

from __future__ import annotations

from checkpoint_tools.table.row import Row, TensorSpec, same
from checkpoint_tools.table.transforms import Shape, query_key_value
from qwen35_mcore.config.vision import VisionConfig

VISION_PREFIX = "model.visual."
MCORE_VISION_PREFIX = "vision_model."


def vision_rows(c: VisionConfig) -> list[Row]:
    """Patch embedding, learned positions, blocks, merger."""
    hf, mcore = VISION_PREFIX, MCORE_VISION_PREFIX
    kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
    patch, merged, out = (c.hidden_size, c.in_channels, *kernel), c.merged_width, c.out_hidden_size
    table = [
        same(f"{hf}patch_embed.proj.weight", f"{mcore}patch_embed.proj.weight", patch),
        same(f"{hf}patch_embed.proj.bias", f"{mcore}patch_embed.proj.bias", (c.hidden_size,)),
        same(
            f"{hf}pos_embed.weight",
            f"{mcore}pos_embed.weight",
            (c.num_position_embeddings, c.hidden_size),
        ),
    ]
    for block in range(c.depth):
        table += _block_rows(c, f"{hf}blocks.{block}.", f"{mcore}decoder.layers.{block}.")
    hf, mcore = f"{hf}merger.", f"{mcore}merger."
    return [
        *table,
        *_pair(f"{hf}norm", f"{mcore}norm.", (c.hidden_size,), None),
        *_pair(f"{hf}linear_fc1", f"{mcore}mlp.linear_fc1.", (merged, merged), 0),
        *_pair(f"{hf}linear_fc2", f"{mcore}mlp.linear_fc2.", (out, merged), 1),
    ]


def _block_rows(c: VisionConfig, hf: str, mcore: str) -> list[Row]:
    h, ffn = c.hidden_size, c.intermediate_size
    attention, mlp = f"{mcore}self_attention.", f"{mcore}mlp."
    return [
        *_pair(f"{hf}norm1", f"{attention}linear_qkv.layer_norm_", (h,), None),
        _query_key_value(c, f"{hf}attn.qkv.weight", f"{attention}linear_qkv.weight", (h,)),
        _query_key_value(c, f"{hf}attn.qkv.bias", f"{attention}linear_qkv.bias", ()),
        *_pair(f"{hf}attn.proj", f"{attention}linear_proj.", (h, h), 1),
        *_pair(f"{hf}norm2", f"{mlp}linear_fc1.layer_norm_", (h,), None),
        *_pair(f"{hf}mlp.linear_fc1", f"{mlp}linear_fc1.", (ffn, h), 0),
        *_pair(f"{hf}mlp.linear_fc2", f"{mlp}linear_fc2.", (h, ffn), 1),
    ]


def _pair(hf: str, mcore: str, shape: Shape, tp_axis: int | None) -> list[Row]:
    """A weight, and its bias: split where the weight's rows are."""
    bias_axis = 0 if tp_axis == 0 else None
    return [
        same(f"{hf}.weight", f"{mcore}weight", shape, tp_axis=tp_axis),
        same(f"{hf}.bias", f"{mcore}bias", shape[:1], tp_axis=bias_axis),
    ]


def _query_key_value(c: VisionConfig, hf: str, mcore: str, tail: Shape) -> Row:
    shape = (3 * c.hidden_size, *tail)
    return Row(
        hf=(TensorSpec(hf, shape),),
        mcore=(TensorSpec(mcore, shape),),
        how="per head: the query, the key, the value",
        copies=query_key_value(c.num_heads, c.head_dim, tail),
        tp_axis=0,
    )
