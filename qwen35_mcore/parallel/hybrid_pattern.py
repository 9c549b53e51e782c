"""Megatron's ``hybrid_layer_pattern`` strings for this model, read and written without Megatron.

HybridModel takes a decoder layer apart: one symbol is a token mixer (``G`` GatedDeltaNet, ``*``
attention) or a feed-forward (``E`` experts, ``-`` MLP). ``|`` ends a virtual pipeline stage, and
``/*E`` stands for an MTP layer. Stage i runs on pipeline rank i % pp as its virtual stage i // pp.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen35_mcore.config.layer_pattern import LayerKind, mtp_pattern
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError

_MIXERS = {LayerKind.GDN: "G", LayerKind.ATTENTION: "*"}


def decoder_symbols(model_config: Qwen35Config) -> str:
    """The decoder without cuts, two symbols a layer: ``GEGEGE*E``."""
    return _symbols(model_config, model_config.layer_types)


def write_hybrid_pattern(model_config: Qwen35Config, layers_of_stages: Sequence[int]) -> str:
    """The pattern of a decoder that is cut between whole layers.

    Args:
        layers_of_stages: decoder layers of each virtual stage, in the order of the forward pass.
    """
    symbols, parts = decoder_symbols(model_config), []
    for layers in layers_of_stages:
        parts.append(symbols[: 2 * layers])
        symbols = symbols[2 * layers :]
    return "|".join(parts) + _mtp(model_config)


def stages_of_pattern(model_config: Qwen35Config, pattern: str) -> tuple[str, ...]:
    """The stages as layer characters of :mod:`qwen35_mcore.parallel.stages`: ``GE|GEGE*E/*E`` is
    ``("Et", "tttmL")``.

    A layer that is cut counts where its token mixer is.

    Raises:
        ConfigError: without its cuts it is not the pattern of this model.
    """
    whole = decoder_symbols(model_config) + _mtp(model_config)
    decoder, slash, mtp = pattern.partition("/")
    if decoder.replace("|", "") + slash + mtp != whole:
        raise ConfigError(
            "the hybrid layer pattern is not this model's",
            got=pattern,
            allowed=f"{whole}, with | wherever a pipeline stage ends",
        )
    mixers = "".join(_MIXERS.values())
    stages = ["t" * sum(map(part.count, mixers)) for part in decoder.split("|")]
    stages[0] = "E" + stages[0]
    stages[-1] += "m" * model_config.mtp_num_hidden_layers + "L"
    return tuple(stages)


def _mtp(model_config: Qwen35Config) -> str:
    layer = _symbols(model_config, mtp_pattern(1))
    return f"/{layer}" * model_config.mtp_num_hidden_layers


def _symbols(model_config: Qwen35Config, kinds: Sequence[LayerKind]) -> str:
    feed_forward = "E" if model_config.is_moe else "-"
    return "".join(_MIXERS[kind] + feed_forward for kind in kinds)
