"""Transformers as a reference on any machine, with FLA hidden while it is imported.

Transformers binds FLA's kernels when a modeling module is imported, if FLA can be imported; on a
CPU they crash, and on a GPU the reference would be the thing under test.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen35_mcore.config.model_config import Qwen35Config

HIDDEN = ("fla", "causal_conv1d", "flash_qla")

_loaded: dict[str, ModuleType] = {}


@contextlib.contextmanager
def kernels_hidden() -> Iterator[None]:
    """Imports of FLA and its companions fail inside; modules loaded before come back after."""
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_hidden(name)}
    sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in HIDDEN:
            sys.modules.pop(name, None)
        sys.modules.update(saved)


def modeling(name: str = "qwen3_5") -> ModuleType:
    """``transformers.models.<name>.modeling_<name>``, bound to its own torch functions.

    Raises:
        RuntimeError: someone imported it with FLA in sight; its functions are bound for good.
    """
    module_name = f"transformers.models.{name}.modeling_{name}"
    if name not in _loaded:
        if module_name in sys.modules and any(map(importlib.util.find_spec, HIDDEN)):
            raise RuntimeError(f"{module_name} was imported before: import it through this helper")
        with kernels_hidden():
            _loaded[name] = importlib.import_module(module_name)
    return _loaded[name]


def model_class(config: Qwen35Config) -> Any:
    """Transformers' class of a config's model, with its language model head."""
    return getattr(modeling(config.model_type.removesuffix("_text")), config.hf_architecture)


def part_class(config: Qwen35Config, part: str) -> Any:
    """Transformers' class of a part of a config's model, such as ``RMSNorm``."""
    module = modeling(config.model_type.removesuffix("_text"))
    return getattr(module, config.hf_architecture.partition("For")[0] + part)


def load_pretrained(folder: Path, *, text_only: bool = False) -> Any:
    """The folder's model as its users load it, float32; asserts that it is loaded whole.

    Args:
        text_only: the text class of a vision-language folder.
    """
    config = json.loads((folder / "config.json").read_text())
    module = modeling(config["model_type"].removesuffix("_text"))
    name = config["architectures"][0]
    if text_only:
        name = name.replace("ForConditionalGeneration", "ForCausalLM")
    model, info = getattr(module, name).from_pretrained(
        folder, output_loading_info=True, dtype="float32"
    )
    assert not any(info.values()), info
    return model.eval()


def logits_of(model: Any) -> Any:
    """Logits of some tokens, float32."""
    import torch

    with torch.no_grad():
        return model(
            torch.arange(12)[None] * 7 % model.get_input_embeddings().num_embeddings
        ).logits


def _is_hidden(module_name: str) -> bool:
    return module_name.partition(".")[0] in HIDDEN
