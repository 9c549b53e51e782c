"""Say where a tensor goes, and how."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint_tools.table.row import Row, TensorSpec
from qwen35_mcore.errors import CheckpointError

_SHOWN = 3


def explain(name: str, table: Sequence[Row], carried: Sequence[str] = ()) -> str:
    """The row of a tensor, in words.

    Args:
        name: a Hugging Face name or a Megatron checkpoint key.

    Raises:
        CheckpointError: no such tensor; the message has the nearest names.
    """
    if name in carried:
        return f"{name}\n  carried through unchanged: Megatron has no place for it"
    for row in table:
        if any(spec.name == name for spec in (*row.hf, *row.mcore)):
            return _describe(row)
    from difflib import get_close_matches

    names = [spec.name for row in table for spec in (*row.hf, *row.mcore)]
    raise CheckpointError(
        "there is no such tensor",
        got=name,
        allowed=f"did you mean {', '.join(get_close_matches(name, names, n=3, cutoff=0.3))}?",
    )


def _describe(row: Row) -> str:
    lines = ["Hugging Face", *_listed(row.hf), "Megatron", *_listed(row.mcore), f"how: {row.how}"]
    splits = [
        f"{what} splits axis {axis}"
        for what, axis in (
            ("expert parallelism", row.ep_axis),
            (f"{'expert ' if row.ep_axis is not None else ''}tensor parallelism", row.tp_axis),
        )
        if axis is not None
    ]
    lines.append(f"in training: {' and '.join(splits) or 'every rank of a stage holds it whole'}")
    if row.float32:
        lines.append("stored in float32 whatever the model's dtype")
    return "\n".join(lines)


def _listed(specs: Sequence[TensorSpec]) -> list[str]:
    lines = [f"  {spec.name} {list(spec.shape)}" for spec in specs[:_SHOWN]]
    if len(specs) > _SHOWN:
        lines.append(f"  ... and {len(specs) - _SHOWN} more")
    return lines
