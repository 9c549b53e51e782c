"""Every name of megatron-core that modules outside `mcore` use, and what the model derives from.

A name is imported when it is first asked for, so this module itself imports neither torch nor
megatron. `from qwen35_mcore.mcore.imports import GPTModel` works as from any module.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import Any

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.versions import (
    MEGATRON_CORE,
    TESTED_MEGATRON_CORE,
    installed_megatron_core,
    release,
)

logger = logging.getLogger(__name__)

GDN_VARIANT = "gated_delta_net"
"""megatron-core's name of the GatedDeltaNet; its main branch says "gdn"."""

BASE_CLASSES = {
    "ColumnParallelLinear": "_forward_impl",
    "GPTModel": "_postprocess _preprocess",
    "HybridModel": "",
    "HybridStack": "",
    "LinearWithGradAccumulationAndAsyncCommunication": "backward",
    "LocalSpecProvider": "column_parallel_layer_norm_linear core_attention "
    "fuse_layernorm_and_linear grouped_mlp_modules layer_norm",
    "McoreGatedDeltaNet": "_resolve_cu_seqlens _setup_variant_attrs reset_parameters",
    "MegatronModule": "",
    "MoEAlltoAllTokenDispatcher": "_maybe_dtoh_and_synchronize _maybe_update_cuda_sync_point "
    "combine_preprocess dispatch_postprocess",
    "MoEFlexTokenDispatcher": "",
    "MoELayer": "",
    "MultiTokenPredictionLayer": "_get_embeddings",
    "SelfAttention": "get_query_key_value_tensors",
    "SharedExpertMLP": "get_output post_forward_comm pre_forward_comm",
    "TopKRouter": "_apply_global_aux_loss attach_and_log_load_balancing_loss "
    "reset_global_aux_loss_tracker routing",
    "TransformerConfig": "",
    "TransformerLayer": "",
    "VocabParallelEmbedding": "",
}
"""The classes that the model derives from, each with its methods that the model replaces or, where
they are private, calls. Another release has to call them as this one does."""

_HOMES = {
    "AttnMaskType": "megatron.core.transformer.enums",
    "BlendedMegatronDatasetBuilder": "megatron.core.datasets.blended_megatron_dataset_builder",
    "CheckpointWithoutOutput": "megatron.core.tensor_parallel",
    "ColumnParallelLinear": "megatron.core.tensor_parallel",
    "DType": "megatron.core.datasets.indexed_dataset",
    "GPTDataset": "megatron.core.datasets.gpt_dataset",
    "GPTDatasetConfig": "megatron.core.datasets.gpt_dataset",
    "GPTModel": "megatron.core.models.gpt.gpt_model",
    "GatedDeltaNetSubmodules": "megatron.core.ssm.gated_delta_net.common",
    "HybridModel": "megatron.core.models.hybrid.hybrid_model",
    "HybridStack": "megatron.core.models.hybrid.hybrid_block",
    "HybridStackSubmodules": "megatron.core.models.hybrid.hybrid_block",
    "IdentityOp": "megatron.core.transformer.identity_op",
    "IndexedDatasetBuilder": "megatron.core.datasets.indexed_dataset",
    "LayerType": "megatron.core.transformer.enums",
    "LinearWithGradAccumulationAndAsyncCommunication": "megatron.core.tensor_parallel.layers",
    "LocalSpecProvider": "megatron.core.models.backends",
    "MLP": "megatron.core.transformer.mlp",
    "MLPSubmodules": "megatron.core.transformer.mlp",
    "McoreGatedDeltaNet": "megatron.core.ssm.gated_delta_net.gdn:GatedDeltaNet",
    "MegatronModule": "megatron.core.transformer.module",
    "MoEAlltoAllTokenDispatcher": "megatron.core.transformer.moe.token_dispatcher",
    "MoEFlexTokenDispatcher": "megatron.core.transformer.moe.token_dispatcher",
    "MoELayer": "megatron.core.transformer.moe.moe_layer",
    "MoETokenDispatcher": "megatron.core.transformer.moe.token_dispatcher",
    "MockGPTDataset": "megatron.core.datasets.gpt_dataset",
    "ModelType": "megatron.core.enums",
    "ModuleSpec": "megatron.core.transformer.spec_utils",
    "MultiTokenPredictionLayer": "megatron.core.transformer.multi_token_prediction",
    "OptimizerParamScheduler": "megatron.core.optimizer_param_scheduler",
    "PackedSeqParams": "megatron.core.packed_seq_params",
    "SelfAttention": "megatron.core.transformer.attention",
    "SelfAttentionSubmodules": "megatron.core.transformer.attention",
    "ShardedObject": "megatron.core.dist_checkpointing.mapping",
    "ShardedTensor": "megatron.core.dist_checkpointing.mapping",
    "ShardedTensorFactory": "megatron.core.dist_checkpointing.mapping",
    "SharedExpertMLP": "megatron.core.transformer.moe.shared_experts",
    "TESpecProvider": "megatron.core.extensions.transformer_engine_spec_provider",
    "TopKRouter": "megatron.core.transformer.moe.router",
    "TransformerBlock": "megatron.core.transformer.transformer_block",
    "TransformerBlockSubmodules": "megatron.core.transformer.transformer_block",
    "TransformerConfig": "megatron.core.transformer.transformer_config",
    "TransformerLayer": "megatron.core.transformer.transformer_layer",
    "TransformerLayerSubmodules": "megatron.core.transformer.transformer_layer",
    "VocabParallelEmbedding": "megatron.core.tensor_parallel",
    "YarnRotaryEmbedding": "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding",
    "apply_prefix_mapping": "megatron.core.dist_checkpointing.utils",
    "apply_rotary_pos_emb": "megatron.core.models.common.embeddings",
    "compiled": "megatron.core.jit:jit_fuser",
    "convert_split_vector_to_split_matrix": (
        "megatron.core.datasets.blended_megatron_dataset_config"
    ),
    "copy_to_tensor_model_parallel_region": "megatron.core.tensor_parallel",
    "core_transformer_config_from_args": "megatron.training.argument_utils",
    "dist_checkpointing": "megatron.core",
    "flatten_batch_for_packed_sequences": "megatron.core.utils",
    "gather_from_sequence_parallel_region": "megatron.core.tensor_parallel",
    "get_args": "megatron.training",
    "get_attr_wrapped_model": "megatron.core.utils",
    "get_batch_on_this_cp_rank": "megatron.core.utils",
    "get_batch_on_this_tp_rank": "megatron.core.utils",
    "get_bias_dropout_add": "megatron.core.fusions.fused_bias_dropout",
    "get_blend_and_blend_per_split": "megatron.training.utils",
    "get_blend_from_list": "megatron.core.datasets.utils",
    "get_cuda_rng_tracker": "megatron.core.tensor_parallel",
    "get_default_pg_collection": "megatron.core.transformer.moe.moe_utils",
    "get_expert_parallel_rng_tracker_name": "megatron.core.tensor_parallel.random",
    "get_gpt_mtp_block_spec_for_backend": "megatron.core.models.gpt.gpt_layer_specs",
    "get_mlp_module_spec_for_backend": "megatron.core.models.gpt.gpt_layer_specs",
    "get_moe_metrics_tracker": "megatron.core.transformer.moe.moe_logging",
    "get_moe_module_spec_for_backend": "megatron.core.models.gpt.moe_module_specs",
    "get_num_layers_to_build": "megatron.core.transformer.transformer_block",
    "get_parameter_local_cp": "megatron.core.ssm.gated_delta_net.common",
    "get_rerun_state_machine": "megatron.core.rerun_state_machine",
    "get_supported_coefficient_types": "megatron.core.optimizer.emerging_optimizers",
    "get_timers": "megatron.training",
    "get_tokenizer": "megatron.training",
    "get_transformer_layer_offset": "megatron.core.transformer.transformer_layer",
    "is_first_or_last_pipeline_stage": "megatron.training.utils",
    "load_common_state_dict": "megatron.core.dist_checkpointing",
    "mpu": "megatron.core",
    "mtp_on_this_rank": "megatron.core.transformer.multi_token_prediction",
    "parse_and_normalize_split": "megatron.core.datasets.blended_megatron_dataset_config",
    "parse_args": "megatron.training.arguments",
    "pretrain": "megatron.training",
    "pretrain_cfg_container_from_args": "megatron.training.argument_utils",
    "reduce_from_tensor_model_parallel_region": "megatron.core.tensor_parallel",
    "reduce_scatter_to_sequence_parallel_region": "megatron.core.tensor_parallel",
    "roll_tensor": "megatron.core.transformer.multi_token_prediction",
    "scatter_to_sequence_parallel_region": "megatron.core.tensor_parallel",
    "set_global_variables": "megatron.training.global_vars",
    "split_tensor_factory": "megatron.core.ssm.utils:_split_tensor_factory",
    "validate_args": "megatron.training.arguments",
}
"""The module of each name, and its name there where that is another one."""

NAMES = tuple(_HOMES)


def __getattr__(name: str) -> Any:
    """Raises ConfigError where the installed megatron-core has no such name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, other_name = _HOMES[name].partition(":")
    try:
        value = getattr(importlib.import_module(module), other_name or name)
    except (AttributeError, ModuleNotFoundError) as error:
        if not str(error.name).startswith("megatron") and module not in sys.modules:
            raise  # a package that megatron's module needs is missing
        raise wrong_release(f"it has no {module}.{other_name or name}") from error
    globals()[name] = value
    return value


def check_release() -> None:
    """Refuse a megatron-core of another series; warn, once, about an untested release of this one.

    Raises:
        ConfigError: the names above are those of `MEGATRON_CORE`'s series, not of the installed.
    """
    installed = installed_megatron_core()
    if release(installed)[:2] != MEGATRON_CORE:
        raise wrong_release("it reaches into internals, which differ from series to series")
    if installed not in TESTED_MEGATRON_CORE:
        _warn_of(installed)


@functools.cache
def _warn_of(untested: str) -> None:
    logger.warning(
        "megatron-core %s was not tested with this package (tested: %s); `qwen35 doctor --patches` "
        "says what differs",
        untested,
        ", ".join(TESTED_MEGATRON_CORE),
    )


def wrong_release(why: str) -> ConfigError:
    """The error for a release that this package cannot use, for the reason given."""
    return ConfigError(
        f"this package cannot use the installed megatron-core: {why}",
        got=f"megatron-core {installed_megatron_core()}",
        allowed=f"megatron-core {' or '.join(TESTED_MEGATRON_CORE)}",
        fix=f"pip install megatron-core=={TESTED_MEGATRON_CORE[-1]}",
    )
