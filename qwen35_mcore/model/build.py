"""Build the model: by hand (:func:`build_model`) or as pretrain's model provider."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore import imports
from qwen35_mcore.mcore.megatron_errors import as_first_raised
from qwen35_mcore.mcore.patches import accumulating_products
from qwen35_mcore.model.gpt_model import Qwen35Model
from qwen35_mcore.model.hybrid_model import Qwen35HybridModel, hybrid_stack_spec
from qwen35_mcore.model.matrices import mark_matrices
from qwen35_mcore.model.spec_providers import get_spec_provider
from qwen35_mcore.model.specs import decoder_block_spec, mtp_block_spec
from qwen35_mcore.model.transformer_config import Qwen35TransformerConfig, apply_yarn
from qwen35_mcore.model.vision.freeze import freeze
from qwen35_mcore.model.vision.vision_language_model import Qwen35VisionLanguageModel

DECODERS = ("gpt", "hybrid")
"""Which of megatron's models assembles the layers; the first is the default."""


def build_model(
    model_config: Qwen35Config,
    config: Qwen35TransformerConfig,
    *,
    decoder: str = DECODERS[0],
    hybrid_layer_pattern: str | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: Any = None,
    parallel_output: bool = True,
    fp16_lm_cross_entropy: bool = False,
    vision: bool = False,
) -> Qwen35Model | Qwen35HybridModel:
    """megatron's GPTModel or HybridModel with Qwen3.5's layers, for one (virtual) pipeline stage.

    Called with tokens and positions ``[b, s]`` int64 and an attention mask (None: causal), it
    returns logits ``[b, s, vocab_size]``, or with ``labels`` ``[b, s]`` the loss of each token
    ``[b, s]`` float32. The process needs megatron's groups: `initialize_model_parallel`. Both
    decoders have the same parameters, losses and checkpoints.

    Args:
        config: of `transformer_config`, or made of megatron's arguments.
        decoder: gpt (GPTModel) or hybrid (HybridModel).
        hybrid_layer_pattern: of the hybrid decoder, with a ``|`` wherever a pipeline stage ends;
            None: whole layers, as ``config`` shares them out.
        pre_process, post_process: whether this stage holds the embedding, and the output layer.
        vp_stage: number of the virtual stage, where a rank has several.
        pg_collection: process groups; None: megatron's global ones.
        parallel_output: leave the logits split over tensor-parallel ranks.
        fp16_lm_cross_entropy: as megatron's flag of this name.
        vision: build the vision-language model, with its tower on the stage of the embedding: a
            `Qwen35VisionLanguageModel`, whose ``forward`` takes images. False: the text model,
            whatever ``model_config`` carries.

    Raises:
        ConfigError: megatron-core of another series, an unknown decoder or ``transformer_impl``, a
            pattern for the gpt decoder, experts that were named and cannot run here, or a vision
            part that contradicts the model or that the layout or decoder cannot run.
        KernelError: kernels or a spec provider that were named cannot run here.
    """
    imports.check_release()
    _check_decoder(decoder, hybrid_layer_pattern, vision)
    if config.gradient_accumulation_fusion:
        accumulating_products.PATCH.apply()
    spec_provider = get_spec_provider(config)
    common: dict[str, Any] = {
        "config": config,
        "vocab_size": model_config.vocab_size,
        "max_sequence_length": model_config.max_position_embeddings,
        "pre_process": pre_process,
        "post_process": post_process,
        "fp16_lm_cross_entropy": fp16_lm_cross_entropy,
        "parallel_output": parallel_output,
        "share_embeddings_and_output_weights": model_config.tie_word_embeddings,
        "position_embedding_type": "yarn" if model_config.yarn else "rope",
        "rotary_percent": model_config.rope_parameters.partial_rotary_factor,
        "rotary_base": model_config.rope_theta,
        "pg_collection": pg_collection,
        "vp_stage": vp_stage,
    }
    tower_before = partial(
        Qwen35VisionLanguageModel, model_config=model_config, spec_provider=spec_provider
    )
    with as_first_raised():
        if decoder == "hybrid":
            model: Any = Qwen35HybridModel(
                hybrid_stack_spec=hybrid_stack_spec(config, spec_provider, vp_stage),
                model_config=model_config,
                hybrid_layer_pattern=hybrid_layer_pattern,
                **common,
            )
        else:
            model = (tower_before if vision else Qwen35Model)(
                transformer_layer_spec=decoder_block_spec(
                    model_config, config, spec_provider, vp_stage
                ),
                mtp_block_spec=mtp_block_spec(config, spec_provider, vp_stage),
                **common,
            )
    mark_matrices(model, model_config, gates_apart=bool(config.gdn_gates_apart))
    return model


def _check_decoder(decoder: str, hybrid_layer_pattern: str | None, vision: bool) -> None:
    if decoder not in DECODERS:
        raise ConfigError("no such decoder", got=decoder, allowed=" or ".join(DECODERS))
    if hybrid_layer_pattern is not None and decoder != "hybrid":
        raise ConfigError(
            "a hybrid layer pattern is for the hybrid decoder",
            got=f"decoder={decoder!r}, hybrid_layer_pattern={hybrid_layer_pattern!r}",
            fix="pass decoder='hybrid', or drop the pattern",
        )
    if vision and decoder != "gpt":
        raise ConfigError(
            "only the gpt decoder takes the vision tower's outputs",
            got=f"decoder={decoder!r}, vision=True",
            fix="pass decoder='gpt'",
        )


def make_model_provider(
    model_config: Qwen35Config, args: Any
) -> Callable[..., Qwen35Model | Qwen35HybridModel]:
    """The ``model_provider`` that ``megatron.training.pretrain`` calls for every model chunk.

    Args:
        args: megatron's validated arguments, filled by :mod:`qwen35_mcore.training.arguments`.

    Returns:
        A function that builds a chunk, and raises what `build_model` raises.
    """

    def model_provider(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Qwen35TransformerConfig | None = None,
        pg_collection: Any = None,
    ) -> Qwen35Model | Qwen35HybridModel:
        if config is None:
            config = imports.core_transformer_config_from_args(args, Qwen35TransformerConfig)
            apply_yarn(config, model_config.yarn)
        model = build_model(
            model_config,
            config,
            decoder=args.decoder,
            hybrid_layer_pattern=args.qwen35_hybrid_pattern,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
            fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
            vision=args.qwen35_vision,
        )
        freeze(model, args.freeze)
        return model

    return model_provider
