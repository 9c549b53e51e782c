"""The training job with megatron-core's own model: its specs, GatedDeltaNet, experts, dispatcher.

The same command line, data, loop and loss as examples/pretrain_qwen35.py, so that a whole job of
this package is measured beside the one that it replaces. Needs Transformer Engine.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.training import pretrain


def native_provider(args: Namespace, model_config: Qwen35Config) -> Callable[..., Any]:
    """A model provider of megatron's GPTModel with its Qwen3.5 spec."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_block_with_experimental_attention_variant_spec as block_spec,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.training.argument_utils import core_transformer_config_from_args

    from qwen35_mcore.mcore.patches import accumulating_products

    accumulating_products.PATCH.apply()  # without apex its output layer refuses to be built

    def provider(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> Any:
        config = core_transformer_config_from_args(args, TransformerConfig)
        spec = block_spec(config, vp_stage=vp_stage)
        mtp = None
        if config.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec(
                config, spec, use_transformer_engine=True, vp_stage=vp_stage
            )
        return GPTModel(
            config=config,
            transformer_layer_spec=spec,
            mtp_block_spec=mtp,
            vocab_size=model_config.vocab_size,
            max_sequence_length=model_config.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
            parallel_output=True,
            share_embeddings_and_output_weights=model_config.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_percent=model_config.rope_parameters.partial_rotary_factor,
            rotary_base=model_config.rope_theta,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )

    return provider


def main() -> None:
    args, model_config = pretrain.parse_arguments()
    pretrain.train(
        args,
        model_config,
        native_provider(args, model_config),
        pretrain.datasets,
        pretrain.forward_step,
    )


if __name__ == "__main__":
    with pretrain.reported_once():
        main()
