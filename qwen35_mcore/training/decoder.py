"""Which pipeline stage holds which layers, as flags say it; with ``--hybrid-layer-pattern`` a stage
may end between a token mixer and a feed-forward."""

from __future__ import annotations

from argparse import Namespace

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.parallel.hybrid_pattern import decoder_symbols, stages_of_pattern
from qwen35_mcore.parallel.stages import parse_pipeline_layout, write_pipeline_layout

OTHER_WAYS = (
    *("pipeline_model_parallel_layout", "num_layers_per_virtual_pipeline_stage"),
    *("num_virtual_stages_per_pipeline_rank", "account_for_embedding_in_pipeline_split"),
    *("account_for_loss_in_pipeline_split", "decoder_first_pipeline_num_layers"),
    "decoder_last_pipeline_num_layers",
)
"""Flags that share out the layers as well."""


def take_hybrid_pattern(args: Namespace, model_config: Qwen35Config) -> None:
    """Keep the pattern for the model alone, as ``qwen35_hybrid_pattern``.

    megatron would count its symbols as layers, in the FLOPs, the log and the checkpoint. It is
    given a pipeline layout of as many stages instead, which says where embedding, MTP and loss are.

    Raises:
        ConfigError: a pattern of another model, beside another way to share out the layers, or with
            more or fewer stages than the pipeline has.
    """
    pattern, args.hybrid_layer_pattern = args.hybrid_layer_pattern, None
    args.qwen35_hybrid_pattern = pattern
    if pattern is None:
        return
    given = [f"--{name.replace('_', '-')}" for name in OTHER_WAYS if getattr(args, name)]
    if given:
        raise ConfigError(
            "--hybrid-layer-pattern says which stage holds which layer",
            got=f"{' '.join(given)} as well",
            fix="drop one of them",
        )
    stages, pp = stages_of_pattern(model_config, pattern), args.pipeline_model_parallel_size
    if len(stages) % pp or (pp == 1 and len(stages) > 1):
        raise ConfigError(
            "the hybrid layer pattern does not fit the pipeline",
            got=f"{len(stages)} stages, --pipeline-model-parallel-size {pp}",
            allowed=f"{pp} stages, or a multiple of it" if pp > 1 else "one stage: no |",
            fix=f"{decoder_symbols(model_config)} is the decoder: end a stage with | in it",
        )
    if pp > 1:
        args.pipeline_model_parallel_layout = write_pipeline_layout(stages)


def virtual_stages(args: Namespace) -> int:
    """Stages of a pipeline rank, after `take_hybrid_pattern`; 1 for a layout that cannot be read,
    which its own rule reports."""
    pp, layers = (
        max(1, args.pipeline_model_parallel_size),
        args.num_layers_per_virtual_pipeline_stage,
    )
    if args.pipeline_model_parallel_layout is not None:
        try:
            return max(1, len(parse_pipeline_layout(args.pipeline_model_parallel_layout)) // pp)
        except ConfigError:
            return 1
    if layers:
        return max(1, args.num_layers // (pp * layers))
    return args.num_virtual_stages_per_pipeline_rank or 1
