"""Tensors that are no weights of a model: of adapters that were not merged, of quantisation."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qwen35_mcore.errors import CheckpointError

_ADAPTER = re.compile(
    r"(^|\.)(lora_|base_layer\.|modules_to_save\.|original_module\.|hada_w|lokr_|oft_|boft_|vera_|"
    r"ia3_|ln_tuning_|prompt_encoder|prompt_embeddings|trainable_tokens)"
)
_QUANTISED = re.compile(
    r"(^|[._])(weight_scale(_inv|_2)?|weight_zero_point|weight_packed|weight_shape|input_scale|"
    r"qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|quant_map|nested_absmax|"
    r"quant_state\.\w+|proj_blocks|proj_scales|proj_scale_inv|activation_scale)$"
)


def refuse_foreign(names: Iterable[str]) -> None:
    """Refuse names of un-merged adapters and of quantised weights.

    Raises:
        CheckpointError: there are such names.
    """
    names = list(names)
    adapter = [name for name in names if _ADAPTER.search(name)]
    if adapter:
        raise CheckpointError(
            f"{len(adapter)} tensors are of an adapter (PEFT) that is not merged into the model",
            got=", ".join(adapter[:3]),
            fix="load it as it was trained, call merge_and_unload() on it, and save what that "
            "returns with save_pretrained()",
        )
    quantised = [name for name in names if _QUANTISED.search(name)]
    if quantised:
        raise CheckpointError(
            "the checkpoint is quantised",
            got=", ".join(quantised[:3]),
            fix="start from the weights that were quantised: the bfloat16 release",
        )
