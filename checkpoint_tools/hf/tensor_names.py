"""Names of the same model under what wrappers and trainers put before them.

DDP, torch.compile, FSDP, activation checkpointing and PEFT leave their own parts in the names of a
state dict, and a model that is saved as a part of another one has other parts before it. The model
is recognised by its embedding: what stands before that is the prefix, wherever it came from. Two
tensors that would get one name, or two embeddings, are not guessed about.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from checkpoint_tools.table.names import FLAT_PREFIX, HEAD, NESTED_PREFIX

_WRAPPERS = {
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module",
}  # fmt: skip
_DECODER = ("embed_tokens", "layers", "norm")
_EMBEDDING = "embed_tokens.weight"


def renamed(names: Iterable[str]) -> dict[str, str]:
    """The model's own names by stored names, for those that are stored under another one.

    Empty where all is as it should be, and where the names fit no single model.
    """
    stored = list(names)
    bare = {name: _unwrapped(name) for name in stored}
    embeddings = {name for name in bare.values() if _is_embedding(name)}
    if len(embeddings) != 1:
        return {}
    before = tuple(embeddings.pop().removesuffix(_EMBEDDING).split(".")[:-1])
    nested = "language_model" in before or any("visual" in one.split(".") for one in bare.values())
    result = {name: _own(bare[name], before, nested) for name in stored}
    if len(set(result.values())) != len(result):
        return {}
    return {name: own for name, own in result.items() if own != name}


def with_prefix_of(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """The decoder's names under the prefix that `others` have it under, by `names`.

    transformers' text models have both: that of a vision-language model, and their own.
    """
    for prefix, other in ((FLAT_PREFIX, NESTED_PREFIX), (NESTED_PREFIX, FLAT_PREFIX)):
        if prefix + _EMBEDDING in names and other + _EMBEDDING in others:
            starts = tuple(f"{prefix}{part}." for part in _DECODER)
            return {
                name: other + name.removeprefix(prefix) for name in names if name.startswith(starts)
            }
    return {}


def describe(changes: Mapping[str, str]) -> list[str]:
    """What was renamed, one line a kind, by its first tensor."""
    kinds: dict[object, list[str]] = {}
    for name, own in changes.items():
        kinds.setdefault(_kind(name, own), []).append(f"{name} is read as {own}")
    return [
        lines[0] + (f", and {len(lines) - 1} more alike" if len(lines) > 1 else "")
        for lines in kinds.values()
    ]


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_embedding(name: str) -> bool:
    before, found, _ = f".{name}".rpartition(f".{_EMBEDDING}")
    parts = before.split(".")
    return bool(found) and name.endswith(_EMBEDDING) and not {"mtp", "visual"} & set(parts)


def _own(name: str, before: tuple[str, ...], nested: bool) -> str:
    """The model's own name of an unwrapped one; `before` is what precedes the decoder's names."""
    parts = tuple(name.split("."))
    depth = len(before)
    if parts[:depth] == before and len(parts) > depth and parts[depth] in _DECODER:
        return (NESTED_PREFIX if nested else FLAT_PREFIX) + ".".join(parts[depth:])
    for at, part in enumerate(parts[: depth + 1]):
        if parts[:at] != before[:at]:
            break
        rest = ".".join(parts[at:])
        if part == "visual":
            return f"model.{rest}"
        if part == "mtp" or rest == HEAD:
            return rest
    return name


def _kind(name: str, own: str) -> object:
    """What two names of a tensor differ by: wrappers anywhere, or what they begin with."""
    if _unwrapped(name) == own:
        return frozenset(name.split(".")) & _WRAPPERS
    tail, other = name.split("."), own.split(".")
    while tail and other and tail[-1] == other[-1]:
        tail.pop()
        other.pop()
    return tuple(tail), tuple(other)
