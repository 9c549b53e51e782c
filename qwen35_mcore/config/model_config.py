"""`Qwen35Config`: the one description of a model. Nothing else knows a hyperparameter.

What the fields mean is in `fields`, their checks are in `checks`, config.json is in `hf_json`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from qwen35_mcore.config.checks import check_config
from qwen35_mcore.config.fields import ModelFields
from qwen35_mcore.config.hf_json import fields_from_hf, hf_from_config
from qwen35_mcore.config.layer_pattern import pattern_from_interval, pattern_from_names


@dataclass(frozen=True, kw_only=True)
class Qwen35Config(ModelFields):
    """A Qwen3.5, Qwen3.6 or Qwen3-Next text model, dense or mixture-of-experts.

    Immutable and hashable; derive variants with ``dataclasses.replace``, which checks them again.

    Raises:
        ConfigError: from the constructor, when a value is impossible or two values contradict.
    """

    def __post_init__(self) -> None:
        if self.layer_types:
            pattern = pattern_from_names(self.layer_types)
        else:
            pattern = pattern_from_interval(self.num_hidden_layers, 4)
        object.__setattr__(self, "layer_types", pattern)
        for name in ("carried", "carried_outer"):
            object.__setattr__(self, name, deepcopy(dict(getattr(self, name))))
        check_config(self)
        if not self.is_moe:
            object.__setattr__(self, "router_aux_loss_coef", 0.0)
        for name in (
            "rms_norm_eps",
            "initializer_range",
            "attention_dropout",
            "router_aux_loss_coef",
        ):
            object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Qwen35Config:
        """Read a Hugging Face config: a model folder, a config.json, or the parsed dictionary.

        Raises:
            ConfigError: the file is missing or no JSON, the model is another one, a key is unknown
                or missing, or values contradict each other. Every key is read, carried or refused.
        """
        return cls(**fields_from_hf(source))

    def to_hf(self) -> dict[str, Any]:
        """The config.json content: ``from_hf(config.to_hf()) == config``, and transformers' own
        config class reads the same values from it."""
        return hf_from_config(self)

    def changed(self, **changes: Any) -> Qwen35Config:
        """The same with other values; of another number of layers, the first, or more like them.

        Raises:
            ConfigError: a value is impossible, or two contradict each other.
        """
        layers = changes.get("num_hidden_layers")
        if isinstance(layers, int) and "layer_types" not in changes:
            whole = layers // len(self.layer_types) + 1
            changes["layer_types"] = (self.layer_types * whole)[:layers]
        return replace(self, **changes) if changes else self

    def to_text_only(self) -> Qwen35Config:
        """The same text model without the vision-language wrapper."""
        return replace(self, model_type=self.text_model_type, carried_outer={})
