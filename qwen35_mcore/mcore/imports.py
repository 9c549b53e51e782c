"""Every line that depends on megatron-core's version.

What other modules need from megatron-core's less stable corners they import from here; what the
wheel of 0.19 lacks or gets wrong for this model is mended here, each with its reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.jit import jit_fuser as compiled
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import common as _gdn
from megatron.core.ssm.gated_delta_net.common import (
    GatedDeltaNetSubmodules,
    get_parameter_local_cp,
)
from megatron.core.ssm.gated_delta_net.gdn import GatedDeltaNet as McoreGatedDeltaNet
from megatron.core.ssm.utils import _split_tensor_factory as split_tensor_factory
from megatron.core.tensor_parallel import (
    CheckpointWithoutOutput,
    ColumnParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    LinearWithGradAccumulationAndAsyncCommunication,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionLayer,
    roll_tensor,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_batch_on_this_cp_rank

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.versions import MEGATRON_CORE, release

__all__ = [
    "AttnMaskType",
    "CheckpointWithoutOutput",
    "ColumnParallelLinear",
    "GPTModel",
    "GatedDeltaNetSubmodules",
    "IdentityOp",
    "LinearWithGradAccumulationAndAsyncCommunication",
    "LocalSpecProvider",
    "McoreGatedDeltaNet",
    "MegatronModule",
    "MoEAlltoAllTokenDispatcher",
    "MoEFlexTokenDispatcher",
    "MoELayer",
    "MoETokenDispatcher",
    "ModuleSpec",
    "MultiTokenPredictionLayer",
    "PackedSeqParams",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "ShardedObject",
    "ShardedTensor",
    "ShardedTensorFactory",
    "TopKRouter",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "VocabParallelEmbedding",
    "YarnRotaryEmbedding",
    "compiled",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "get_batch_on_this_cp_rank",
    "get_bias_dropout_add",
    "get_cuda_rng_tracker",
    "get_default_pg_collection",
    "get_gpt_mtp_block_spec_for_backend",
    "get_mlp_module_spec_for_backend",
    "get_moe_metrics_tracker",
    "get_moe_module_spec_for_backend",
    "get_parameter_local_cp",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "roll_tensor",
    "scatter_to_sequence_parallel_region",
    "split_tensor_factory",
]

GDN_VARIANT = "gated_delta_net"  # spelt "gdn" on megatron-core's main branch


def check_version() -> None:
    """Refuse a megatron-core whose internals this package was not tested with.

    Raises:
        ConfigError: when the installed minor version is another one.
    """
    installed = version("megatron-core")
    if release(installed)[:2] != MEGATRON_CORE:
        raise ConfigError(
            "this package reaches into megatron-core's internals and was tested with 0.19 only",
            got=f"megatron-core {installed}",
            allowed=">=0.19,<0.20",
            fix="pip install 'megatron-core>=0.19,<0.20'",
        )


@contextlib.contextmanager
def without_fla_check() -> Iterator[None]:
    """Let megatron's GatedDeltaNet be built without FLA: our forward brings its own kernels."""
    had_fla = _gdn.HAVE_FLA
    _gdn.HAVE_FLA = True
    try:
        yield
    finally:
        _gdn.HAVE_FLA = had_fla


def gather_heads(
    x_sbc: torch.Tensor,
    sections: tuple[int, ...],
    cp_group: Any,
    cu_seqlens: torch.Tensor | None,
    seq_len: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From a slice of the sequence with all heads to the whole sequence with a slice of heads.

    Args:
        x_sbc: ``[seq_len / cp, b, c]``, in megatron's load-balanced (zigzag) order.
        sections: sizes of the parts that ``c`` is made of; each is split over the ranks by itself.
        cu_seqlens: packed boundaries, or None.
        seq_len: global length.

    Returns:
        ``[seq_len, b, c / cp]`` in natural order, and the index that undoes the order of packed
        sequences on the way back (None otherwise).
    """
    cp_size = cp_group.size()
    if cp_size == 1:
        return x_sbc, None
    by_rank = _gdn._build_head_perm_for_split_sections(tuple(sections), cp_size, x_sbc.device)
    x_sbc = x_sbc.index_select(-1, by_rank)
    packed = cu_seqlens is not None
    x_sbc = _gdn.tensor_a2a_cp2hp(
        x_sbc, seq_dim=0, head_dim=-1, cp_group=cp_group, undo_attention_load_balancing=not packed
    )
    if not packed:
        return x_sbc, None
    index, inverse = _gdn._build_thd_cp_a2a_perm(cu_seqlens, cp_size, seq_len)
    return x_sbc.index_select(0, index), inverse


def scatter_heads(
    y_sbc: torch.Tensor, cp_group: Any, restore_index: torch.Tensor | None
) -> torch.Tensor:
    """The way back from `gather_heads`: ``[seq_len, b, c / cp]`` to ``[seq_len / cp, b, c]``."""
    if cp_group.size() == 1:
        return y_sbc
    packed = restore_index is not None
    if restore_index is not None:
        y_sbc = y_sbc.index_select(0, restore_index)
    return _gdn.tensor_a2a_hp2cp(
        y_sbc, seq_dim=0, head_dim=-1, cp_group=cp_group, redo_attention_load_balancing=not packed
    )


def zigzag_of_documents(cu_seqlens: torch.Tensor, cp_size: int, length: int) -> torch.Tensor:
    """Positions ``[cp, length / cp]`` of the packed tokens that each context-parallel rank holds.

    The order that `gather_heads` undoes, and that of Transformer Engine's
    ``thd_get_partitioned_indices``, which needs a GPU.

    Args:
        cu_seqlens: boundaries of the documents; every length is a multiple of ``2 * cp``.
    """
    return _gdn._build_thd_cp_a2a_perm(cu_seqlens, cp_size, length)[1].view(cp_size, -1)


def expert_rng() -> Any:
    """Context in which every expert-parallel rank draws numbers of its own."""
    return get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())


@contextlib.contextmanager
def vocabulary_layers(output_layer: type, embedding: type) -> Iterator[None]:
    """While a model is built: what it takes for its output layer and its word embedding."""
    originals = tensor_parallel.ColumnParallelLinear, tensor_parallel.VocabParallelEmbedding
    tensor_parallel.ColumnParallelLinear = output_layer
    tensor_parallel.VocabParallelEmbedding = embedding
    try:
        yield
    finally:
        tensor_parallel.ColumnParallelLinear, tensor_parallel.VocabParallelEmbedding = originals


def te_spec_provider() -> Any:
    """megatron's Transformer Engine provider; importing it needs a working Transformer Engine."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def local_layer_ids(
    config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> list[int]:
    """Global numbers (from 0) of the decoder layers that this pipeline stage builds."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(first, first + count))


def config_from_arguments(args: Any, config_class: type) -> Any:
    """A TransformerConfig (or subclass) from megatron.training's arguments."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    return core_transformer_config_from_args(args, config_class)
