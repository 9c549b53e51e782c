"""Rotary position embedding parameters: partial, interleaved MRoPE sections, optional YaRN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from qwen35_mcore.errors import ConfigError

ROPE_TYPES = ("default", "yarn")


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN context extension, with transformers' names and defaults."""

    factor: float
    """How far the context is stretched, at least 1. It is used as given, even where it differs from
    max_position_embeddings / original_max_position_embeddings (397b-a19b: 3.0 against 3.81)."""
    original_max_position_embeddings: int
    """Positions the model was pretrained with, before stretching."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a frequency is fully interpolated."""
    mscale: float | None = None
    """Numerator scale of the attention factor; has an effect only together with mscale_all_dim."""
    mscale_all_dim: float | None = None
    """Denominator scale of the attention factor; has an effect only together with mscale."""
    attention_factor: float | None = None
    """Multiplier of cos and sin. None: derived, see `resolved_attention_factor`."""
    truncate: bool = True
    """Whether the bounds of the interpolation ramp are rounded outwards to whole dimensions."""

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow"):
            object.__setattr__(self, name, _positive(f"YaRN {name}", getattr(self, name)))
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _positive(f"YaRN {name}", getattr(self, name)))
        if self.factor < 1:
            raise ConfigError("YaRN factor must be at least 1", got=self.factor)
        if self.beta_fast < self.beta_slow:
            raise ConfigError(
                "YaRN beta_fast must not be below beta_slow", got=(self.beta_fast, self.beta_slow)
            )
        original = self.original_max_position_embeddings
        if not isinstance(original, int) or isinstance(original, bool) or original < 1:
            raise ConfigError(
                "YaRN original_max_position_embeddings must be a positive integer", got=original
            )
        if not isinstance(self.truncate, bool):
            raise ConfigError("YaRN truncate must be true or false", got=self.truncate)

    @property
    def resolved_attention_factor(self) -> float:
        """The multiplier of cos and sin that transformers computes from these parameters."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """The content of Hugging Face's ``rope_parameters``."""

    rope_theta: float
    """Base of the frequencies; 1e7 in every published size. It has no default: transformers' own
    (1e4) loads a published model without an error and computes other numbers."""
    partial_rotary_factor: float = 0.25
    """Fraction of each attention head that rotates; the rest carries no position."""
    mrope_section: tuple[int, ...] | None = None
    """Frequencies for time, height and width, adding up to rotary_dim / 2. For text the three
    positions are equal and this is plain RoPE; it is kept for the vision-language config."""
    mrope_interleaved: bool = True
    """Whether the three sections alternate by frequency. Qwen3.5 has no other layout."""
    yarn: YarnScaling | None = None
    """YaRN scaling, or None for plain RoPE."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_theta", _positive("rope_theta", self.rope_theta))
        factor = _positive("partial_rotary_factor", self.partial_rotary_factor)
        object.__setattr__(self, "partial_rotary_factor", factor)
        if factor > 1:
            raise ConfigError("partial_rotary_factor must be in (0, 1]", got=factor)
        if self.mrope_section is not None:
            object.__setattr__(self, "mrope_section", _section(self.mrope_section))
        if self.mrope_interleaved is not True:
            raise ConfigError(
                "mrope_interleaved must be true", got=self.mrope_interleaved, allowed="true"
            )

    def to_hf(self) -> dict[str, Any]:
        """The ``rope_parameters`` dictionary. Unset optional keys are left out, as in published
        files: transformers takes a null ``mscale`` for a value."""
        out: dict[str, Any] = {
            "rope_type": "yarn" if self.yarn else "default",
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        if self.mrope_section is not None:
            out |= {"mrope_section": list(self.mrope_section), "mrope_interleaved": True}
        if self.yarn:
            out |= {name: value for name, value in asdict(self.yarn).items() if value is not None}
        return out


_YARN_KEYS = tuple(f.name for f in fields(YarnScaling))
_PLAIN_KEYS = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
_TYPE_KEYS = ("rope_type", "type")


def rope_from_hf(text: Mapping[str, Any]) -> RopeParameters:
    """Read RoPE from the text level of a Hugging Face config, in the new style
    (``rope_parameters``) or the old (``rope_theta``, ``rope_scaling``, ``partial_rotary_factor``).

    Raises:
        ConfigError: an unknown rope type or key, a missing rope_theta or YaRN parameter, or two
            places that say different things.
    """
    nested = _merged(text.get("rope_parameters"), text.get("rope_scaling"))
    for key in ("rope_theta", "partial_rotary_factor"):
        if text.get(key) is not None:
            _agree(key, nested.setdefault(key, text[key]), text[key])
    if nested.get("rope_theta") is None:
        raise ConfigError(
            "the config has no rope_theta",
            fix="add it to rope_parameters (published Qwen3.5 sizes use 10000000)",
        )
    rope_type = _rope_type(nested)
    known = _PLAIN_KEYS + _TYPE_KEYS + (_YARN_KEYS if rope_type == "yarn" else ())
    for key in nested:
        if key not in known:
            raise ConfigError(
                f"rope_parameters has a key unknown for rope_type {rope_type!r}: {key}",
                got=nested[key],
                allowed=", ".join(known),
            )
    plain = {key: nested[key] for key in _PLAIN_KEYS if nested.get(key) is not None}
    return RopeParameters(**plain, yarn=_yarn(nested) if rope_type == "yarn" else None)


def _merged(new: Any, old: Any) -> dict[str, Any]:
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be an object or null", got=value)
    merged = dict(new or {})
    for key, value in (old or {}).items():
        _agree(key, merged.setdefault(key, value), value)
    return merged


def _agree(key: str, first: Any, second: Any) -> None:
    if first != second:
        raise ConfigError(
            f"the config gives two values for {key}", got=(first, second), fix="keep one of them"
        )


def _rope_type(nested: Mapping[str, Any]) -> str:
    names = {str(nested[key]) for key in _TYPE_KEYS if nested.get(key) is not None} or {"default"}
    rope_type = names.pop()
    if names or rope_type not in ROPE_TYPES:
        raise ConfigError(
            "rope_type is not supported",
            got=", ".join(sorted({rope_type, *names})),
            allowed=", ".join(ROPE_TYPES),
        )
    return rope_type


def _yarn(nested: Mapping[str, Any]) -> YarnScaling:
    given = {key: nested[key] for key in _YARN_KEYS if nested.get(key) is not None}
    for key in ("factor", "original_max_position_embeddings"):
        if key not in given:
            raise ConfigError(f"rope_type yarn needs {key} in rope_parameters")
    return YarnScaling(**given)


def _section(value: Any) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes)
    if len(sizes) != 3 or not whole:
        raise ConfigError("mrope_section must be three integers (time, height, width)", got=value)
    return sizes


def _positive(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf):
        raise ConfigError(f"{name} must be a positive number", got=value)
    return float(value)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
