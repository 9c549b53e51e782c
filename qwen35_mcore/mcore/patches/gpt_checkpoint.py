"""Load a checkpoint of GPTModel's keys into a HybridModel that has these keys itself.

megatron-core translates the keys of any HybridModel where the checkpoint's arguments name no hybrid
layer pattern. A model whose ``sharded_state_dict`` gives GPTModel's keys needs no translation, and
megatron stops it, because its run names no pattern either.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training import checkpointing

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _only_where_a_pattern_is_named(original: Any) -> Any:
    def _maybe_setup_gpt_to_hybrid_load(args: Any, ckpt_args: Any, model: Any) -> Any:
        if not args.hybrid_layer_pattern:
            return None, False
        return original(args, ckpt_args, model)

    return _maybe_setup_gpt_to_hybrid_load


def _probe() -> Verdict:
    """Is a HybridModel without a named pattern kept from loading?"""
    model = HybridModel.__new__(HybridModel)
    no_pattern = SimpleNamespace(hybrid_layer_pattern=None)
    try:
        checkpointing._maybe_setup_gpt_to_hybrid_load(no_pattern, no_pattern, [model])
    except RuntimeError as error:
        return shows("--hybrid-layer-pattern" in str(error))
    return Verdict.NO_FAULT


PATCH = Patch(
    name="checkpoint of GPTModel",
    target="megatron.training.checkpointing:_maybe_setup_gpt_to_hybrid_load",
    why="a HybridModel whose checkpoint keys are GPTModel's is kept from loading them",
    replace=_only_where_a_pattern_is_named,
    probe=_probe,
)
