"""Hugging Face config.json to `Qwen35Config` fields and back, accounting for every key.

A key is read as architecture, checked against the only value that published models have, carried
through verbatim, or refused by name. Silence is not among the choices: a key that a reader ignores
is a model that trains and is another one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qwen35_mcore.config.fields import ModelFields
from qwen35_mcore.config.hf_keys import (
    CARRIED,
    CARRIED_OUTER,
    FIXED,
    MODEL_TYPES,
    MTP_KEYS,
    OPTIONAL_MOE,
    QUANTIZED,
    REQUIRED,
    REQUIRED_DENSE,
    REQUIRED_MOE,
    ModelType,
    architecture_keys,
    read_keys,
)
from qwen35_mcore.config.layer_pattern import interval_of, pattern_from_interval, pattern_from_names
from qwen35_mcore.config.rope import rope_from_hf
from qwen35_mcore.errors import ConfigError


def fields_from_hf(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of `Qwen35Config` from a folder, a config.json or a dictionary.

    Raises:
        ConfigError: see `Qwen35Config.from_hf`.
    """
    root = dict(source) if isinstance(source, Mapping) else _load(Path(source))
    model_type = _model_type(root)
    kind = MODEL_TYPES[model_type]
    text_only = _check_architectures(root.pop("architectures", None), kind)
    text, outer = _split(root, kind) if kind.nested else (root, {})
    if kind.nested and text_only:
        # transformers takes the nested config alone for its model of text
        model_type, outer = kind.text_model_type, {}
        kind = MODEL_TYPES[model_type]
    required = REQUIRED + (REQUIRED_MOE if kind.moe else REQUIRED_DENSE)
    carried = _account(text, kind)
    read = {key: text[key] for key in architecture_keys(kind) if text.get(key) is not None}
    missing = [key for key in required if key not in read]
    if missing:
        raise ConfigError(
            f"the config lacks {', '.join(missing)}",
            fix="add it: sizes differ in this, so there is no default that is safe",
        )
    return {
        "model_type": model_type,
        **read,
        "mtp_num_hidden_layers": _mtp_layers(text, kind),
        "layer_types": _layer_types(text),
        "rope_parameters": rope_from_hf(text),
        "tie_word_embeddings": _tied(text, outer, kind),
        "carried": carried,
        "carried_outer": outer and _account_outer(outer, text, kind),
    }


def hf_from_config(model_config: ModelFields) -> dict[str, Any]:
    """The config.json content for a config, new style (``rope_parameters``, ``layer_types``)."""
    kind = MODEL_TYPES[model_config.model_type]
    text: dict[str, Any] = {
        **deepcopy(model_config.carried),
        **deepcopy(kind.family.always_written),
        **{key: getattr(model_config, key) for key in architecture_keys(kind)},
        kind.family.mtp_key: model_config.mtp_num_hidden_layers,
        "model_type": kind.text_model_type,
        "layer_types": [str(layer) for layer in model_config.layer_types],
        "rope_parameters": model_config.rope_parameters.to_hf(),
        "tie_word_embeddings": model_config.tie_word_embeddings,
    }
    interval = interval_of(model_config.layer_types)
    if interval is not None:
        text["full_attention_interval"] = interval
    architectures = {"architectures": [kind.architecture]}
    if not kind.nested:
        return architectures | dict(sorted(text.items()))
    outer = {
        **deepcopy(model_config.carried_outer),
        "model_type": model_config.model_type,
        "text_config": dict(sorted(text.items())),
        "tie_word_embeddings": model_config.tie_word_embeddings,
    }
    return architectures | dict(sorted(outer.items()))


def _load(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            "there is no config.json",
            got=str(file),
            fix="give a model folder, a config.json, or the name of a flavor; "
            "download a model of the Hub first",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read the config", got=f"{file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError("the config is not valid JSON", got=f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError("the config must be a JSON object", got=str(file))
    return content


def _model_type(root: Mapping[str, Any]) -> str:
    model_type = root.get("model_type")
    if model_type is None:
        raise ConfigError("the config lacks model_type", allowed=", ".join(MODEL_TYPES))
    if model_type not in tuple(MODEL_TYPES):
        raise ConfigError(
            "model_type is not a Qwen3.5 or Qwen3-Next text model",
            got=model_type,
            allowed=", ".join(MODEL_TYPES),
        )
    return model_type


def _check_architectures(names: Any, kind: ModelType) -> bool:
    """Check the classes; true where they say that only the text model is there."""
    text = MODEL_TYPES[kind.text_model_type].architecture
    allowed = list(dict.fromkeys((kind.architecture, text)))
    if names in (None, [], ()):
        return False
    if not isinstance(names, list | tuple) or len(names) != 1 or names[0] not in allowed:
        raise ConfigError(
            "architectures does not fit model_type",
            got=names,
            allowed=" or ".join(allowed),
            fix="only a language model head is supported; correct the key if it is mislabelled",
        )
    return bool(names[0] == text)


def _split(root: Mapping[str, Any], kind: ModelType) -> tuple[dict[str, Any], dict[str, Any]]:
    outer = dict(root)
    text = outer.pop("text_config", None)
    if not isinstance(text, Mapping):
        raise ConfigError(
            f"model_type {root['model_type']} is a vision-language config and needs text_config",
            got=text,
            fix=f"for a text-only model use model_type {kind.text_model_type}",
        )
    if text.get("model_type") not in (None, kind.text_model_type):
        raise ConfigError(
            "text_config is of another model_type",
            got=text["model_type"],
            allowed=kind.text_model_type,
        )
    return dict(text), outer


def _account(text: Mapping[str, Any], kind: ModelType) -> dict[str, Any]:
    """Check that every key of the text level is known; returns those to carry."""
    read = read_keys(kind)
    # transformers ignores the other kind's keys; a number there is harmless except where it says
    # that the model is of the other kind
    unused = REQUIRED_DENSE if kind.moe else OPTIONAL_MOE + REQUIRED_MOE
    carried = {}
    for key, value in text.items():
        if key in read:
            continue
        if key in MTP_KEYS:
            raise ConfigError(
                f"model_type {kind.text_model_type} has another key for {key}",
                got=value,
                fix=f"write it as {kind.family.mtp_key} alone",
            )
        if key in unused:
            _check_unused(key, value)
        elif key in FIXED:
            _check_fixed(key, value)
        else:
            _check_carried(key, value, CARRIED, (*read, *FIXED))
        if key not in kind.family.always_written:
            carried[key] = value
    return carried


def _account_outer(
    outer: Mapping[str, Any], text: Mapping[str, Any], kind: ModelType
) -> dict[str, Any]:
    """Check the top level of a vision-language config; returns the keys to carry."""
    architecture = read_keys(kind)
    carried = {}
    for key, value in outer.items():
        if key in ("model_type", "tie_word_embeddings"):
            continue
        if key in FIXED:
            _check_fixed(key, value)
        elif key in architecture:
            # transformers reads the nested one; a copy outside does no harm while it agrees
            if key not in text or text[key] != value:
                raise ConfigError(
                    f"{key} at the top level contradicts text_config, where it belongs",
                    got=f"{value!r} and {text.get(key)!r}",
                    fix=f"keep {key} inside text_config only",
                )
        else:
            _check_carried(key, value, CARRIED_OUTER, ("text_config", *architecture, *FIXED))
        carried[key] = value
    return carried


def _check_unused(key: str, value: Any) -> None:
    if key in REQUIRED_MOE and value:
        raise ConfigError(
            f"a dense config has the mixture-of-experts key {key}",
            got=value,
            fix="remove it, or use model_type "
            + " or ".join(name for name, kind in MODEL_TYPES.items() if kind.moe),
        )


def _check_fixed(key: str, value: Any) -> None:
    allowed = FIXED[key]
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise ConfigError(
            f"{key} has a value that no published model has",
            got=repr(value),
            allowed=" or ".join(json.dumps(one) for one in allowed),
        )


def _check_carried(
    key: str, value: Any, carried: frozenset[str], architecture: tuple[str, ...]
) -> None:
    if key in QUANTIZED and value is not None:
        raise ConfigError(
            f"the checkpoint is quantised ({key})",
            got=value,
            fix="start from the weights that were quantised (the bfloat16 release); quantise after "
            "training",
        )
    # a leading underscore marks what transformers keeps for itself (_name_or_path...)
    if key in (*carried, *QUANTIZED) or key.startswith("_"):
        return
    near = get_close_matches(key, [*architecture, *carried], n=3)
    raise ConfigError(
        f"unknown key in the config: {key}",
        got=value,
        allowed=f"did you mean {', '.join(near)}?" if near else None,
        fix="correct it, or remove it if it does not change the model",
    )


def _mtp_layers(text: Mapping[str, Any], kind: ModelType) -> Any:
    layers = text.get(kind.family.mtp_key)
    return kind.family.mtp_default if layers is None else layers


def _layer_types(text: Mapping[str, Any]) -> tuple[str, ...]:
    names, interval = text.get("layer_types"), text.get("full_attention_interval")
    if names is None:
        # transformers' own default, and every published size
        return pattern_from_interval(text["num_hidden_layers"], 4 if interval is None else interval)
    pattern = pattern_from_names(names)
    if not pattern:
        raise ConfigError("layer_types is empty", fix="list one kind per decoder layer")
    if interval is not None and pattern != pattern_from_interval(len(pattern), interval):
        raise ConfigError(
            "layer_types and full_attention_interval describe different models",
            got=f"full_attention_interval {interval}, layer_types {list(map(str, pattern))}",
            fix="remove full_attention_interval: layer_types is enough",
        )
    return pattern


def _tied(text: Mapping[str, Any], outer: Mapping[str, Any], kind: ModelType) -> Any:
    if not kind.nested:
        return text.get("tie_word_embeddings", False)
    if "tie_word_embeddings" in outer:
        return outer["tie_word_embeddings"]
    if text.get("tie_word_embeddings"):
        # transformers would take its default for the absent key and untie: ask instead of guessing
        raise ConfigError(
            "tie_word_embeddings is true inside text_config and absent at the top level, "
            "where it counts",
            fix="add tie_word_embeddings to the top level: true if the checkpoint has no lm_head",
        )
    return False
