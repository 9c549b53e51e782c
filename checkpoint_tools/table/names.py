"""The table: which Hugging Face tensors are which Megatron tensors, and how one becomes the other.

Each row is a closed group (its tensors appear in no other row) and invertible. Adding a tensor to
the model is adding a row; every command works from the rows alone. Megatron names are checkpoint
keys, shapes are global: no parallel layout appears in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from checkpoint_tools.table.row import Row, TensorSpec, same
from checkpoint_tools.table.transforms import (
    Shape,
    cut,
    join,
    packed_experts,
    query_gate_key_value,
    separate_experts,
)
from checkpoint_tools.table.vision import MCORE_VISION_PREFIX, VISION_PREFIX, vision_rows
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import CheckpointError

NESTED_PREFIX = "model.language_model."
FLAT_PREFIX = "model."
MTP_PREFIX = "mtp."
HEAD = "lm_head.weight"

Experts = Literal["packed", "per_expert"]
Format = Literal["qwen35", "mcore"]
"""qwen35: the GDN output norm as in Hugging Face. mcore: megatron-core's own, zero-centred."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How one Hugging Face checkpoint names and groups what the config leaves open."""

    prefix: str
    experts: Experts = "packed"
    mtp_experts: Experts = "packed"
    mtp: bool = True

    @classmethod
    def detect(cls, config: Qwen35Config, names: Mapping[str, object]) -> Naming:
        """Read it from tensor names (any mapping whose keys are the names)."""
        nested = any(name.startswith(NESTED_PREFIX) for name in names)
        prefix = NESTED_PREFIX if nested else FLAT_PREFIX
        return cls(
            prefix=prefix,
            experts=_experts_of(names, f"{prefix}layers."),
            mtp_experts=_experts_of(names, f"{MTP_PREFIX}layers."),
            mtp=any(name.startswith(MTP_PREFIX) for name in names),
        )

    @classmethod
    def default(cls, config: Qwen35Config, experts: Experts | None = None) -> Naming:
        """That of the published checkpoints of this config's family, or with experts as given."""
        experts = experts or config.family.experts
        return cls(
            prefix=NESTED_PREFIX if config.is_vision_language else FLAT_PREFIX,
            experts=experts,
            mtp_experts=experts,
            mtp=bool(config.mtp_num_hidden_layers),
        )


def _experts_of(names: Mapping[str, object], prefix: str) -> Experts:
    separate = any(
        name.startswith(prefix) and ".mlp.experts." in name and name.endswith("_proj.weight")
        for name in names
    )
    return "per_expert" if separate else "packed"


def rows(
    config: Qwen35Config,
    naming: Naming,
    checkpoint_format: Format = "qwen35",
    *,
    vision: bool = False,
) -> list[Row]:
    """All rows of a model, in the order in which the model computes; the vision tower's with
    ``vision``, for a run that trains it."""
    hidden = (config.vocab_size, config.hidden_size)
    top = naming.prefix
    table = vision_rows(VisionConfig.of(config)) if vision else []
    table += [
        same(f"{top}embed_tokens.weight", "embedding.word_embeddings.weight", hidden, tp_axis=0)
    ]
    for layer in range(config.num_hidden_layers):
        hf, mcore = f"{top}layers.{layer}.", f"decoder.layers.{layer}."
        if config.is_gdn(layer):
            table += _gdn_rows(config, hf, f"{mcore}self_attention.", checkpoint_format)
        else:
            table += _attention_rows(config, hf, f"{mcore}self_attention.")
        table += _mlp_rows(config, hf, mcore, naming.experts)
    table += [same(f"{top}norm.weight", "decoder.final_layernorm.weight", (config.hidden_size,))]
    if naming.mtp:
        table += _mtp_rows(config, naming.mtp_experts)
    if not config.tie_word_embeddings:
        table += [same(HEAD, "output_layer.weight", hidden, tp_axis=0)]
    return table


def _gdn_rows(c: Qwen35Config, hf: str, mcore: str, checkpoint_format: Format) -> list[Row]:
    value, heads, h = c.gdn_shape.value_width, c.linear_num_value_heads, c.hidden_size
    native = checkpoint_format == "mcore"
    norm_key = "out_norm.weight" if native else "gated_norm.weight"
    att, taps = f"{hf}linear_attn.", (1, c.linear_conv_kernel_dim)
    projections = _GDN_PROJECTIONS[c.family.gdn_projections]
    return [
        same(f"{hf}input_layernorm.weight", f"{mcore}in_proj.layer_norm_weight", (h,)),
        *projections(c, f"{att}in_proj_", f"{mcore}in_proj.weight."),
        _cut(f"{att}conv1d.weight", f"{mcore}conv1d.weight.", _mixed(c), taps),
        same(f"{att}A_log", f"{mcore}A_log", (heads,), tp_axis=0, float32=True),
        same(f"{att}dt_bias", f"{mcore}dt_bias", (heads,), tp_axis=0, float32=True),
        same(
            f"{att}norm.weight",
            f"{mcore}{norm_key}",
            (c.linear_value_head_dim,),
            float32=True,
            zero_centred=native,
        ),
        same(f"{att}out_proj.weight", f"{mcore}out_proj.weight", (h, value), tp_axis=1),
    ]


def _mixed(c: Qwen35Config) -> dict[str, int]:
    """Channels that the convolution mixes, by part."""
    return dict(zip(("query", "key", "value"), c.gdn_shape.qkv_widths, strict=True))


def _projections_by_part(c: Qwen35Config, hf: str, mcore: str) -> list[Row]:
    value, heads, h = c.gdn_shape.value_width, c.linear_num_value_heads, c.hidden_size
    return [
        _cut(f"{hf}qkv.weight", mcore, _mixed(c), (h,)),
        same(f"{hf}z.weight", f"{mcore}z", (value, h), tp_axis=0),
        same(f"{hf}b.weight", f"{mcore}beta", (heads, h), tp_axis=0),
        same(f"{hf}a.weight", f"{mcore}alpha", (heads, h), tp_axis=0),
    ]


def _projections_by_key_head(c: Qwen35Config, hf: str, mcore: str) -> list[Row]:
    wide = _mixed(c) | {"z": c.gdn_shape.value_width}
    narrow = dict.fromkeys(("beta", "alpha"), c.linear_num_value_heads)
    return [
        _cut(f"{hf}{name}.weight", mcore, parts, (c.hidden_size,), c.linear_num_key_heads)
        for name, parts in (("qkvz", wide), ("ba", narrow))
    ]


_GDN_PROJECTIONS = {"by_part": _projections_by_part, "by_key_head": _projections_by_key_head}


def _attention_rows(c: Qwen35Config, hf: str, mcore: str) -> list[Row]:
    heads, groups, dim, h = (
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.hidden_size,
    )
    att = f"{hf}self_attn."
    fused = Row(
        hf=(
            TensorSpec(f"{att}q_proj.weight", (heads * 2 * dim, h)),
            TensorSpec(f"{att}k_proj.weight", (groups * dim, h)),
            TensorSpec(f"{att}v_proj.weight", (groups * dim, h)),
        ),
        mcore=(TensorSpec(f"{mcore}linear_qkv.weight", ((2 * heads + 2 * groups) * dim, h)),),
        how="per key/value head: its queries, their gates, the key, the value",
        copies=query_gate_key_value(groups, heads // groups, dim, h),
        tp_axis=0,
    )
    return [
        same(f"{hf}input_layernorm.weight", f"{mcore}linear_qkv.layer_norm_weight", (h,)),
        fused,
        same(f"{att}q_norm.weight", f"{mcore}q_layernorm.weight", (dim,)),
        same(f"{att}k_norm.weight", f"{mcore}k_layernorm.weight", (dim,)),
        same(f"{att}o_proj.weight", f"{mcore}linear_proj.weight", (h, heads * dim), tp_axis=1),
    ]


def _mlp_rows(c: Qwen35Config, hf: str, mcore: str, experts: Experts) -> list[Row]:
    norm, h = f"{hf}post_attention_layernorm.weight", c.hidden_size
    mlp = f"{mcore}mlp."
    if not c.is_moe:
        return [
            same(norm, f"{mlp}linear_fc1.layer_norm_weight", (h,)),
            *_swiglu_rows(f"{hf}mlp.", mlp, c.intermediate_size, h),
        ]
    shared = f"{hf}mlp.shared_expert."
    return [
        same(norm, f"{mcore}pre_mlp_layernorm.weight", (h,)),
        same(f"{hf}mlp.gate.weight", f"{mlp}router.weight", (c.num_experts, h)),
        _expert_row(c, hf, mcore, experts, ("gate", "up"), "linear_fc1"),
        _expert_row(c, hf, mcore, experts, ("down",), "linear_fc2"),
        same(f"{hf}mlp.shared_expert_gate.weight", f"{mlp}shared_experts.gate_weight", (1, h)),
        *_swiglu_rows(shared, f"{mlp}shared_experts.", c.shared_expert_intermediate_size, h),
    ]


def _swiglu_rows(hf: str, mcore: str, ffn: int, hidden: int) -> list[Row]:
    up = Row(
        hf=tuple(TensorSpec(f"{hf}{part}_proj.weight", (ffn, hidden)) for part in ("gate", "up")),
        mcore=(TensorSpec(f"{mcore}linear_fc1.weight", (2 * ffn, hidden)),),
        how="gate rows, then up rows",
        copies=join((ffn, ffn), (hidden,)),
        tp_axis=0,
    )
    down = same(f"{hf}down_proj.weight", f"{mcore}linear_fc2.weight", (hidden, ffn), tp_axis=1)
    return [up, down]


def _expert_row(
    c: Qwen35Config, hf: str, mcore: str, experts: Experts, parts: tuple[str, ...], linear: str
) -> Row:
    rows_, columns = c.moe_intermediate_size, c.hidden_size
    if linear == "linear_fc2":
        rows_, columns = columns, rows_
    stacked = (c.num_experts, len(parts) * rows_, columns)
    sizes = (c.num_experts, len(parts), rows_, columns)
    if experts == "packed":
        specs = [TensorSpec(f"{hf}mlp.experts.{'_'.join(parts)}_proj", stacked)]
        copies, how = packed_experts(*sizes), "unchanged"
    else:
        specs = [
            TensorSpec(f"{hf}mlp.experts.{expert}.{part}_proj.weight", (rows_, columns))
            for expert in range(c.num_experts)
            for part in parts
        ]
        copies, how = separate_experts(*sizes), "experts stacked"
    if len(parts) > 1:
        how += ", gate rows then up rows in each expert"
    return Row(
        hf=tuple(specs),
        mcore=(TensorSpec(f"{mcore}mlp.experts.experts.{linear}.weight", stacked),),
        how=how,
        copies=copies,
        tp_axis=1 if len(parts) > 1 else 2,
        ep_axis=0,
    )


def _mtp_rows(c: Qwen35Config, experts: Experts) -> list[Row]:
    h, layer = c.hidden_size, "mtp.layers.0."
    inner = f"{layer}transformer_layer."
    return [
        same("mtp.pre_fc_norm_embedding.weight", f"{layer}enorm.weight", (h,)),
        same("mtp.pre_fc_norm_hidden.weight", f"{layer}hnorm.weight", (h,)),
        same("mtp.fc.weight", f"{layer}eh_proj.weight", (h, 2 * h), tp_axis=0),
        *_attention_rows(c, layer, f"{inner}self_attention."),
        *_mlp_rows(c, layer, inner, experts),
        same("mtp.norm.weight", f"{layer}final_layernorm.weight", (h,)),
    ]


def _cut(hf: str, mcore: str, parts: Mapping[str, int], tail: Shape, groups: int = 1) -> Row:
    return Row(
        hf=(TensorSpec(hf, (sum(parts.values()), *tail)),),
        mcore=tuple(TensorSpec(f"{mcore}{part}", (n, *tail)) for part, n in parts.items()),
        how=f"cut into {', '.join(parts)}" + (", key head by key head" if groups > 1 else ""),
        copies=cut(tuple(parts.values()), tail, groups),
        tp_axis=0,
    )


def hf_to_mcore(
    config: Qwen35Config,
    tensors: Mapping[str, torch.Tensor],
    checkpoint_format: Format = "qwen35",
    *,
    vision: bool = False,
) -> dict[str, torch.Tensor]:
    """Megatron's global tensors by checkpoint key, from a Hugging Face state dict.

    Works for parameters and, in the qwen35 format, for their gradients: values are only moved. A
    state dict without MTP gives a result without it; vision tensors are left out without `vision`.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape than the config says.
    """
    table = rows(config, Naming.detect(config, tensors), checkpoint_format, vision=vision)
    expected = [spec for row in table for spec in row.hf]
    ignored = {HEAD} if config.tie_word_embeddings else set()
    given = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in ignored and (vision or not name.startswith(VISION_PREFIX))
    }
    _check(given, expected)
    return {key: tensor for row in table for key, tensor in row.to_mcore(given).items()}


def mcore_to_hf(
    config: Qwen35Config,
    tensors: Mapping[str, torch.Tensor],
    experts: Experts = "packed",
    checkpoint_format: Format = "qwen35",
) -> dict[str, torch.Tensor]:
    """The inverse of `hf_to_mcore`, under the names of the config's own model class.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape than the config says.
    """
    mtp = any(name.startswith(MTP_PREFIX) for name in tensors)
    base = Naming.default(config, experts)
    naming = Naming(prefix=base.prefix, experts=experts, mtp_experts=experts, mtp=mtp)
    vision = any(name.startswith(MCORE_VISION_PREFIX) for name in tensors)
    table = rows(config, naming, checkpoint_format, vision=vision)
    _check(tensors, [spec for row in table for spec in row.mcore])
    return {name: tensor for row in table for name, tensor in row.to_hf(tensors).items()}


def _check(tensors: Mapping[str, torch.Tensor], expected: list[TensorSpec]) -> None:
    names = {spec.name for spec in expected}
    for what, wrong in (
        ("missing", sorted(names - tensors.keys())),
        ("unknown", sorted(tensors.keys() - names)),
    ):
        if wrong:
            raise CheckpointError(f"{len(wrong)} {what} tensors", got=", ".join(wrong[:5]))
    for spec in expected:
        if tuple(tensors[spec.name].shape) != spec.shape:
            raise CheckpointError(
                f"{spec.name} has another shape than the config says",
                got=str(tuple(tensors[spec.name].shape)),
                allowed=str(spec.shape),
            )
