"""Which decoder layer is a GatedDeltaNet (GDN) and which is full attention, for any pattern.

Megatron-Core describes the pattern with one value, ``linear_attention_freq``: an integer n when
layer i is full attention exactly when (i + 1) % n == 0, otherwise a list with 1 for GDN and 0 for
full attention. Published sizes use n = 4; nothing here assumes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from enum import StrEnum

from qwen35_mcore.errors import ConfigError


class LayerKind(StrEnum):
    """The token mixer of a layer, spelt as in Hugging Face's ``layer_types``."""

    GDN = "linear_attention"
    ATTENTION = "full_attention"


def pattern_from_interval(num_layers: int, interval: int) -> tuple[LayerKind, ...]:
    """Layer i is full attention when (i + 1) % interval == 0, GDN otherwise.

    Raises:
        ConfigError: one of the two is not a positive integer.
    """
    for name, value in (("num_hidden_layers", num_layers), ("full_attention_interval", interval)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a positive integer", got=value)
    return tuple(
        LayerKind.GDN if (i + 1) % interval else LayerKind.ATTENTION for i in range(num_layers)
    )


def pattern_from_names(names: Iterable[str]) -> tuple[LayerKind, ...]:
    """Turn ``layer_types`` strings into kinds, one per layer.

    Raises:
        ConfigError: it is no list, or an entry is not a known kind; the message names the entry.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ConfigError("layer_types must be a list with one name per layer", got=names)
    allowed = [kind.value for kind in LayerKind]
    kinds = []
    for i, name in enumerate(names):
        if name not in allowed:
            near = get_close_matches(str(name), allowed, n=1)
            raise ConfigError(
                f"layer_types[{i}] is not a layer kind of Qwen3.5",
                got=name,
                allowed=", ".join(allowed),
                fix=f"did you mean {near[0]!r}?" if near else None,
            )
        kinds.append(LayerKind(name))
    return tuple(kinds)


def interval_of(layer_types: Sequence[LayerKind]) -> int | None:
    """The n for which ``pattern_from_interval`` gives this pattern, or None when there is none.

    A pattern without any full attention layer has no interval: every n larger than the number of
    layers would do, and a writer that picks one invents a hyperparameter.
    """
    if LayerKind.ATTENTION not in layer_types:
        return None
    interval = list(layer_types).index(LayerKind.ATTENTION) + 1
    periodic = pattern_from_interval(len(layer_types), interval) == tuple(layer_types)
    return interval if periodic else None


def linear_attention_freq(layer_types: Sequence[LayerKind]) -> int | list[int]:
    """Megatron's ``linear_attention_freq``: the interval, or one 1 (GDN) or 0 per decoder layer."""
    return interval_of(layer_types) or [int(kind is LayerKind.GDN) for kind in layer_types]


def mtp_pattern(num_mtp_layers: int) -> tuple[LayerKind, ...]:
    """Multi-token-prediction layers are full attention, whatever the decoder's pattern ends with.

    Megatron builds MTP from whatever layer spec it is handed, so the caller must choose this one.
    """
    return (LayerKind.ATTENTION,) * num_mtp_layers
